"""Fill the page: one HTML file with styles, scripts and data in it, readable from disk without a network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from surpass.report.plots import Figure
from surpass.report.read import Row
from surpass.report.tables import Grid
from surpass.report.theme import dark_tones
from surpass.report.viewer import embed, viewer_data

FOOTER = (
    "Intervals: 95% bootstrap over prompts, unless said otherwise. This file needs no network. "
    "Definitions of all metrics: docs/metrics.md."
)


@dataclass(frozen=True)
class Tile:
    """One number of the header."""

    name: str
    value: str
    more: str = ""


@dataclass(frozen=True)
class Section:
    """A heading with a table, figures, or both.

    legend: (name, colour, stroke pattern), shared by its figures. two: figures two abreast.
    """

    title: str
    intro: str = ""
    figures: Sequence[Figure] = ()
    table: Grid | None = None
    legend: Sequence[tuple[str, str, str]] = ()
    two: bool = False


@dataclass(frozen=True)
class Page:
    """What the template shows. settings: flat name -> value."""

    title: str
    eyebrow: str
    headline: str
    lead: Sequence[str] = ()
    notes: Sequence[str] = ()
    tiles: Sequence[Tile] = ()
    sections: Sequence[Section] = ()
    samples: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    settings_title: str = "Configuration"


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("surpass.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> Markup:
    return Markup((files("surpass.report") / "templates" / name).read_text(encoding="utf-8"))


def write_page(page: Page, out: Path) -> Path:
    """Number the figures, fill the template, write the file; returns `out`."""
    numbered, sections = [], []
    for section in page.sections:
        items = [
            {"id": f"figure-{len(numbered) + i}", "figure": figure}
            for i, figure in enumerate(section.figures)
        ]
        numbered += items
        sections.append({**vars(section), "figures": items})
    drawn = [{"id": item["id"], "plot": json.loads(item["figure"].plot.to_json())} for item in numbered]
    viewer = viewer_data({name: rows for name, rows in page.samples.items() if rows})
    html = (
        _environment()
        .get_template("page.html.j2")
        .render(
            page={**vars(page), "sections": sections, "omitted": viewer["omitted"], "footer": FOOTER},
            figures=embed({"figures": drawn, "tones": dark_tones()}),
            viewer=embed(viewer) if viewer["samples"] else "",
            style=_asset("style.css"),
            charts=_asset("charts.js"),
            viewer_script=_asset("viewer.js"),
            plotly=Markup(get_plotlyjs()),
        )
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    return out
