"""Settings are written complete and compared in full."""

from pathlib import Path

import pytest
import yaml

from surpass.config import RunConfig
from surpass.methods.exopd import ExOPD
from surpass.train.settings import FREE, resolved, same_run, write_config


def settings(**changes: object) -> dict[str, object]:
    return resolved(RunConfig("base", "some.jsonl"), ExOPD()) | changes


def test_every_default_is_written(tmp_path: Path) -> None:
    write_config(tmp_path, settings())
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert stored == settings()
    assert stored["method_name"] == "ExOPD" and stored["method"]["reward_scale"] == 1.25
    assert stored["optimiser"]["beta2"] == RunConfig("base").optimiser.beta2
    assert stored["model"]["lora"]["rank"] == 0


def test_equal_settings_are_the_same_run() -> None:
    same_run(settings(), settings())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed: was 0, is 1"),
        ({"teachers": {"math": "a"}}, "teachers.math: was None, is 'a'"),
        ({"prompts": {"math": "a"}}, "prompts: was 'some.jsonl', is {'math': 'a'}"),
        ({"method": {**settings()["method"], "reward_scale": 2.0}}, "method.reward_scale: was 1.25, is 2.0"),  # type: ignore[dict-item]
        ({"method_name": "OPD"}, "method_name: was 'ExOPD', is 'OPD'"),
    ],
)
def test_a_difference_is_named_alone(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match="repeat the settings it began with") as error:
        same_run(settings(), settings(**change))
    assert said in str(error.value) and str(error.value).count(": was") == 1


def test_a_list_from_json_equals_a_tuple() -> None:
    same_run({"a": [1, 2]}, {"a": (1, 2)})


@pytest.mark.parametrize("key", FREE)
def test_free_settings_exist_and_may_differ(key: str) -> None:
    section, _, name = key.rpartition(".")
    stored = settings()
    present = settings()
    place = present[section] if section else present
    assert isinstance(place, dict) and name in place, f"{key} is no setting"
    present = {**present, section: {**place, name: "other"}} if section else {**present, name: "other"}
    same_run(stored, present)
