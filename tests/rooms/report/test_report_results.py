"""What is said and drawn of finished models: the headline claims exactly what the numbers show."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console
from synthetic_run import results

from surpass.report.plots import training
from surpass.report.results import levels, sweep, verdict
from surpass.report.tables import results_grid, results_table
from surpass.report.viewer import embed, viewer_data

EXPERTS = {"expert_addition": (0.8, 0.2), "expert_reversal": (0.2, 0.7)}


@pytest.mark.parametrize(
    ("opd", "exopd", "headline"),
    [
        (
            (0.79, 0.69),
            (0.9, 0.8),
            "ExOPD is above both experts on their domains, and above OPD on every domain.",
        ),
        (
            (0.79, 0.79),
            (0.9, 0.8),
            "ExOPD is above both experts on their domains, and above OPD on every domain; in 1 of 4 "
            "comparisons the intervals overlap.",
        ),
        (
            (0.79, 0.85),
            (0.9, 0.8),
            "ExOPD is above the expert on 2 of 2 domains and above OPD on 1 of 2 domains.",
        ),
        (
            (0.8, 0.7),
            (0.5, 0.5),
            "ExOPD is above the expert on 0 of 2 domains and above OPD on 0 of 2 domains.",
        ),
    ],
)
def test_headline(opd: tuple[float, float], exopd: tuple[float, float], headline: str) -> None:
    assert verdict(results(**EXPERTS, OPD=opd, ExOPD=exopd))[0] == headline


def test_sentences_name_values_intervals_and_standing() -> None:
    _, lines = verdict(results(**EXPERTS, OPD=(0.88, 0.9), ExOPD=(0.9, 0.7)))
    assert lines == [
        "addition: ExOPD 90.0% [88.0%, 92.0%] against expert-addition 80.0% [78.0%, 82.0%], clearly above",
        "reversal: ExOPD 70.0% [68.0%, 72.0%] against expert-reversal 70.0% [68.0%, 72.0%], level",
        "addition: ExOPD 90.0% [88.0%, 92.0%] against OPD 88.0% [86.0%, 90.0%], "
        "above with overlapping intervals",
        "reversal: ExOPD 70.0% [68.0%, 72.0%] against OPD 90.0% [88.0%, 92.0%], clearly below",
    ]


def test_without_intervals_nothing_is_clear() -> None:
    summary = results(OPD=(0.1, 0.1), ExOPD=(0.9, 0.9))
    for row in summary["rows"]:
        row["low"] = row["high"] = None
    headline, lines = verdict(summary)
    assert headline == "ExOPD is above OPD on 2 of 2 domains; in 2 of 2 comparisons the intervals overlap."
    assert not any("clearly" in line for line in lines)


def test_without_the_model_the_headline_says_so() -> None:
    assert verdict(results(**EXPERTS))[0].startswith("There is no ExOPD result")


def test_table_marks_the_best_of_each_domain_and_prints_every_number() -> None:
    summary = results(**EXPERTS, ExOPD=(0.9, 0.6))
    grid = results_grid(summary)
    best = {
        (line.cells[0].text, column.name): cell
        for line in grid.rows
        for column, cell in zip(grid.columns, line.cells)
    }
    assert sum(cell.best for line in grid.rows for cell in line.cells) == 2
    assert best["expert-reversal", "pass@1"].best  # the later of two columns of that name, hence reversal
    assert [line.hero for line in grid.rows] == [False, False, True]
    written = StringIO()
    console = Console(file=written, width=160)
    console.print(results_table(summary))
    text = written.getvalue()
    for shown in ("90.0%", "88.0–92.0", "100.0%", "20.0", "1.92 M", "1.5 M", "seeds: 0, 1"):
        assert shown in text


def test_sweep_draws_experts_seeds_and_intervals_only_where_there_is_a_sweep() -> None:
    summary = results(**EXPERTS, ExOPD=(0.9, 0.8))
    assert sweep(summary) == []
    summary["sweep"] = [
        {
            "lambda": x,
            "domain": "addition",
            "pass@1": 0.5 + 0.1 * x + 0.01 * s,
            "low": 0.4,
            "high": 0.9,
            "seed": s,
        }
        for x in (1.0, 1.25)
        for s in (0, 1)
    ]
    (figure,) = sweep(summary)
    drawn: Any = figure.plot.to_dict()
    mean = next(trace for trace in drawn["data"] if trace["mode"] == "lines+markers")
    assert list(mean["x"]) == [1.0, 1.25]
    assert list(mean["y"]) == pytest.approx([0.605, 0.63])
    # Two experts as a line and a band each, and λ = 1.
    assert len(drawn["layout"]["shapes"]) == 5
    assert len(levels(summary)) == 2


def test_only_what_was_logged_is_drawn() -> None:
    assert training({"run": [{"step": 1}]}) == []
    assert training({"run": [{"step": 1, "loss": float("nan")}]}) == []
    rows = [
        {"step": s, "loss": 1.0, "tokens/generated": 10, "reward": 0.5, "reward/format": 1.0}
        for s in (1, 2, 3)
    ]
    one = {figure.title: figure.plot for figure in training({"run": rows})}
    assert list(one) == ["Loss", "Reward", "Tokens"]
    tokens: Any = one["Tokens"].to_dict()["data"]
    assert list(tokens[0]["y"]) == [10, 20, 30]
    many = [figure.title for figure in training({"a": rows, "b": rows})]
    assert many == ["Loss", "Reward: reward", "Reward: format", "Tokens"]


def test_viewer_finds_log_probs_and_their_differences_and_keeps_few_samples() -> None:
    row = {
        "tokens": ["a", "b"],
        "signals": {
            "advantage": [-1.0, -2.0],
            "student": [-1.0, float("-inf")],
            "teacher": [-0.5, 0.0],
            "x": [1, 2],
        },
        "step": 1,
    }
    data = viewer_data({"run": [{**row, "step": i} for i in range(1000)]}, limit=100)
    assert data["logps"] == ["student", "teacher"]
    names = [view["name"] for view in data["views"]]
    assert names == ["advantage", "x", "teacher − student", "log-prob of student", "log-prob of teacher"]
    assert (len(data["samples"]), data["omitted"]) == (100, 900)
    assert [s["step"] for s in data["samples"]] == list(range(0, 1000, 10))
    assert data["samples"][0]["signals"]["student"] == [-1.0, None]


def test_embedded_json_cannot_leave_its_script() -> None:
    text = embed({"t": "</script><!--<script>&\u2028"})
    assert not set("<>&\u2028") & set(text)
