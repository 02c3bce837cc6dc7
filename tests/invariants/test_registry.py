"""Every method can be found, made, and says what it is; so can one's own."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from surpass.methods.exopd import ExOPD
from surpass.methods.registry import METHODS, describe, method_class

OWN = '''
"""Mine.

    loss = 42
"""
from __future__ import annotations
from dataclasses import dataclass
from surpass.methods.opd import OPD

@dataclass(kw_only=True)
class Mine(OPD):
    """My own method (arXiv 1234.56789)."""

    strength: float = 2.5
    """How much of it."""
    samples: int = 3
    """Answers of mine."""

class Undecorated(OPD):
    """Without its decorator."""

class Stranger:
    """Not a method."""
'''


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return str(path)


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_a_valid_setting(name: str):
    method = method_class(name)()
    assert method.samples >= 1
    method.needs()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_and_every_field_is_documented(name: str):
    page = describe(name)
    assert page.summary and "\n" not in page.summary
    assert page.equation
    assert page.sources, "a method names the paper it comes from"
    assert [f.name for f in page.fields] == [f.name for f in fields(method_class(name))]
    assert [f.name for f in page.fields if not f.doc] == []


def test_a_subclass_has_the_last_word_on_a_field():
    samples = {
        name: {f.name: f for f in describe(name).fields}["samples"] for name in ("opd", "grpo", "dapo")
    }
    assert [samples[name].default for name in ("opd", "grpo", "dapo")] == ["1", "8", "16"]
    assert samples["grpo"].doc == "Answers to each prompt: the group."


def test_description_of_the_central_method():
    page = describe("exopd")
    assert page.sources[0] == "2602.12125"
    assert "lambda * log teacher(y)/reference(y)" in page.equation
    scale = next(f for f in page.fields if f.name == "reward_scale")
    assert (scale.type, scale.default) == ("float", "1.25") and scale.doc.startswith("lambda")


def test_the_nearest_name_is_offered():
    for wrong, near in (
        ("exopdd", "exopd"),
        ("mini-llm", "minillm"),
        ("Dr.GRPO", "dr_grpo"),
        ("seq_kd", "sequence_kd"),
    ):
        with pytest.raises(ValueError, match=f"did you mean '{near}'"):
            method_class(wrong)
    with pytest.raises(ValueError, match=r"unknown method 'zzz'; Known methods: sft, "):
        method_class("zzz")


def test_ones_own_method_from_a_file(own: str):
    mine = method_class(f"{own}:Mine")
    assert mine is method_class(f"{own}:Mine")
    assert mine(strength=1.0).samples == 3  # type: ignore[call-arg]
    page = describe(f"{own}:Mine")
    assert page.summary == "My own method (arXiv 1234.56789)." and page.equation == "loss = 42"
    assert {f.name: f.doc for f in page.fields}["strength"] == "How much of it."
    assert {f.name: f.doc for f in page.fields}["samples"] == "Answers of mine."
    assert {f.name: f.doc for f in page.fields}["discount"]


def test_ones_own_method_from_a_module():
    assert method_class("surpass.methods.exopd:ExOPD") is ExOPD


def test_what_is_not_a_method_is_refused(own: str):
    with pytest.raises(ValueError, match="methods found there: OPD, Mine"):
        method_class(f"{own}:Nothing")
    for name in ("Undecorated", "Stranger"):
        with pytest.raises(ValueError, match=r"@dataclass\(kw_only=True\)"):
            method_class(f"{own}:{name}")
    with pytest.raises(ValueError, match="there is no file"):
        method_class("nowhere.py:Mine")
    with pytest.raises(ValueError, match="cannot import"):
        method_class("no_such_module:Mine")
