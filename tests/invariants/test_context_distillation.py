"""Invariants of context distillation: the student's own beginning, reading more, grades the student's tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
import world

from surpass.methods.base import RoleSpec
from surpass.methods.context_distillation import ContextDistillation
from surpass.methods.opd import OPD
from surpass.methods.run import Run
from surpass.prompts.views import View
from surpass.records import Prompt
from surpass.roles.role import Role, snapshot

BEFORE = View("solution", template="{solution}{problem}")
CRITIQUE = View("critique", template="{critique}")


def self_taught(solution: str, view: View | None = BEFORE) -> tuple[Run, list[Prompt]]:
    student = world.policy(0)
    run = world.world(student=student, teachers={"default": Role("teacher", snapshot(student), view=view)})
    texts = {"solution": solution, "critique": solution}
    return run, [replace(p, privileged=texts) for p in world.prompts(2)]


def gradient(solution: str, view: View | None = BEFORE, **settings: Any) -> torch.Tensor:
    run, prompts = self_taught(solution, view)
    method = ContextDistillation(samples=4, **settings)
    return world.step_gradient(run, method, method.collect(run, prompts))


def test_the_teacher_is_the_initial_student_with_a_view():
    assert ContextDistillation().roles() == {"teacher": RoleSpec("initial", view="solution")}
    for context in get_args(get_type_hints(ContextDistillation)["context"]):
        view = ContextDistillation(context=context).roles()["teacher"].view
        assert view is not None and View(view).kind == context
    assert OPD().roles() == {}


def test_the_very_tokens_are_scored_after_the_context():
    run, prompts = self_taught("ca")
    batch = ContextDistillation(samples=3).collect(run, prompts)
    contexts = [replace(p, messages="ca" + str(p.messages)) for p in batch.prompts]
    reading = replace(batch, prompt_ids=world.rollouts(run, [[0]] * 6, contexts).prompt_ids)
    found = batch.scores["teacher"].logp
    assert found is not None
    torch.testing.assert_close(found, world.token_logp(run.student, reading).detach(), **world.CLOSE)


def test_the_context_never_reaches_the_student():
    run, prompts = self_taught("ca")
    batch = ContextDistillation(samples=1).collect(run, prompts)
    assert batch.prompt_ids.tolist() == [[0], [1]]
    assert [calls.tolist() for calls in run.engine.calls] == [[[0], [1]]]  # type: ignore[attr-defined]


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_no_context_teaches_nothing(estimator: str):
    # Advantages and logit gradients are differences of equal float32 numbers.
    assert gradient("ca", None, estimator=estimator).abs().max() < 1e-6


@pytest.mark.parametrize("view", [BEFORE, CRITIQUE])
@pytest.mark.parametrize("estimator", ["sampled", "top_k", "full"])
def test_another_context_gives_another_gradient(view: View, estimator: str):
    one, other = (gradient(text, view, estimator=estimator, top_k=2) for text in ("ca", "bb"))
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
