"""The results of finished models as a table, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
    """The same grid for a terminal; the best pass@1 of each domain is bold."""
    grid = results_grid(results)
    group_of = [name for name, span in grid.groups for _ in range(span)]
    seeds = ", ".join(str(seed) for seed in results.get("seeds", []))
    table = Table(title=title, caption=f"seeds: {seeds}" if seeds else None)
    for column, group in zip(grid.columns, group_of, strict=True):
        # The name of a group stands over its first column only, which keeps the others narrow.
        table.add_column(
            f"{group if column.start else ''}\n{column.name}",
            justify="right" if group else "left",
            no_wrap=True,
        )
    for line in grid.rows:
        texts = [f"{c.text} {c.range}".strip() for c in line.cells]
        table.add_row(*(f"[bold]{t}[/]" if c.best else t for t, c in zip(texts, line.cells, strict=True)))
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
