r"""Known data sets: which fields they have, how their gold answer is written, and what verifies it.

A preset reads rows into the house's fields; `Preset.instruction` is appended to the user's turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from surpass.judge.answers import last_boxed
from surpass.prompts.rows import DataError

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Preset:
    """One known data set.

    fields: for each of the house's fields, the columns it may stand in, in order of preference.
    required: the fields every row must have.
    refine: from the fields found in a row to the final ones; raises ValueError in words.
    """

    name: str
    about: str
    fields: dict[str, tuple[str, ...]]
    verifier: str
    domain: str = "math"
    instruction: str = BOXED
    required: tuple[str, ...] = ("prompt", "answer")
    refine: Callable[[dict[str, Any]], dict[str, Any]] = dict


def _gsm8k(found: dict[str, Any]) -> dict[str, Any]:
    """`worked text #### 1,234` -> answer `1234`, and the worked text without its `<<12*3=36>>` calculator marks."""
    worked, mark, final = str(found["answer"]).rpartition("####")
    if not mark or not final.strip():
        raise ValueError(f"expected an answer that ends in '#### NUMBER', found {found['answer']!r}")
    solution = re.sub(r"<<[^<>]*>>", "", worked).strip()
    return {**found, "answer": final.strip().replace(",", ""), "solution": solution}


def _boxed_solution(found: dict[str, Any]) -> dict[str, Any]:
    r"""The answer is a column of its own, or the last `\boxed{}` of the worked solution."""
    if found.get("answer") is not None:
        return {**found, "answer": str(found["answer"])}
    answer = last_boxed(str(found.get("solution") or ""))
    if answer is None:
        raise ValueError("found neither an answer nor a solution with \\boxed{...}")
    return {**found, "answer": answer}


def _text_answer(found: dict[str, Any]) -> dict[str, Any]:
    """Integer answers (AIME) become text: `33.0` and `33` are both `33`."""
    answer = found["answer"]
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return {**found, "answer": str(answer).strip()}


_COMPETITION = {
    "prompt": ("problem", "Problem", "question"),
    "answer": ("answer", "Answer"),
    "solution": ("solution", "Solution"),
}

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "gsm8k",
            "grade-school word problems (arXiv 2110.14168): question, answer with worked text and '#### NUMBER'",
            {"prompt": ("question",), "answer": ("answer",)},
            verifier="math",
            refine=_gsm8k,
        ),
        Preset(
            "math",
            "competition problems (arXiv 2103.03874): problem, solution with \\boxed{answer}; MATH-500 has answer too",
            {"prompt": ("problem",), "answer": ("answer",), "solution": ("solution",)},
            verifier="math",
            required=("prompt",),
            refine=_boxed_solution,
        ),
        Preset("aime", "AIME: problem, integer answer", _COMPETITION, verifier="math", refine=_text_answer),
        Preset("hmmt", "HMMT: problem, answer", _COMPETITION, verifier="math", refine=_text_answer),
        Preset(
            "deepmath",
            "DeepMath-103K (arXiv 2504.11456): question, final_answer, difficulty; r1_solution_1 as worked solution",
            {"prompt": ("question",), "answer": ("final_answer",), "solution": ("r1_solution_1", "solution")},
            verifier="math",
            refine=_text_answer,
        ),
        Preset(
            "eurus-code",
            "programming problems (arXiv 2502.01456): prompt, reward_model.ground_truth; judging needs a sandbox",
            {"prompt": ("prompt",), "answer": ("reward_model.ground_truth",)},
            verifier="code",
            domain="code",
            instruction="",
        ),
    )
}


def preset_named(name: str) -> Preset:
    """Raises DataError with the known names."""
    if name not in PRESETS:
        raise DataError(
            f"unknown preset {name!r}; there are {sorted(PRESETS)}; or name the columns with data.fields"
        )
    return PRESETS[name]
