"""The diagnosis before training: figures in closed form for equal models, and verdicts from evidence."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from surpass.evaluate.diagnosis import Diagnosis, diagnose, state_figures, verdict
from surpass.models.policy import Policy
from surpass.models.zoo import char_tokenizer, tiny_model
from surpass.prompts.sources import load_prompts
from surpass.records import Prompt, Ragged
from surpass.rollout.engine import Sampling
from surpass.rollout.local import LocalEngine


def policy(seed: int) -> Policy:
    tokenizer = char_tokenizer()
    model = tiny_model("qwen3", len(tokenizer), hidden=16, layers=1, seed=seed, initializer_range=0.5).eval()
    return Policy(model, tokenizer, f"tiny-{seed}")


def figures(student: Policy, teacher: Policy, reference: Policy, budget: int = 4096):
    prompts = Ragged.from_list(
        [torch.randint(8, 90, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 6)]
    )
    answers = Ragged.from_list(
        [torch.randint(8, 90, (n,), generator=torch.Generator().manual_seed(9 + n)) for n in (4, 7)]
    )
    return state_figures(student, teacher, reference, prompts, answers, 8, 1.0, budget)


def test_equal_models_agree_in_everything_and_extrapolation_has_no_limit():
    found = figures(policy(0), policy(0), policy(0))
    assert found.overlap == 1.0
    assert found.reverse_kl == pytest.approx(0.0, abs=1e-6)  # float32 sums over the vocabulary
    assert found.forward_kl == pytest.approx(0.0, abs=1e-6)
    assert found.student_mass == pytest.approx(found.teacher_mass, abs=1e-6)
    assert found.limit == 5.0  # log q = log p for every lambda


def test_figures_do_not_depend_on_micro_batches_and_see_a_different_teacher():
    student, teacher = policy(0), policy(1)
    whole, cut = figures(student, teacher, student), figures(student, teacher, student, budget=8)
    assert cut.reverse_kl == pytest.approx(whole.reverse_kl, rel=1e-4)
    assert whole.overlap < 1.0
    assert whole.reverse_kl > 0.0


def run(teacher: Policy) -> Diagnosis:
    student = policy(0)
    prompts = load_prompts("embedded:sort", limit=4)

    def judge(asked: Sequence[Prompt], texts: Sequence[str]) -> Any:
        del asked
        return SimpleNamespace(reward=torch.tensor([float(len(text) % 2 == 0) for text in texts]))

    return diagnose(
        student,
        teacher,
        student,
        lambda p: LocalEngine(p, max_rows=8),
        prompts,
        judge,
        Sampling(max_new_tokens=6),
        samples=2,
    )


def test_a_teacher_equal_to_the_student_has_nothing_to_teach():
    found = run(policy(0))
    assert found.gain == 0.0
    assert found.novelty == 0.0
    assert found.verdict == "unlikely"


def test_verdicts_follow_the_evidence():
    found = run(policy(1))
    able = replace(found, gain=0.2, novelty=0.1)
    assert verdict(replace(able, states=replace(found.states, overlap=0.9)))[0] == "likely"
    answer, reasons = verdict(replace(able, states=replace(found.states, overlap=0.2)))
    assert answer == "cold start first"
    assert "sequence_kd" in reasons[-1]
