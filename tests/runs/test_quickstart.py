"""The quickstart and the league at toy sizes: the whole path, its files, and the reuse of what is unchanged."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from surpass.cli.league import season, table
from surpass.cli.quickstart import named, quickstart
from surpass.cli.world import Recipe

TOY = replace(
    Recipe(),
    hidden=16,
    layers=1,
    base_examples=16,
    base_batch=8,
    expert_steps=2,
    expert_prompts=2,
    expert_samples=2,
    merge_steps=2,
    merge_prompts=4,
    scales=(1.0, 1.5),
    expo_alphas=(0.5,),
    eval_prompts=3,
    eval_samples=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def first(folder: Path) -> str:
    said = StringIO()
    quickstart(TOY, folder, 2, 1, Console(file=said, width=120))
    return said.getvalue()


def test_results_hold_every_model_and_domain_with_the_promised_fields(folder: Path, first: str):
    assert "seed 1, 5/5" in first
    results = json.loads((folder / "results.json").read_text())
    assert results["seeds"] == [0, 1]
    models = ["base", "expert-sort", "expert-missing", "average", "ExPO", "OPD", "ExOPD"]
    assert [(r["model"], r["domain"]) for r in results["rows"]] == [
        (m, d) for m in models for d in TOY.domains
    ]
    fields = {"pass@1", "low", "high", "mean_length", "tokens_generated", "tokens_trained", "seed_values"}
    assert all(fields <= set(row) for row in results["rows"])
    assert all(len(row["seed_values"]) == 2 for row in results["rows"])
    assert {point["lambda"] for point in results["sweep"]} == {1.0, 1.5}
    assert (folder / "report.html").stat().st_size > 100_000  # plotly is inside


def test_opd_and_exopd_spend_matched_budgets(folder: Path, first: str):
    del first
    configs = [
        (folder / "seed_0" / stage / "config.yaml").read_text().splitlines() for stage in ("OPD", "ExOPD-1.5")
    ]
    ignored = ("output", "method_name", "  reward_scale", "  guard", "  baseline")
    mine, theirs = ([line for line in lines if not line.startswith(ignored)] for lines in configs)
    assert mine == theirs


def test_a_second_run_reuses_what_is_unchanged(folder: Path, first: str):
    del first
    weights = {
        name: (folder / "seed_0" / stage / "model" / "model.safetensors")
        for name, stage in named(TOY).items()
    }
    before = {name: path.stat().st_mtime_ns for name, path in weights.items() if path.exists()}
    said = StringIO()
    quickstart(replace(TOY, merge_steps=3), folder, 1, 1, Console(file=said, width=120))
    assert said.getvalue().count("unchanged, reused") == 3  # base and experts
    after = {name: path.stat().st_mtime_ns for name, path in weights.items() if path.exists()}
    assert {name for name in before if before[name] != after[name]} == {"OPD", "ExOPD"}


def test_the_league_keeps_methods_to_one_budget_and_says_what_failed(tmp_path: Path):
    console = Console(file=StringIO())
    found = season(TOY, tmp_path, 0, ["opd", "grpo", "tip"], 400, console)
    results = table(TOY, [found], 400)
    assert results["failed"] == {} or set(results["failed"]) <= {"tip"}
    for name in ("opd", "grpo"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        spent = [sum(v for k, v in json.loads(line).items() if k.startswith("tokens/")) for line in lines]
        assert sum(spent) >= 400  # the step that reaches the budget is the last
        assert sum(spent[:-1]) < 400
