"""Every file in recipes/ is a run that can start: it parses, every name in it exists, and its settings fit together."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from surpass.cli.quickstart import Recipe
from surpass.cli.train import read_settings
from surpass.config import RunConfig
from surpass.methods.base import Method
from surpass.methods.registry import METHODS
from surpass.train.build import check_config

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def read(path: Path, *more: str) -> tuple[RunConfig, Method]:
    name = yaml.safe_load(path.read_text())["method_name"]
    config, method, _ = read_settings("plan", name, ["--config", str(path), *more])
    return config, method


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {k: v for name, part in value.items() for k, v in leaves(part, f"{prefix}.{name}").items()}


def test_there_are_recipes():
    assert {"exopd", "grpo", "context_distillation"} <= {
        yaml.safe_load(p.read_text())["method_name"] for p in RECIPES
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_setting_of_a_recipe_arrives(path: Path):
    written = yaml.safe_load(path.read_text())
    config, method = read(path)
    assert type(method) is METHODS[written.pop("method_name")]
    arrived = leaves({**asdict(config), "method": asdict(method)})
    for key, value in leaves(written).items():
        assert arrived[key] == value, key


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_settings_of_a_recipe_fit_together(path: Path):
    check_config(*read(path))
    assert path.read_text().startswith("# "), "a recipe begins with what it is for"
    assert yaml.safe_load(path.read_text())["output"].startswith("runs/")


@pytest.mark.parametrize("path", [p for p in RECIPES if "exopd" in p.stem], ids=lambda p: p.stem)
def test_the_control_of_an_extrapolation_needs_no_reference(path: Path):
    assert read(path)[1].needs().reference
    config, control = read(path, "--method.reward_scale", "1")
    assert not control.needs().reference
    config.reference = None
    check_config(config, control)


def test_a_misspelt_setting_stops_the_run_and_names_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    path = tmp_path / "wrong.yaml"
    path.write_text("method_name: exopd\nstudent: a\nmethod:\n  reward_skale: 1.25\n")
    with pytest.raises(SystemExit) as stopped:
        read(path)
    assert stopped.value.code == 2
    assert "method.reward_scale" in capsys.readouterr().err


def test_the_recipe_of_another_method_is_refused():
    with pytest.raises(SystemExit):
        read_settings("plan", "grpo", ["--config", str(ROOT / "recipes" / "exopd-merge.yaml")])


def test_the_quickstart_recipe_reads_what_the_quickstart_leaves_behind():
    own = Recipe()
    config, _ = read(ROOT / "recipes" / "quickstart-merge.yaml")
    folder = "runs/quickstart/seed_0"
    assert config.student == f"{folder}/base/model"
    assert config.teachers == {domain: f"{folder}/expert-{domain}/model" for domain in own.domains}
    assert config.prompts == "embedded:" + "+".join(own.domains)
    assert config.rollout.max_new_tokens == own.max_new_tokens


def test_every_recipe_is_in_the_guide():
    guide = (ROOT / "docs" / "recipes.md").read_text()
    assert [p.name for p in RECIPES if p.name not in guide] == []
