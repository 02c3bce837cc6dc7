"""Read a run folder: loud about broken files, tolerant of a run that was killed while writing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]


@dataclass(frozen=True)
class Lines:
    """Objects of a JSONL file, and what the reader should know of it."""

    rows: list[Row]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunFolder:
    """What a run wrote. config: nested, as in `config.yaml`. metrics: sorted by step, one row per step.

    evaluations: one row per step and domain. samples: kept completions. notes: what was odd about the files.
    """

    path: Path
    config: Row
    metrics: list[Row]
    evaluations: list[Row]
    samples: list[Row]
    notes: list[str]

    @property
    def name(self) -> str:
        return self.path.resolve().name


def read_jsonl(path: Path) -> Lines:
    """All objects of a JSONL file; an absent file has none.

    A last line without its newline that does not parse is what a killed run leaves: it is dropped and noted.
    Any other line that is not a JSON object raises ValueError with file and line.
    """
    if not path.exists():
        return Lines([])
    rows: list[Row] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:
            if number == len(lines):
                return Lines(rows, [f"{path.name}: the last line ({number}) is cut short and was left out"])
            raise ValueError(f"{path}:{number}: not JSON ({error}); remove or repair this line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
    return Lines(rows)


def read_run(path: Path) -> RunFolder:
    """Read a run folder; FileNotFoundError where it is none, ValueError with file and line where broken."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; give the folder of a run")
    metrics, evaluations = read_jsonl(path / "metrics.jsonl"), read_jsonl(path / "evaluations.jsonl")
    notes = [*metrics.notes, *evaluations.notes]
    samples: list[Row] = []
    for part in sorted((path / "samples").glob("*.jsonl")):
        lines = read_jsonl(part)
        samples += [_sample(row, part) for row in lines.rows]
        notes += lines.notes
    if not (metrics.rows or evaluations.rows or samples):
        raise FileNotFoundError(
            f"{path} holds no metrics.jsonl, evaluations.jsonl or samples/*.jsonl with content; "
            "give the folder of a run"
        )
    return RunFolder(
        path=path,
        config=read_config(path / "config.yaml"),
        metrics=_latest(metrics.rows, ("step",), "metrics.jsonl", notes),
        evaluations=_latest(evaluations.rows, ("step", "domain"), "evaluations.jsonl", notes),
        samples=samples,
        notes=notes,
    )


def read_config(path: Path) -> Row:
    """The nested configuration of a run; empty where there is none."""
    if not path.exists():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({error})") from error
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a mapping of settings, found {type(config).__name__}")
    return config


def read_results(path: Path) -> Row:
    """A `results.json`; raises ValueError naming the first row that lacks a needed column."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    check_results(results, str(path))
    return results


def check_results(results: Row, source: str = "results") -> None:
    """Raise ValueError where a row of `results` lacks a column the reports need."""
    for part, needed in (("rows", ("model", "domain", "pass@1")), ("sweep", ("lambda", "domain", "pass@1"))):
        for i, row in enumerate(results.get(part, [])):
            if missing := [key for key in needed if key not in row]:
                raise ValueError(f"{source}: {part}[{i}] lacks {missing}; it has {sorted(row)}")
    if not results.get("rows"):
        raise ValueError(f"{source}: expected a non-empty list 'rows', found keys {sorted(results)}")


def _sample(row: Row, path: Path) -> Row:
    """Check that every signal has one number per token."""
    tokens, signals = row.get("tokens"), row.get("signals", {})
    where = f"{path}: sample of prompt {row.get('prompt_id')!r}"
    if not isinstance(tokens, list):
        raise ValueError(f"{where} has no list 'tokens'; it has {sorted(row)}")
    for name, values in signals.items():
        if len(values) != len(tokens):
            raise ValueError(f"{where}: signal {name!r} has {len(values)} values for {len(tokens)} tokens")
    return row


def _latest(rows: list[Row], key: tuple[str, ...], file: str, notes: list[str]) -> list[Row]:
    """A resumed run may write some steps twice: the later row is of the weights that went on."""
    latest = {tuple(row.get(name) for name in key): row for row in rows}
    if len(latest) < len(rows):
        notes.append(f"{file}: {len(rows) - len(latest)} rows of steps repeated after a resume were left out")
    return sorted(latest.values(), key=lambda row: row.get("step") or 0)
