"""The results of finished models as a table, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich import box
from rich.table import Table

from surpass.report.read import Row
from surpass.report.results import cell, domains, interval, models, totals


@dataclass(frozen=True)
class Column:
    """start: whether a group of columns begins here."""

    name: str
    start: bool = False


@dataclass(frozen=True)
class Cell:
    text: str
    range: str = ""
    best: bool = False
    colour: str = ""


@dataclass(frozen=True)
class Line:
    cells: list[Cell]
    hero: bool = False


@dataclass(frozen=True)
class Grid:
    """Column groups as (name, span), columns, and one line per model."""

    groups: list[tuple[str, int]]
    columns: list[Column]
    rows: list[Line]


TOTALS = (("tokens_generated", "generated"), ("tokens_trained", "trained"))


def results_grid(results: Row, hero: str = "ExOPD", palette: Mapping[str, str] | None = None) -> Grid:
    """One line per model; per domain pass@1 with its interval, further pass@k, mean length; then tokens.

    The best pass@1 of each domain is marked; columns nobody reports are left out.
    """
    rows = results["rows"]
    ks = sorted(
        {
            int(n[5:])
            for row in rows
            for n in row
            if n.startswith("pass@") and n[5:].isdigit() and n[5:] != "1"
        }
    )
    has_length = any(row.get("mean_length") is not None for row in rows)
    spent = [(key, name) for key, name in TOTALS if any(row.get(key) is not None for row in rows)]
    groups, columns = [("", 1)], [Column("model")]
    best: dict[str, float] = {}
    for domain in domains(results):
        names = ["pass@1", *(f"pass@{k}" for k in ks), *(["length"] if has_length else [])]
        groups.append((domain, len(names)))
        columns += [Column(name, start=i == 0) for i, name in enumerate(names)]
        reached = [row["pass@1"] for row in rows if row["domain"] == domain and row["pass@1"] is not None]
        best[domain] = max(reached, default=1.0)
    if spent:
        groups.append(("tokens", len(spent)))
        columns += [Column(name, start=i == 0) for i, (_, name) in enumerate(spent)]

    lines = []
    for model in models(results):
        cells = [Cell(model, colour=(palette or {}).get(model, ""))]
        for domain in domains(results):
            row = cell(results, model, domain) or {}
            cells.append(_level(row, best[domain]))
            cells += [Cell(_share(row.get(f"pass@{k}"))) for k in ks]
            if has_length:
                length = row.get("mean_length")
                cells.append(Cell("" if length is None else f"{length:.1f}"))
        own = [row for row in rows if row["model"] == model]
        cells += [Cell(totals(own, key)) for key, _ in spent]
        lines.append(Line(cells, hero=model.lower() == hero.lower()))
    return Grid(groups, columns, lines)


def results_table(results: Row, title: str = "results") -> Table:
    """The same figures for a terminal of 80 columns: one line per model and domain; the best pass@1 of each is bold."""
    rows = results["rows"]
    ks = sorted({int(n[5:]) for row in rows for n in row if n.startswith("pass@") and n[5:].isdigit()} - {1})
    spent = [(key, name) for key, name in TOTALS if any(row.get(key) is not None for row in rows)]
    seeds = ", ".join(str(seed) for seed in results.get("seeds", []))
    table = Table(
        title=title,
        caption=f"seeds: {seeds}" if seeds else None,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in ("model", "domain"):
        table.add_column(name, no_wrap=True)
    for name in ("pass@1", "interval", *(f"pass@{k}" for k in ks), "length", *(name for _, name in spent)):
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    for model in models(results):
        own = [row for row in rows if row["model"] == model]
        for row in own:
            known = [r["pass@1"] for r in rows if r["domain"] == row["domain"] and r["pass@1"] is not None]
            level = _level(row, max(known, default=1.0))
            length = row.get("mean_length")
            table.add_row(
                model if row is own[0] else "",
                row["domain"],
                f"[bold]{level.text}[/]" if level.best else level.text,
                level.range,
                *(_share(row.get(f"pass@{k}")) for k in ks),
                "" if length is None else f"{length:.1f}",
                *(totals(own, key) if row is own[0] else "" for key, _ in spent),
            )
    return table


def _level(row: Row, best: float) -> Cell:
    value = row.get("pass@1")
    if value is None:
        return Cell("")
    low, high = interval(row)
    known = row.get("low") is not None and row.get("high") is not None
    # Percent signs only once: the interval is read beside the value.
    return Cell(_share(value), f"{100 * low:.1f}–{100 * high:.1f}" if known else "", best=value >= best)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
