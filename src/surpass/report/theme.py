"""One look for every figure: colours that stay apart for colour-blind readers, on light and on dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

# Light and dark tone of each hue. They differ in lightness too, so that grey prints can be read.
BLUE, VERMILION, GREEN, PURPLE, OCHRE, SKY, BROWN = (
    ("#2563b8", "#74b0f7"),
    ("#cf4f16", "#f5935f"),
    ("#0a7f69", "#41c9ab"),
    ("#9c3a80", "#e08cc6"),
    ("#a67800", "#e3bb52"),
    ("#3d9bc7", "#93d3f2"),
    ("#74492c", "#cfa585"),
)
GREY, INK, FAINT = ("#6c7480", "#9aa4b2"), ("#3b424d", "#c3cad5"), ("#e4e7ec", "#2c333e")
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, OCHRE, SKY, BROWN)
DASHES = ("solid", "dash", "dot", "dashdot")
BAND_ALPHA = 0.16

# Names that should look the same in every figure of every report.
FAMILIAR = {"base": GREY, "OPD": BLUE, "ExOPD": VERMILION}

FONT = "ui-sans-serif, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"


def colours(names: Sequence[str]) -> dict[str, str]:
    """A light tone for each name: the familiar ones keep theirs, the others take the rest in order."""
    known = {name: FAMILIAR[name] for name in names if name in FAMILIAR}
    free = [hue for hue in PALETTE if hue not in known.values()] or list(PALETTE)
    others = [name for name in names if name not in known]
    return {
        **{n: hue[0] for n, hue in known.items()},
        **{n: free[i % len(free)][0] for i, n in enumerate(others)},
    }


def dash(index: int) -> str:
    """Line style of the `index`-th name, so that hues that come round again still differ."""
    return DASHES[(index // len(PALETTE)) % len(DASHES)]


def band(colour: str, alpha: float = BAND_ALPHA) -> str:
    """`#rrggbb` as a translucent fill."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def dark_tones() -> dict[str, str]:
    """Light tone -> dark tone, bands included: the page exchanges them when the reader's theme is dark."""
    hues = (*PALETTE, GREY, INK, FAINT)
    return dict(hues) | {band(light): band(dark) for light, dark in hues}


def figure(x: str, y: str, *, height: int = 236, **layout: Any) -> go.Figure:
    """An empty figure with axis titles (units in them) and the common layout."""
    axis = {
        "gridcolor": FAINT[0],
        "linecolor": FAINT[0],
        "zeroline": False,
        "ticks": "",
        "automargin": True,
        "title": {"font": {"size": 11.5}, "standoff": 8},
        "tickfont": {"size": 11},
    }
    made = go.Figure()
    made.update_layout(
        template=go.layout.Template(),
        height=height,
        margin={"l": 8, "r": 14, "t": 8, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 12, "color": INK[0]},
        hovermode="x unified",
        hoverlabel={"font": {"family": FONT, "size": 12}},
        showlegend=False,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 11}},
        xaxis={**axis, "showgrid": False, "title": {**axis["title"], "text": x}},
        yaxis={**axis, "title": {**axis["title"], "text": y}},
    )
    made.update_layout(**layout)
    return made
