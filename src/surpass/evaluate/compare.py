"""Put several runs side by side: one table, and a check that they differ only where they should."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from surpass.evaluate.passk import Estimate
from surpass.evaluate.summary import OVERALL
from surpass.report.read import RunFolder, read_run

SEED = "seed"
# Says where a run is kept, not what is trained.
IDENTITY = ("output",)


@dataclass(frozen=True)
class Line:
    """One line of a comparison: the last evaluation, on one domain, of runs that differ only by seed.

    estimates: by metric; with several seeds the mean of their values, and an interval that spans all
    of theirs. tokens: sums of `tokens/*` over training, averaged over seeds.
    """

    name: str
    domain: str
    seeds: tuple[Any, ...]
    step: int | None
    estimates: dict[str, Estimate]
    mean_length: float
    tokens: dict[str, float]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"method": {"samples": 8}}` -> `{"method.samples": 8}`; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differing(runs: Sequence[RunFolder]) -> dict[str, dict[str, Any]]:
    """Settings not equal in all runs, as `{key: {run path: value}}`; a missing key counts as None."""
    flat = {str(run.path): flatten(run.config) for run in runs}
    keys = dict.fromkeys(key for config in flat.values() for key in config)
    table = {key: {run: config.get(key) for run, config in flat.items()} for key in keys}
    return {
        key: values
        for key, values in table.items()
        if key not in IDENTITY
        and len({json.dumps(v, sort_keys=True, default=str) for v in values.values()}) > 1
    }


def undeclared(runs: Sequence[RunFolder], knobs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Differing settings that no declared knob covers.

    A knob names a key or a section (`method`); seeds may differ.
    Raises ValueError where a run has no config.yaml.
    """
    if missing := [run.name for run in runs if not run.config]:
        raise ValueError(f"no config.yaml in {missing}: whether these runs may be compared cannot be known")
    allowed = (*knobs, SEED)
    return {
        key: values
        for key, values in differing(runs).items()
        if not any(key == knob or key.startswith(f"{knob}.") for knob in allowed)
    }


def check_comparable(runs: Sequence[RunFolder], knobs: Sequence[str]) -> None:
    """Raise ValueError listing every setting that differs without having been declared."""
    if extra := undeclared(runs, knobs):
        listed = "\n".join(
            f"  {key}: " + ", ".join(f"{Path(run).name} = {value!r}" for run, value in values.items())
            for key, values in extra.items()
        )
        raise ValueError(
            f"the runs differ in {len(extra)} settings that were not declared as knobs "
            f"({', '.join(knobs) or 'none'} declared):\n{listed}\n"
            "declare them, or run again with equal settings"
        )


def gather(paths: Sequence[Path]) -> list[RunFolder]:
    """Read the run folders; raises ValueError where two of them are the same one."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("the same run is given twice")
    return [read_run(path) for path in paths]


def labels(runs: Sequence[RunFolder]) -> list[str]:
    """A name for each run: the end of its path, as long as it takes to tell all of them apart."""
    parts = [run.path.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("the same run is given twice")


def lines(runs: Sequence[RunFolder]) -> list[Line]:
    """Last evaluations, one line per domain and set of runs whose settings are equal but for the seed."""
    groups: dict[str, list[tuple[str, RunFolder]]] = {}
    for name, run in zip(labels(runs), runs, strict=True):
        settings = {k: v for k, v in flatten(run.config).items() if k not in (*IDENTITY, SEED)}
        key = json.dumps(settings, sort_keys=True, default=str) if settings else name
        if any(other.config.get(SEED) == run.config.get(SEED) for _, other in groups.get(key, [])):
            key = f"{key} {name}"  # the same settings and seed again: a repetition, not another seed
        groups.setdefault(key, []).append((name, run))
    return [line for group in groups.values() for line in _lines_of(group[0][0], [run for _, run in group])]


def as_results(rows: Sequence[Line]) -> dict[str, Any]:
    """The lines in the layout of `results.json`, which the reports draw."""

    def known(value: float) -> float | None:
        return None if math.isnan(value) else value

    table = []
    for row in rows:
        if "pass@1" not in row.estimates:
            continue
        first = row.estimates["pass@1"]
        table.append(
            {
                "model": row.name if len(row.seeds) == 1 else f"{row.name} ({len(row.seeds)} seeds)",
                "domain": row.domain,
                **{name: known(e.value) for name, e in row.estimates.items()},
                "low": known(first.low),
                "high": known(first.high),
                "mean_length": known(row.mean_length),
                **{f"tokens_{kind}": count for kind, count in row.tokens.items()},
            }
        )
    return {"rows": table, "seeds": list(dict.fromkeys(seed for row in rows for seed in row.seeds))}


def comparison_table(runs: Sequence[RunFolder]) -> Table:
    """The comparison for a terminal."""
    rows = lines(runs)
    metrics = list(dict.fromkeys(name for row in rows for name in row.estimates))
    table = Table(
        title="last evaluations", caption="intervals: 95% over prompts; several seeds: the span of theirs"
    )
    for name in ("run", "domain", "seeds", "step"):
        table.add_column(name)
    for name in (*metrics, "length", "generated", "trained"):
        table.add_column(name, justify="right")
    previous = None
    for row in rows:
        if previous is not None and row.name != previous:
            table.add_section()
        table.add_row(
            row.name if row.name != previous else "",
            row.domain,
            ", ".join(str(seed) for seed in row.seeds),
            "" if row.step is None else str(row.step),
            *(str(row.estimates[name]) if name in row.estimates else "" for name in metrics),
            f"{row.mean_length:.1f}",
            *(f"{row.tokens[name]:,.0f}" if name in row.tokens else "" for name in ("generated", "trained")),
        )
        previous = row.name
    return table


def _lines_of(name: str, runs: Sequence[RunFolder]) -> list[Line]:
    last = [_last_evaluation(run) for run in runs]
    domains = dict.fromkeys(domain for rows in last for domain in rows)
    made = []
    for domain in sorted(domains, key=lambda name: name == OVERALL):
        rows = [rows[domain] for rows in last if domain in rows]
        metrics = [key for key in rows[0] if key.startswith(("pass@", "avg@", "maj@")) and "/" not in key]
        totals = [_tokens(run) for run in runs]
        made.append(
            Line(
                name=name,
                domain=domain,
                seeds=tuple(run.config.get(SEED, "?") for run in runs),
                step=rows[0].get("step"),
                estimates={key: pool([_estimate(row, key) for row in rows]) for key in metrics},
                mean_length=sum(row.get("mean_length", math.nan) for row in rows) / len(rows),
                tokens={
                    kind: sum(t[kind] for t in totals) / len(totals)
                    for kind in totals[0]
                    if all(kind in t for t in totals)
                },
            )
        )
    return made


def pool(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over seeds; the interval spans all of theirs, which claims less than any of them alone."""
    known = [e for e in estimates if not math.isnan(e.value)]
    if not known:
        return Estimate(math.nan, math.nan, math.nan)
    return Estimate(
        sum(e.value for e in known) / len(known), min(e.low for e in known), max(e.high for e in known)
    )


def _last_evaluation(run: RunFolder) -> dict[str, dict[str, Any]]:
    """The row of each domain at the last evaluated step."""
    if not run.evaluations:
        return {}
    step = run.evaluations[-1].get("step")
    return {row.get("domain", OVERALL): row for row in run.evaluations if row.get("step") == step}


def _estimate(row: Mapping[str, Any], name: str) -> Estimate:
    value, low, high = (row.get(f"{name}{end}") for end in ("", "/low", "/high"))
    if value is None:
        return Estimate(math.nan, math.nan, math.nan)
    return Estimate(value, value if low is None else low, value if high is None else high)


def _tokens(run: RunFolder) -> dict[str, float]:
    names = dict.fromkeys(name for row in run.metrics for name in row if name.startswith("tokens/"))
    return {name.removeprefix("tokens/"): sum(row.get(name) or 0 for row in run.metrics) for name in names}
