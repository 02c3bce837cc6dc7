"""Known data sets read as they are published."""

import json

import pytest

from surpass.judge.math_answer import verify
from surpass.prompts.presets import BOXED, PRESETS
from surpass.prompts.sources import DataError, load_prompts


def load_one(tmp_path, row, **options):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(row))
    return load_prompts(str(path), **options)[0]


def test_gsm8k_answers_and_solutions(tmp_path):
    row = {"question": "How many?", "answer": "It is 48/2 = <<48/2=24>>24 clips.\n#### 1,024"}
    prompt = load_one(tmp_path, row, preset="gsm8k")
    assert prompt.answer == "1024"
    assert prompt.privileged == {"solution": "It is 48/2 = 24 clips."}
    assert prompt.messages == ({"role": "user", "content": f"How many?\n\n{BOXED}"},)
    assert prompt.domain == "math"
    # The worked text must not stay in reach of what reads columns as if it were the answer.
    assert "answer" not in prompt.columns
    assert load_one(tmp_path, row, preset="gsm8k", instruction="").messages == (
        {"role": "user", "content": "How many?"},
    )
    with pytest.raises(
        DataError, match=r"line 1: preset gsm8k: expected an answer that ends in '#### NUMBER'"
    ):
        load_one(tmp_path, {"question": "q", "answer": "24"}, preset="gsm8k")


def test_math_takes_the_last_box_or_the_answer_column(tmp_path):
    row = {"problem": "p", "solution": r"\boxed{1}, so \boxed{\frac{1}{2}}."}
    prompt = load_one(tmp_path, row, preset="math")
    assert prompt.answer == r"\frac{1}{2}"
    assert prompt.privileged["solution"] == row["solution"]
    assert load_one(tmp_path, {**row, "answer": "0.5"}, preset="math").answer == "0.5"
    with pytest.raises(DataError, match="neither an answer nor a solution"):
        load_one(tmp_path, {"problem": "p", "solution": "none"}, preset="math")


@pytest.mark.parametrize("answer", [33, "33", 33.0])
def test_aime_answers_become_text(tmp_path, answer):
    assert load_one(tmp_path, {"Problem": "p", "Answer": answer}, preset="aime").answer == "33"
    with pytest.raises(DataError, match="no answer: looked for answer or Answer"):
        load_one(tmp_path, {"problem": "p"}, preset="hmmt")


def test_deepmath_and_eurus(tmp_path):
    row = {"question": "q", "final_answer": "7", "difficulty": 6.5, "r1_solution_1": "worked"}
    prompt = load_one(tmp_path, row, preset="deepmath")
    assert (prompt.answer, prompt.columns["difficulty"]) == ("7", 6.5)
    assert prompt.privileged == {"solution": "worked"}
    row = {
        "prompt": [{"role": "user", "content": "write f"}],
        "reward_model": {"ground_truth": "{}", "style": "rule"},
        "extra_info": {"opd_teacher": "code"},
    }
    prompt = load_one(tmp_path, row, preset="eurus-code")
    assert (prompt.answer, prompt.domain) == ("{}", "code")
    assert prompt.messages == ({"role": "user", "content": "write f"},)


def test_every_preset_is_described():
    for name, preset in PRESETS.items():
        assert name == preset.name
        assert preset.about
        assert preset.verifier


def test_real_gsm8k(gsm8k):
    prompts = load_prompts(str(gsm8k), preset="gsm8k")
    assert len(prompts) == 7473
    assert prompts[0].answer == "72"
    assert all(p.answer.lstrip("-").replace(".", "").isdigit() for p in prompts)
    assert not any("<<" in p.privileged["solution"] or "####" in p.privileged["solution"] for p in prompts)


def test_worked_solutions_of_real_problems_are_right_and_other_answers_wrong(gsm8k):
    rows = [json.loads(line) for line in gsm8k.read_text().splitlines()[:300]]
    prompts = load_prompts(str(gsm8k), preset="gsm8k", limit=300)
    for row, prompt, other in zip(rows, prompts, [*prompts[1:], prompts[0]], strict=True):
        assert verify(row["answer"], prompt.answer) == 1.0
        assert verify(row["answer"], other.answer) == float(prompt.answer == other.answer)
