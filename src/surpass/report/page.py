"""The reports: of one run, of several runs side by side, and of an experiment with its results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from surpass.evaluate import compare
from surpass.report import plots, results
from surpass.report.read import Row, RunFolder, check_results, read_run
from surpass.report.render import Page, Section, Tile, write_page
from surpass.report.tables import results_grid
from surpass.report.theme import colours, dash

STROKES = {"solid": "none", "dash": "5 3", "dot": "2 3", "dashdot": "6 2 2 2"}


def write_report(run: Path, out: Path | None = None) -> Path:
    """Report of one run folder, by default `report.html` in it; FileNotFoundError where there is none."""
    folder = read_run(run)
    curves = {folder.name: folder.metrics}
    evaluated = {folder.name: folder.evaluations} if folder.evaluations else {}
    tested = [*plots.pass_curves(evaluated), *plots.evaluations(evaluated)]
    headline, lead = _progress(folder)
    page = Page(
        title=f"{folder.name}: surpass",
        eyebrow=f"run {folder.name}",
        headline=headline,
        lead=lead,
        notes=folder.notes,
        tiles=_tiles(folder),
        sections=[
            *([Section("Evaluation", figures=tested)] if tested else []),
            *_training(curves, colours(list(curves))),
        ],
        samples={folder.name: folder.samples},
        settings=compare.flatten(folder.config),
    )
    return write_page(page, out or run / "report.html")


def write_comparison(runs: Sequence[Path], out: Path, knobs: Sequence[str] = ()) -> Path:
    """Report of several runs side by side.

    knobs: settings that were meant to differ; others that do are pointed out.
    """
    folders = compare.gather(runs)
    named = dict(zip(compare.labels(folders), folders, strict=True))
    evaluated = {name: folder.evaluations for name, folder in named.items() if folder.evaluations}
    curves = {name: folder.metrics for name, folder in named.items() if folder.metrics}
    legend = _legend(list(named), colours(list(named)))
    tested = [*plots.pass_curves(evaluated), *plots.evaluations(evaluated)]
    final = compare.as_results(compare.lines(folders))
    table = (
        [
            Section(
                "Results",
                "Last evaluation of each run.",
                table=results_grid(final, palette=colours(list(named))),
            )
        ]
        if final["rows"]
        else []
    )
    page = Page(
        title=f"{len(folders)} runs: surpass",
        eyebrow="comparison",
        headline=f"{', '.join(named) if len(named) <= 4 else f'{len(named)} runs'} side by side",
        notes=[*_fairness(folders, knobs), *(f"{n}: {note}" for n, f in named.items() for note in f.notes)],
        sections=[
            *table,
            *([Section("Evaluation", figures=tested, legend=legend)] if tested else []),
            *_training(curves, colours(list(named))),
        ],
        samples={name: folder.samples for name, folder in named.items()},
        settings={
            key: ", ".join(str(value) for value in values.values())
            for key, values in compare.differing(folders).items()
        },
        settings_title="Settings that differ",
    )
    return write_page(page, out)


def write_quickstart_report(
    folder: Path,
    summary: Row,
    runs: Mapping[str, Path] | None = None,
    out: Path | None = None,
) -> Path:
    """Report of an experiment with several models: results, λ sweep, training curves and tokens.

    summary: as in `results.json`: `rows` of model, domain, `pass@1`, `low`, `high`, `pass@8`, `mean_length`,
    `tokens_generated`, `tokens_trained`; optional `seeds` and `sweep` (rows of `lambda`,
    domain, `pass@1`, ...).
    runs: run folders by the name to show; by default every folder in `folder` that holds a `metrics.jsonl`.
    """
    check_results(summary)
    if runs is None:
        runs = {path.parent.name: path.parent for path in sorted(folder.glob("*/metrics.jsonl"))}
    folders = {name: read_run(path) for name, path in runs.items()}
    headline, lead = results.verdict(summary)
    seeds = ", ".join(str(seed) for seed in summary.get("seeds", []))
    names = results.models(summary)
    order = sorted(folders, key=lambda name: names.index(name) if name in names else len(names))
    curves = {name: folders[name].metrics for name in order if folders[name].metrics}
    palette = colours([*names, *(name for name in order if name not in names)])
    swept = results.sweep(summary)
    experts = [name for name in names if name.lower().startswith(results.EXPERT)]
    extrapolation = Section(
        "How far to extrapolate",
        "λ scales the implicit reward: λ = 1 is distillation, above 1 is extrapolation.",
        figures=swept,
        legend=_legend([*experts, *(["ExOPD"] if "ExOPD" in names else [])], palette),
        two=True,
    )
    page = Page(
        title="Results: surpass",
        eyebrow=f"{folder.resolve().name}" + (f", seeds {seeds}" if seeds else ""),
        headline=headline,
        lead=lead,
        notes=[f"{name}: {note}" for name, run in folders.items() for note in run.notes],
        sections=[
            Section(
                "Results",
                "pass@1 with its 95% interval, pass@8, and mean length in tokens, on held-out prompts; best "
                "in bold. Tokens are those spent on training the model itself.",
                figures=results.levels(summary),
                table=results_grid(summary, palette=palette),
                two=True,
            ),
            *([extrapolation] if swept else []),
            *_training(curves, palette),
        ],
        samples={name: folders[name].samples for name in order},
    )
    return write_page(page, out or folder / "report.html")


def _progress(run: RunFolder) -> tuple[str, list[str]]:
    """A sentence on what changed, from the evaluations if there are any, and the intervals behind it."""
    steps = run.metrics[-1].get("step", len(run.metrics)) if run.metrics else 0
    rows = [row for row in run.evaluations if row.get("pass@1") is not None]
    lead = []
    for domain in dict.fromkeys(row["domain"] for row in rows):
        ends = [row for row in rows if row["domain"] == domain]
        shown = [_interval(row) for row in (ends[0], ends[-1])[len(ends) == 1 :]]
        lead.append(f"{domain}: pass@1 " + " → ".join(shown))
    whole = [row for row in rows if row["domain"] == "overall"] or rows[-1:]
    if whole:
        first, last = whole[0]["pass@1"], whole[-1]["pass@1"]
        if len(whole) == 1:
            return f"pass@1 is {last:.1%} after {steps} steps", lead
        change = "rose" if last > first else "fell" if last < first else "stayed"
        return f"pass@1 {change} from {first:.1%} to {last:.1%} in {steps} steps", lead
    rewards = [row["reward"] for row in run.metrics if row.get("reward") is not None]
    if rewards:
        return f"{steps} steps; reward {rewards[0]:.3f} at the first and {rewards[-1]:.3f} at the last", []
    return f"{steps} steps", []


def _interval(row: Row) -> str:
    low, high = row.get("pass@1/low"), row.get("pass@1/high")
    return f"{row['pass@1']:.1%}" + ("" if low is None or high is None else f" [{low:.1%}, {high:.1%}]")


def _tiles(run: RunFolder) -> list[Tile]:
    if not run.metrics:
        return []
    last = run.metrics[-1]
    tiles = [Tile("Optimiser steps", f"{last.get('step', len(run.metrics)):,}")]
    for key, name in (
        ("reward", "Reward"),
        ("loss", "Loss"),
        ("completions/mean_length", "Completion length"),
    ):
        if isinstance(last.get(key), int | float) and math.isfinite(last[key]):
            tiles.append(Tile(name, f"{last[key]:.3g}", "at the last step"))
    for key in ("tokens/generated", "tokens/trained"):
        if any(key in row for row in run.metrics):
            count = sum(row.get(key) or 0 for row in run.metrics)
            tiles.append(Tile(f"Tokens {key.split('/')[1]}", results.large(count), "over the whole run"))
    seconds = sum(row.get("step_time") or 0 for row in run.metrics)
    return [*tiles, *([Tile("Time in steps", _clock(seconds))] if seconds else [])]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    )


def _fairness(folders: Sequence[RunFolder], knobs: Sequence[str]) -> list[str]:
    if missing := [folder.name for folder in folders if not folder.config]:
        return [f"No config.yaml in {', '.join(missing)}: whether these runs may be compared is unknown."]
    extra = compare.undeclared(folders, knobs)
    if not extra:
        return []
    declared = f" besides {', '.join(knobs)}" if knobs else ""
    return [f"These runs differ in {', '.join(extra)}{declared}; compare them with that in mind."]


def _training(curves: Mapping[str, Sequence[Row]], palette: Mapping[str, str]) -> list[Section]:
    figures = plots.training(curves, palette if len(curves) > 1 else None) if curves else []
    if not figures:
        return []
    smoothed = any(len(rows) >= plots.SMOOTH_FROM for rows in curves.values())
    intro = "Faint: every step; strong: running mean." if smoothed else ""
    legend = _legend(list(curves), palette) if len(curves) > 1 else []
    return [Section("Training", intro, figures=figures, legend=legend)]


def _legend(names: Sequence[str], palette: Mapping[str, str]) -> list[tuple[str, str, str]]:
    return [(name, palette[name], STROKES[dash(i)]) for i, name in enumerate(names)]
