"""Invariants of context distillation: the student's own beginning, reading more, grades the student's tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import world

from surpass.methods.base import RoleSpec
from surpass.methods.context_distillation import ContextDistillation
from surpass.methods.opd import OPD
from surpass.methods.run import Run
from surpass.records import Prompt
from surpass.roles.role import Role, snapshot


@dataclass(frozen=True)
class Before:
    """A view that puts the prompt's solution before its text."""

    def prompt_for(self, prompt: Prompt, answer: str, feedback: str | None) -> str:
        del answer, feedback
        return prompt.privileged["solution"] + str(prompt.messages)


def self_taught(solution: str) -> tuple[Run, list[Prompt]]:
    student, view = world.policy(0), Before()
    any_view: Any = view
    run = world.world(student=student, teachers={"default": Role("teacher", snapshot(student), view=any_view)})
    return run, [replace(p, privileged={"solution": solution}) for p in world.prompts(2)]


def gradient(solution: str, **settings: Any) -> torch.Tensor:
    run, prompts = self_taught(solution)
    method = ContextDistillation(samples=4, **settings)
    return world.step_gradient(run, method, method.collect(run, prompts))


def test_the_teacher_is_the_initial_student_with_a_view():
    assert ContextDistillation().roles() == {"teacher": RoleSpec("initial", view="solution")}
    assert ContextDistillation(context="critique").roles()["teacher"].view == "critique"
    assert OPD().roles() == {}


def test_the_very_tokens_are_scored_after_the_context():
    run, prompts = self_taught("ca")
    batch = ContextDistillation(samples=3).collect(run, prompts)
    reading = replace(batch, prompt_ids=world.rollouts(run, [[0]] * 6, [_with_context(p) for p in batch.prompts]).prompt_ids)
    found = batch.scores["teacher"].logp
    assert found is not None
    torch.testing.assert_close(found, world.token_logp(run.student, reading).detach(), **world.CLOSE)


def _with_context(prompt: Prompt) -> Prompt:
    return replace(prompt, messages=prompt.privileged["solution"] + str(prompt.messages))


def test_the_context_never_reaches_the_student():
    run, prompts = self_taught("ca")
    batch = ContextDistillation(samples=1).collect(run, prompts)
    assert batch.prompt_ids.tolist() == [[0], [1]]
    assert [calls.tolist() for calls in run.engine.calls] == [[[0], [1]]]  # type: ignore[attr-defined]


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_an_empty_context_teaches_nothing(estimator: str):
    # Advantages and logit gradients are differences of equal float32 numbers.
    assert gradient("", estimator=estimator).abs().max() < 1e-6


@pytest.mark.parametrize("estimator", ["sampled", "top_k", "full"])
def test_another_context_gives_another_gradient(estimator: str):
    one, other = (gradient(solution, estimator=estimator, top_k=2) for solution in ("ca", "bb"))
    assert one.norm() > 0 and (one - other).norm() > 0.05 * one.norm()


def test_the_teacher_stays_where_the_student_began():
    run, prompts = self_taught("ca")
    method = ContextDistillation(samples=2)
    before = method.collect(run, prompts).scores["teacher"].logp
    with torch.no_grad():
        run.student.head.weight.mul_(0.5)
    after = method.collect(run, prompts).scores["teacher"].logp
    assert before is not None and after is not None and torch.equal(before, after)


def test_role_specs_without_a_meaning_are_refused():
    with pytest.raises(ValueError, match="'ema'"):
        RoleSpec("ema")
    with pytest.raises(ValueError, match="'copy'"):
        RoleSpec("initial", updates=3)
