"""docs/methods.md says what the methods' docstrings say, and shows a method beside its controls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surpass.methods.registry import METHODS, describe
from surpass.report.gallery import body, fields_table, gallery, measured_effect, read_results

ROOT = Path(__file__).parents[3]


def rows(*models: str) -> dict[str, object]:
    figures = {"pass@1": 0.5, "low": 0.45, "high": 0.55, "tokens_trained": 12_345}
    return {"seeds": [0, 1], "rows": [{"model": m, "domain": "sort", **figures} for m in models]}


def test_the_page_in_docs_is_up_to_date():
    present = (ROOT / "docs" / "methods.md").read_text()
    assert present == gallery(ROOT / "benchmarks" / "results"), (
        "docs/methods.md is not what the methods and results say now: run `python -m surpass.report.gallery`"
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_line_of_a_docstring_and_every_field_is_there(name: str, tmp_path: Path):
    page = describe(name)
    _, _, after = gallery(tmp_path).partition(f"\n## {name}\n")
    section = after.split("\n## ")[0]
    words = section.replace("**", "").split()
    for line in page.notes.split("\n"):
        said = line.split()
        assert any(words[i : i + len(said)] == said for i in range(len(words) - len(said) + 1)), line
    for field in page.fields:
        assert f"| `{field.name}` |" in section


def test_formulae_stand_where_their_sentence_needs_them_and_disagreements_stand_out():
    notes = "Title.\n\n    a = b\n\nwhich is c. Where the paper and the code disagree, the paper.\n\n    d\n\nby e."
    assert body(notes) == (
        "Title.\n\n```text\na = b\n```\n\nwhich is c.\n\n**Where the paper and the code disagree**, the paper.\n\n"
        "```text\nd\n```\n\nby e."
    )


def test_bars_of_types_do_not_end_their_cell():
    line = next(x for x in fields_table(describe("grpo").fields).splitlines() if "`dual_clip`" in x)
    assert r"`float \| None`" in line
    assert line.replace(r"\|", "").count("|") == 5  # four cells


def test_a_method_is_shown_beside_the_base_and_the_methods_it_extends(tmp_path: Path):
    (tmp_path / "quickstart.json").write_text(json.dumps(rows("base", "average", "OPD", "ExOPD")))
    measured = read_results(tmp_path)
    shown = measured_effect("exopd", measured)
    assert "| ExOPD | sort | 0.500 [0.450, 0.550] | 2 | 12,345 |" in shown
    assert "| base |" in shown and "| OPD |" in shown and "average" not in shown
    assert "ExOPD" not in measured_effect("opd", measured)
    assert measured_effect("dapo", measured) == "Not yet measured."


def test_results_of_other_kinds_are_passed_over(tmp_path: Path):
    (tmp_path / "cost.json").write_text(json.dumps({"rows": [{"tokens": 5}]}))
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "empty.json").write_text(json.dumps({"seconds": 3}))
    assert read_results(tmp_path) == {}
    assert read_results(tmp_path / "nowhere") == {}
