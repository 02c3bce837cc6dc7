"""Evaluation with an engine and a judge whose every answer is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from surpass.evaluate.coverage import coverage, solved
from surpass.evaluate.evaluation import evaluate
from surpass.evaluate.summary import Evaluation
from surpass.records import Finish, Prompt, Ragged
from surpass.rollout.engine import Completions, Sampling

DIGITS = "0123456789"


class Tokenizer:
    """Ids are characters; id 0 ends a text and is special."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(i) if i else "" if skip_special_tokens else "<end>" for i in ids)


@dataclass
class Engine:
    """Writes one digit, drawn from the seed, and ends; every third answer is cut off instead."""

    seeds: Tensor | None = None

    def generate(
        self,
        prompt_ids: Ragged,
        n: int,
        sampling: Sampling,
        seeds: Tensor,
        progress: Callable[[int, int], None] | None = None,
    ) -> Completions:
        self.seeds = seeds
        digits = [ord(DIGITS[int(s) % 4]) for s in seeds]
        cut = [i % 3 == 2 for i in range(len(seeds))]
        response = Ragged.from_list([[d] if c else [d, 0] for d, c in zip(digits, cut, strict=True)])
        if progress:
            progress(len(seeds), len(seeds))
        return Completions(
            response=response,
            logp=torch.zeros(len(response.values)),
            finish=torch.tensor([int(Finish.LENGTH if c else Finish.EOS) for c in cut]),
            version=torch.zeros(len(seeds), dtype=torch.int64),
        )

    def update(self, version: int) -> None:
        raise AssertionError("evaluation never changes weights")


def judge(prompts: Sequence[Prompt], texts: Sequence[str]) -> Any:
    """1 for the reference answer; the verifier fails on the digit 3; privileged contexts must be gone."""
    assert all(not prompt.privileged for prompt in prompts)
    rewards = [math.nan if t == "3" else float(t == p.answer) for p, t in zip(prompts, texts, strict=True)]
    return SimpleNamespace(reward=torch.tensor(rewards))


def make(count: int = 20, **columns: Any) -> tuple[list[Prompt], Ragged]:
    prompts = [
        Prompt(
            id=f"p{i}", messages="say", answer=str(i % 2), domain="even" if i % 2 == 0 else "odd", **columns
        )
        for i in range(count)
    ]
    return prompts, Ragged.from_list([[ord(c) for c in "say"]] * count)


def run(prompts: list[Prompt], ids: Ragged, engine: Engine | None = None, **settings: Any) -> Evaluation:
    tokenizer = cast(PreTrainedTokenizerBase, Tokenizer())
    settings = {"n": 6, "ks": (1, 3), "vote": lambda _, text: text, **settings}
    return evaluate(engine or Engine(), prompts, ids, judge, tokenizer, **settings)


def test_summaries_follow_from_the_samples() -> None:
    result = run(*make())
    assert list(result.domains) == ["even", "odd"]
    assert len(result.samples) == result.overall.samples == 120
    failed = [s for s in result.samples if s.completion == "3"]
    assert result.overall.failures == len(failed) > 0
    assert all(s.reward is None for s in failed)
    # By hand: mean over prompts of correct / judged.
    shares = [c.correct / c.judged for c in result.counts().values() if c.judged]
    assert result.overall.estimates["pass@1"].value == pytest.approx(sum(shares) / len(shares), abs=1e-12)
    assert result.overall.estimates["avg@6"].value == pytest.approx(sum(shares) / len(shares), abs=1e-12)
    assert result.overall.clipped_ratio == pytest.approx(1 / 3)
    assert result.overall.tokens_generated == sum(s.length for s in result.samples) == 200
    assert result.overall.mean_length == pytest.approx(200 / 120)
    assert {"pass@1", "pass@3", "maj@1", "maj@3", "reward"} <= set(result.overall.estimates)
    # One draw is its own majority.
    assert result.overall.estimates["maj@1"].value == pytest.approx(result.overall.estimates["pass@1"].value)


def test_same_seed_same_numbers_other_seed_other_draws() -> None:
    prompts, ids = make()
    assert run(prompts, ids, seed=1) == run(prompts, ids, seed=1)
    assert run(prompts, ids, seed=1).samples != run(prompts, ids, seed=2).samples


def test_seeds_belong_to_prompts_not_to_positions() -> None:
    prompts, ids = make()
    forward, backward = Engine(), Engine()
    run(prompts, ids, forward)
    run(prompts[::-1], ids, backward)
    assert forward.seeds is not None
    assert backward.seeds is not None
    assert torch.equal(forward.seeds.view(20, 6), backward.seeds.view(20, 6).flip(0))


def test_files_hold_what_was_measured(tmp_path: Path) -> None:
    result = run(*make(), out=tmp_path)
    assert Evaluation.load(tmp_path) == result
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert rows == result.rows()
    assert rows[-1]["domain"] == "overall"
    assert rows[-1]["pass@1/low"] <= rows[-1]["pass@1"] <= rows[-1]["pass@1/high"]
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 120


def test_without_a_vote_there_is_no_majority() -> None:
    assert not any(name.startswith("maj@") for name in run(*make(), vote=None).overall.estimates)


def test_a_rendered_secret_is_refused_and_a_public_one_is_not() -> None:
    secret = "because it is even"
    prompts, _ = make(2, privileged={"solution": secret})
    leaked = Ragged.from_list([[ord(c) for c in f"say, {secret}"]] * 2)
    with pytest.raises(ValueError, match="privileged 'solution'"):
        run(prompts, leaked)
    public = [
        Prompt(id=p.id, messages=f"say, {secret}", answer="0", privileged=p.privileged) for p in prompts
    ]
    assert run(public, leaked).overall.prompts == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": (1, 7)}, r"1 <= k <= n; found k = \[7\] with n = 6"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": make(2)[0] * 10}, "occurs twice"),
        ({"prompts": make(3)[0]}, "3 prompts but 20 rendered"),
        ({"prompts": [Prompt(id=str(i), messages="say", domain="overall") for i in range(20)]}, "'overall'"),
    ],
)
def test_wrong_questions_are_refused(change: dict[str, Any], message: str) -> None:
    prompts, ids = make()
    prompts = change.pop("prompts", prompts)
    with pytest.raises(ValueError, match=message):
        run(prompts, ids, **change)


def test_coverage_splits_prompts_by_who_solves_them() -> None:
    prompts, ids = make()
    student, teacher = run(prompts, ids, seed=1), run(prompts, ids, seed=2)
    result = coverage(student, teacher, k=1, threshold=0.3)
    counts = student.counts()
    assert result.both | result.student_only == {i for i, c in counts.items() if c.correct / c.judged >= 0.3}
    parts = [result.both, result.student_only, result.teacher_only, result.neither]
    assert sorted(i for part in parts for i in part) == sorted(p.id for p in prompts)
    assert result.student_only
    assert result.gained == len(result.student_only) / 20
    same = coverage(student, student)
    assert (same.gained, same.lost) == (0.0, 0.0)


def test_coverage_refuses_other_prompts_and_too_large_k() -> None:
    prompts, ids = make()
    whole = run(prompts, ids)
    part = run(prompts[:10], ids.select(torch.arange(10)))
    with pytest.raises(ValueError, match="10 are only in the student's"):
        coverage(whole, part)
    with pytest.raises(ValueError, match="fewer than 7 judged"):
        solved(whole, k=7)
