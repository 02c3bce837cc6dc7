"""Rows of a data set: JSONL, JSON and Parquet files, folders, and the hub. Each row knows where it stands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

FILES = (".jsonl", ".json", ".parquet")


class DataError(ValueError):
    """A data set cannot be used as it is. The message names the file, the row and what to do."""


class MissingSourceError(DataError, FileNotFoundError):
    """There is no such file, folder or hub data set."""


@dataclass(frozen=True)
class Row:
    """One source row. where: its place in words (`train.jsonl line 3`), for error messages."""

    values: dict[str, Any]
    where: str


def read_rows(source: str, split: str = "train", limit: int | None = None) -> list[Row]:
    """The first `limit` rows (None: all) of a file, a folder, or a hub data set `owner/name[:config]`.

    `split` chooses within folders and hub data sets; a single file has none.
    Raises MissingSourceError, or DataError for malformed, unsupported and empty sources.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, found {limit}")
    path = Path(source).expanduser()
    if path.suffix.lower() in FILES:
        rows = list(islice(_file(path), limit))
    elif path.is_file():
        raise DataError(
            f"{source}: cannot read {path.suffix or 'files without ending'}; expected one of {FILES}"
        )
    elif path.is_dir():
        rows = _folder(path, split, limit)
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise MissingSourceError(
            f"{source}: there is no such file or folder (looked from {Path.cwd().name}/)"
        )
    else:
        rows = _hub(source, split, limit)
    if not rows:
        raise DataError(f"{source}: found no rows; expected at least one")
    return rows


def _file(path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise MissingSourceError(f"{path}: there is no such file")
    if path.suffix.lower() == ".parquet":
        return _parquet(path)
    if path.suffix.lower() == ".json" and _starts_with_bracket(path):
        return _array(path)
    return _lines(path)


def _starts_with_bracket(path: Path) -> bool:
    # Many `.json` files hold one object per line: the first character tells an array from lines.
    return path.read_bytes().lstrip()[:1] == b"["


def _lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path.name} line {number}"
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{path} line {number}: not valid JSON ({error}): {line[:80]!r}; expected one JSON object per line"
                ) from None
            yield _row(value, where)


def _array(path: Path) -> Iterator[Row]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    for number, value in enumerate(values, 1):
        yield _row(value, f"{path.name} entry {number}")


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(path).iter_batches():
            for value in batch.to_pylist():
                number += 1
                yield _row(value, f"{path.name} row {number}")
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from None


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object with named fields, found {type(value).__name__}")
    return Row(value, where)


def _folder(path: Path, split: str, limit: int | None) -> list[Row]:
    import datasets

    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise DataError(f"{path}: no split {split!r}; there are {sorted(map(str, loaded))}")
            loaded = loaded[split]
        return _dataset(loaded, path.name, limit)
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in FILES)
    chosen = [p for p in files if p.name.startswith(split)]
    if not chosen:
        raise DataError(
            f"{path}: neither saved by `datasets` nor holding a {split}*.jsonl, {split}*.json or {split}*.parquet; "
            f"found {[p.name for p in files] or 'no data files'}; name one file, or choose another split"
        )
    return list(islice((row for file in chosen for row in _file(file)), limit))


def _hub(source: str, split: str, limit: int | None) -> list[Row]:
    import datasets

    name, _, configuration = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, configuration or None, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise MissingSourceError(
            f"{source}: no such file here, and no data set of that name could be fetched ({error}); "
            "check the path, or the hub id and the network"
        ) from None
    except (ValueError, RuntimeError) as error:
        raise DataError(
            f"{source}: cannot load split {split!r} ({error}); a configuration is named as {name}:CONFIG"
        ) from None
    return _dataset(loaded, source, limit)


def _dataset(loaded: Any, name: str, limit: int | None) -> list[Row]:
    count = len(loaded) if limit is None else min(limit, len(loaded))
    return [_row(loaded[i], f"{name} row {i + 1}") for i in range(count)]
