"""Figures of training: one panel per quantity, drawn only where the run logged it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import plotly.graph_objects as go

from surpass.report.read import Row
from surpass.report.theme import band, colours, dash, figure

# Below this many points every step can be seen; above, a running mean over a twentieth of the run is added.
SMOOTH_FROM = 40


@dataclass(frozen=True)
class Figure:
    """A panel of a report: heading, one sentence that says how to read it, and the plot."""

    title: str
    caption: str
    plot: go.Figure


@dataclass(frozen=True)
class Quantity:
    """What one panel draws. keys: metrics by name; a key ending in `/` takes every metric under it."""

    title: str
    caption: str
    unit: str
    keys: tuple[str, ...]
    cumulative: bool = False
    share: bool = False

    def present(self, rows: Sequence[Row]) -> list[str]:
        """The metrics of this panel that `rows` have at least one finite number of."""
        names = dict.fromkeys(name for row in rows for name, value in row.items() if _finite(value))
        return [
            n for key in self.keys for n in names if n == key or (key.endswith("/") and n.startswith(key))
        ]


QUANTITIES = (
    Quantity("Loss", "The minimised objective, as the optimiser saw it.", "loss (nats)", ("loss",)),
    Quantity(
        "Reward", "Mean over completions; components where there are any.", "reward", ("reward", "reward/")
    ),
    Quantity(
        "KL to each role",
        "Student against each role, on the student's tokens.",
        "KL (nats per token)",
        ("kl/",),
    ),
    Quantity(
        "Entropy", "Of the student's next-token distribution.", "entropy (nats per token)", ("entropy",)
    ),
    Quantity("Completion length", "Mean tokens per completion.", "tokens", ("completions/mean_length",)),
    Quantity(
        "Truncation",
        "Completions cut off at the length limit.",
        "share",
        ("completions/clipped_ratio",),
        share=True,
    ),
    Quantity("Gradient norm", "Before clipping.", "L2 norm", ("grad_norm",)),
    Quantity("Tokens", "Summed since the first step.", "tokens", ("tokens/",), cumulative=True),
    Quantity("Step time", "Wall clock of one optimiser step.", "seconds", ("step_time",)),
)


def training(runs: Mapping[str, Sequence[Row]], palette: Mapping[str, str] | None = None) -> list[Figure]:
    """Training curves. One run: related metrics share a panel. Several: one panel per metric, a line per run.

    From `SMOOTH_FROM` steps on, single steps are drawn faint and their running mean strong.
    """
    figures = []
    for quantity in QUANTITIES:
        names = list(dict.fromkeys(name for rows in runs.values() for name in quantity.present(rows)))
        if not names:
            continue
        if len(runs) == 1:
            (rows,) = runs.values()
            figures.append(
                _panel(quantity, {_short(name, quantity): (rows, name) for name in names}, legend=True)
            )
            continue
        for name in names:
            title = quantity.title if len(names) == 1 else f"{quantity.title}: {_short(name, quantity)}"
            lines = {run: (rows, name) for run, rows in runs.items() if name in quantity.present(rows)}
            figures.append(
                _panel(
                    replace(quantity, title=title),
                    lines,
                    legend=False,
                    palette=palette or colours(list(runs)),
                )
            )
    return figures


def pass_curves(runs: Mapping[str, Sequence[Row]]) -> list[Figure]:
    """pass@k against k at the last evaluated step, one panel per domain, a line per run."""
    last = {run: _last(rows) for run, rows in runs.items()}
    palette, figures = colours(list(runs)), []
    for domain in dict.fromkeys(row["domain"] for rows in last.values() for row in rows):
        plot = figure("k (answers drawn)", "pass@k", legend_traceorder="normal")
        ticks: set[int] = set()
        for i, (run, rows) in enumerate(last.items()):
            for row in rows:
                ks = sorted(
                    int(n[5:]) for n in row if n.startswith("pass@") and n[5:].isdigit() and _finite(row[n])
                )
                if row["domain"] != domain or not ks:
                    continue
                ticks |= set(ks)
                ends = [[row.get(f"pass@{k}{end}") for k in ks] for end in ("", "/low", "/high")]
                _line(plot, run, ks, *ends, colour=palette[run], style=dash(i), markers=True)
        if len(ticks) < 2:
            continue
        plot.update_xaxes(type="log", tickvals=sorted(ticks), ticktext=[str(k) for k in sorted(ticks)])
        plot.update_yaxes(tickformat=".0%")
        figures.append(Figure(f"pass@k: {domain}", "Last evaluation; band: 95% interval over prompts.", plot))
    return figures


def evaluations(runs: Mapping[str, Sequence[Row]], metric: str = "pass@1") -> list[Figure]:
    """`metric` over training, one panel per domain, a line per run; needs at least two evaluated steps."""
    palette, figures = colours(list(runs)), []
    for domain in dict.fromkeys(row["domain"] for rows in runs.values() for row in rows):
        plot = figure("optimiser step", metric)
        longest = 0
        for i, (run, rows) in enumerate(runs.items()):
            part = [row for row in rows if row["domain"] == domain and _finite(row.get(metric))]
            longest = max(longest, len(part))
            ends = [[row.get(f"{metric}{end}") for row in part] for end in ("", "/low", "/high")]
            _line(
                plot,
                run,
                [row["step"] for row in part],
                *ends,
                colour=palette[run],
                style=dash(i),
                markers=True,
            )
        if longest > 1:
            plot.update_yaxes(tickformat=".0%")
            figures.append(
                Figure(f"{metric}: {domain}", "Held-out prompts; band: 95% interval over prompts.", plot)
            )
    return figures


def _panel(
    quantity: Quantity,
    lines: Mapping[str, tuple[Sequence[Row], str]],
    *,
    legend: bool,
    palette: Mapping[str, str] | None = None,
) -> Figure:
    palette = palette or colours(list(lines))
    unit = quantity.unit + (", cumulative" if quantity.cumulative else "")
    plot = figure("optimiser step", unit, showlegend=legend and len(lines) > 1)
    for i, (label, (rows, name)) in enumerate(lines.items()):
        part = [row for row in rows if name in row]
        steps = [row.get("step", at) for at, row in enumerate(part)]
        values = [row[name] if _finite(row[name]) else None for row in part]
        if quantity.cumulative:
            total = 0.0
            values = [total := total + (value or 0.0) for value in values]
        style = {"color": palette[label], "dash": dash(i)}
        if len(values) < SMOOTH_FROM or quantity.cumulative:
            plot.add_scatter(x=steps, y=values, name=label, mode="lines", line={**style, "width": 1.8})
            continue
        raw = {"mode": "lines", "opacity": 0.28, "hoverinfo": "skip", "showlegend": False}
        plot.add_scatter(x=steps, y=values, line={**style, "width": 1}, legendgroup=label, **raw)
        plot.add_scatter(
            x=steps,
            y=running_mean(values, max(3, len(values) // 20)),
            name=label,
            mode="lines",
            line={**style, "width": 2},
            legendgroup=label,
        )
    if quantity.share:
        plot.update_yaxes(tickformat=".0%", rangemode="tozero")
    return Figure(quantity.title, quantity.caption, plot)


def running_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """Mean of the last `window` numbers at each point; None where there is none among them."""
    means = []
    for i in range(len(values)):
        known = [v for v in values[max(0, i + 1 - window) : i + 1] if v is not None]
        means.append(sum(known) / len(known) if known else None)
    return means


def _line(
    plot: go.Figure,
    name: str,
    x: Sequence[float],
    y: Sequence[float | None],
    low: Sequence[float | None],
    high: Sequence[float | None],
    *,
    colour: str,
    style: str,
    markers: bool,
) -> None:
    """A line with its interval as a band, where both ends are known."""
    if x and all(_finite(v) for v in (*low, *high)):
        plot.add_scatter(
            x=[*x, *reversed(x)],
            y=[*high, *reversed(low)],
            mode="lines",
            fill="toself",
            fillcolor=band(colour),
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=name,
        )
    mode = "lines+markers" if markers else "lines"
    line = {"color": colour, "width": 2, "dash": style}
    plot.add_scatter(
        x=x, y=y, name=name, mode=mode, line=line, marker={"size": 6, "color": colour}, legendgroup=name
    )


def _last(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("step") == rows[-1].get("step")]


def _short(name: str, quantity: Quantity) -> str:
    """`reward/format` in the panel of rewards is `format`; the total stays `reward`."""
    prefix = next((key for key in quantity.keys if key.endswith("/") and name.startswith(key)), "")
    return name.removeprefix(prefix).replace("completions/", "")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
