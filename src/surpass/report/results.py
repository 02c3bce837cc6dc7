"""Figures and sentences of a comparison of finished models: `results.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from surpass.report.plots import Figure
from surpass.report.read import Row
from surpass.report.theme import GREY, INK, band, colours, figure

EXPERT = "expert-"  # followed by its domain
EXPERTS = "the expert"
WORDS = {
    2: "clearly above",
    1: "above with overlapping intervals",
    0: "level",
    -1: "below with overlapping intervals",
    -2: "clearly below",
}


def models(results: Row) -> list[str]:
    """Names of the compared models, in the order of the rows."""
    return list(dict.fromkeys(row["model"] for row in results["rows"]))


def domains(results: Row) -> list[str]:
    return list(dict.fromkeys(row["domain"] for row in results["rows"]))


def cell(results: Row, model: str, domain: str) -> Row | None:
    """The row of one model on one domain; model names are compared without regard to case."""
    for row in results["rows"]:
        if row["model"].lower() == model.lower() and row["domain"] == domain:
            return row
    return None


def levels(results: Row) -> list[Figure]:
    """pass@1 of every model with its interval, one panel per domain."""
    names, palette = models(results), colours(models(results))
    figures = []
    for domain in domains(results):
        rows = [row for name in names if (row := cell(results, name, domain)) and row["pass@1"] is not None]
        plot = figure("pass@1", "", height=70 + 30 * len(names), hovermode="closest")
        for row in rows:
            low, high = interval(row)
            value = row["pass@1"]
            plot.add_scatter(
                x=[value],
                y=[row["model"]],
                mode="markers",
                marker={"size": 10, "color": palette[row["model"]]},
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [high - value],
                    "arrayminus": [value - low],
                    "thickness": 2,
                    "width": 0,
                    "color": palette[row["model"]],
                },
                hovertemplate=f"{value:.1%} [{low:.1%}, {high:.1%}]<extra>%{{y}}</extra>",
            )
        plot.update_xaxes(tickformat=".0%", showgrid=True)
        plot.update_yaxes(categoryorder="array", categoryarray=names[::-1], range=[-0.6, len(names) - 0.4])
        figures.append(Figure(f"pass@1: {domain}", "Dot: mean over prompts; line: its interval.", plot))
    return figures


def sweep(results: Row) -> list[Figure]:
    """pass@1 against λ per domain, the experts as horizontal lines; empty where nothing was swept."""
    rows = results.get("sweep", [])
    experts = [name for name in models(results) if name.lower().startswith(EXPERT)]
    palette = colours(models(results))
    line_colour = palette.get("ExOPD", next(iter(colours(["ExOPD"]).values())))
    figures = []
    for domain in dict.fromkeys(row["domain"] for row in rows):
        part = [row for row in rows if row["domain"] == domain and row["pass@1"] is not None]
        grid = sorted({row["lambda"] for row in part})
        if not grid:
            continue
        plot = figure("reward scale λ", "pass@1", height=330, hovermode="closest")
        for expert in experts:
            row = cell(results, expert, domain)
            if row is None or row["pass@1"] is None:
                continue
            low, high = interval(row)
            plot.add_hrect(y0=low, y1=high, fillcolor=band(palette[expert]), line_width=0, layer="below")
            plot.add_hline(y=row["pass@1"], line={"color": palette[expert], "width": 1.6, "dash": "dash"})
        if min(grid) <= 1.0 <= max(grid):
            plot.add_vline(
                x=1.0,
                line={"color": GREY[0], "width": 1, "dash": "dot"},
                annotation={
                    "text": "λ = 1 (OPD)",
                    "font": {"size": 11, "color": INK[0]},
                    "yanchor": "bottom",
                },
                annotation_position="bottom right",
            )
        seeds = list(dict.fromkeys(row.get("seed") for row in part))
        means, lows, highs = [], [], []
        for value in grid:
            here = [row for row in part if row["lambda"] == value]
            means.append(sum(row["pass@1"] for row in here) / len(here))
            lows.append(min(interval(row)[0] for row in here))
            highs.append(max(interval(row)[1] for row in here))
        if len(seeds) > 1:
            plot.add_scatter(
                x=[row["lambda"] for row in part],
                y=[row["pass@1"] for row in part],
                mode="markers",
                text=[f"seed {row.get('seed')}" for row in part],
                marker={"size": 9, "color": band(line_colour, 0.3)},
                hovertemplate="%{text}, λ = %{x}: %{y:.1%}<extra></extra>",
            )
        plot.add_scatter(
            x=grid,
            y=means,
            mode="lines+markers",
            line={"color": line_colour, "width": 2.2},
            marker={"size": 6},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [h - m for h, m in zip(highs, means, strict=True)],
                "arrayminus": [m - low for m, low in zip(means, lows, strict=True)],
                "thickness": 1.4,
                "width": 0,
                "color": line_colour,
            },
            hovertemplate="λ = %{x}: %{y:.1%}<extra></extra>",
        )
        plot.update_xaxes(tickvals=grid)
        plot.update_yaxes(tickformat=".0%")
        many = (
            f"Mean of {len(seeds)} seeds (pale dots: each); bars span their intervals."
            if len(seeds) > 1
            else ""
        )
        caption = f"{many or 'Bars: interval over prompts.'} Dashed: the experts, with their intervals."
        figures.append(Figure(f"λ sweep: {domain}", caption, plot))
    return figures


def interval(row: Row) -> tuple[float, float]:
    """Both ends; the value itself where none was measured."""
    low, high = row.get("low"), row.get("high")
    return (row["pass@1"] if low is None else low, row["pass@1"] if high is None else high)


def verdict(results: Row, model: str = "ExOPD", control: str = "OPD") -> tuple[str, list[str]]:
    """What the numbers say of `model`: a headline, and one sentence per comparison.

    Compared with the expert of each domain (`expert-<domain>`) and with `control`, on pass@1. "Clearly" is
    said only where the two intervals do not overlap. The headline claims what the point
    estimates show and adds what the intervals leave open; it says so when the model does not win.
    """
    rivals = [(d, f"{EXPERT}{d}", EXPERTS) for d in domains(results) if cell(results, f"{EXPERT}{d}", d)]
    rivals += [(d, control, control) for d in domains(results) if cell(results, control, d)]
    pairs = []
    for domain, rival, role in rivals:
        mine, theirs = cell(results, model, domain), cell(results, rival, domain)
        if mine and theirs and mine["pass@1"] is not None and theirs["pass@1"] is not None:
            pairs.append((role, _standing(mine, theirs), domain, mine, theirs))
    if not pairs:
        return f"There is no {model} result to compare with an expert or with {control}.", []

    standings = {
        role: [s for r, s, *_ in pairs if r == role] for role in dict.fromkeys(pair[0] for pair in pairs)
    }
    overlapping = sum(abs(standing) < 2 for _, standing, *_ in pairs)
    tail = f"; in {overlapping} of {len(pairs)} comparisons the intervals overlap" if overlapping else ""
    if set(standings) == {EXPERTS, control} and all(standing > 0 for _, standing, *_ in pairs):
        count = len(standings[EXPERTS])
        whom = {1: "the expert on its domain", 2: "both experts on their domains"}
        experts = whom.get(count, f"all {count} experts on their domains")
        headline = f"{model} is above {experts}, and above {control} on every domain{tail}."
    else:
        clauses = [
            f"above {role} on {sum(s > 0 for s in found)} of {len(found)} domains"
            for role, found in standings.items()
        ]
        headline = f"{model} is " + " and ".join(clauses) + f"{tail}."
    return headline, [
        f"{domain}: {model} {_percent(mine)} against {theirs['model']} {_percent(theirs)}, {WORDS[standing]}"
        for _, standing, domain, mine, theirs in pairs
    ]


def _standing(mine: Row, theirs: Row) -> int:
    """Sign of the difference; doubled where the intervals do not overlap, which takes intervals."""
    difference = mine["pass@1"] - theirs["pass@1"]
    if math.isclose(difference, 0.0, abs_tol=1e-12):
        return 0
    better, worse = (mine, theirs) if difference > 0 else (theirs, mine)
    known = better.get("low") is not None and worse.get("high") is not None
    clear = known and better["low"] > worse["high"]
    return int(math.copysign(2 if clear else 1, difference))


def _percent(row: Row) -> str:
    low, high = interval(row)
    return f"{row['pass@1']:.1%} [{low:.1%}, {high:.1%}]"


def totals(rows: Sequence[Row], key: str) -> str:
    """A number of the whole model, repeated on every domain's row; several if the rows disagree."""
    values = dict.fromkeys(row[key] for row in rows if row.get(key) is not None)
    return " / ".join(large(value) for value in values)


def large(count: float) -> str:
    """`1.92 M`: three digits are enough to compare budgets."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return f"{count:.0f}"
