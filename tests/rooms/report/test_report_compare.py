"""Comparing runs: the table, pooling over seeds, and the check of settings."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_run import write_run

from surpass.evaluate.compare import (
    as_results,
    check_comparable,
    comparison_table,
    flatten,
    gather,
    labels,
    lines,
    undeclared,
)


def test_flatten_names_nested_settings() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": {}}) == {"a.b.c": 1, "a.d": [1, 2], "e": {}}


def test_only_declared_settings_may_differ(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a")
    second = write_run(
        tmp_path / "b", config={"seed": 1, "method": {"reward_scale": 1.25}, "train": {"steps": 9}}
    )
    runs = gather([first, second])
    assert set(undeclared(runs, [])) == {"method.reward_scale", "train.steps"}
    assert set(undeclared(runs, ["method"])) == {"train.steps"}
    with pytest.raises(ValueError, match=r"1 settings .*\n  train\.steps: a = None, b = 9"):
        check_comparable(runs, ["method.reward_scale"])
    check_comparable(runs, ["method.reward_scale", "train"])
    # A knob is a whole name, not a prefix of one.
    assert "train.steps" in undeclared(runs, ["method", "tra"])


def test_without_configurations_comparability_is_unknown(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    (second / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"no config\.yaml in \['b'\]"):
        check_comparable(gather([first, second]), [])


def test_seeds_share_a_line_that_spans_their_intervals(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / f"s{seed}", level=0.5 + 0.2 * seed, config={"seed": seed}) for seed in (0, 1)
    ]
    paths.append(write_run(tmp_path / "other", config={"method": {"reward_scale": 2.0}}))
    rows = lines(gather(paths))
    assert [(row.name, row.domain, row.seeds) for row in rows] == [
        ("s0", "addition", (0, 1)),
        ("s0", "overall", (0, 1)),
        ("other", "addition", (0,)),
        ("other", "overall", (0,)),
    ]
    pooled = rows[0].estimates["pass@1"]
    assert (pooled.value, pooled.low, pooled.high) == pytest.approx((0.6, 0.45, 0.75))
    assert rows[0].tokens == {"generated": 5000.0, "trained": 4500.0}
    assert rows[0].step == 50
    first = as_results(rows)["rows"][0]
    assert (first["model"], first["pass@1"], first["tokens_trained"]) == (
        "s0 (2 seeds)",
        pytest.approx(0.6),
        4500.0,
    )
    written = StringIO()
    console = Console(file=written, width=200)
    console.print(comparison_table(gather(paths)))
    assert "0.600 [0.450, 0.750]" in written.getvalue()


def test_a_repetition_with_the_same_seed_is_not_pooled(tmp_path: Path) -> None:
    rows = lines(gather([write_run(tmp_path / "a"), write_run(tmp_path / "b")]))
    assert [(row.name, row.seeds) for row in rows if row.domain == "overall"] == [("a", (0,)), ("b", (0,))]


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    runs = gather([write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run")])
    assert labels(runs) == ["x/run", "y/run"]
    with pytest.raises(ValueError, match="given twice"):
        gather([tmp_path / "x" / "run", tmp_path / "y" / ".." / "x" / "run"])
