"""Invariants of REOPD: a gate, a budget, and plain distillation without them."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from world import PROMPT, every_answer, gradient, policy, rollouts, step_gradient, token_logp, world

from surpass.methods.exopd import ExOPD
from surpass.methods.opd import OPD
from surpass.methods.reopd import REOPD
from surpass.methods.run import Run
from surpass.records import Rollouts

ANSWERS = every_answer(2)
# Random policies are 1 nat apart, where the paper's gate of 0.007 is closed; this one is half open.
WIDE: dict[str, Any] = {"gate_temperature": 1.0}


def scored(run: Run, method: OPD) -> Rollouts:
    return method.score(run, rollouts(run, ANSWERS))


def advantage(run: Run, method: OPD, batch: Rollouts) -> torch.Tensor:
    return method.loss(run, batch).metrics["advantage"]


def parts(run: Run, batch: Rollouts) -> tuple[torch.Tensor, torch.Tensor]:
    """a and r of the formula, `[T]` each."""
    assert run.reference is not None
    readers = run.student, run.teachers["default"].policy, run.reference.policy
    student, teacher, reference = (token_logp(reader, batch).detach() for reader in readers)
    return student - teacher, teacher - reference


def test_the_advantage_is_the_printed_one():
    run, method = world(), REOPD(**WIDE, decay=0.0)
    batch = scored(run, method)
    a, r = parts(run, batch)
    q = (-((-a).exp() + a - 1) / 1.0).exp()
    rho, s = (r.abs() * q).sum() / r.abs().sum(), (q * r).square().mean().sqrt()
    gamma = min(float(method.budget * rho / s), 1.0)
    torch.testing.assert_close(advantage(run, method, batch), -(a - gamma * q * r), rtol=1e-5, atol=1e-5)
    loss = method.loss(run, batch)
    torch.testing.assert_close(loss.metrics["reward_scale"], 1 + gamma * q, rtol=1e-5, atol=1e-5)
    assert 0 < gamma < 1 and float(q.max() - q.min()) > 0.1
    assert run.metrics["gamma"] == pytest.approx(gamma, rel=1e-5)


@pytest.mark.parametrize("changes", [{"gamma_max": 0.0}, {"budget": 0.0}])
def test_without_a_budget_it_is_opd_bit_for_bit_and_asks_no_reference(changes):
    method = REOPD(**changes)
    assert not method.needs().reference
    run = dataclasses.replace(world(), reference=None)
    batch = method.collect(run, [PROMPT])
    assert set(batch.scores) == {"teacher"}
    assert torch.equal(step_gradient(run, method, batch), step_gradient(run, OPD(), batch))


def test_with_an_open_gate_and_budget_it_is_exopd():
    """tau large: q is 1 everywhere; the budget is beyond gamma_max."""
    run = world()
    method = REOPD(gate_temperature=1e9, budget=1e9, gamma_max=0.25)
    expected = ExOPD(reward_scale=1.25)
    torch.testing.assert_close(
        advantage(run, method, scored(run, method)),
        advantage(run, expected, scored(run, expected)),
        rtol=1e-5,
        atol=1e-5,
    )


def test_the_gate_is_open_where_student_and_teacher_agree():
    run = world(teacher=policy(0))  # the student's own weights
    method = REOPD()
    batch = scored(run, method)
    assert run.metrics["gate"] == pytest.approx(1.0, abs=1e-5)
    _, r = parts(run, batch)
    # rho is 1, so the root mean square of the extrapolation term is the whole budget.
    term = (batch.token["reward_scale"] - 1) * r
    assert float(term.square().mean().sqrt()) == pytest.approx(method.budget, rel=1e-4)


@pytest.mark.parametrize("budget", [0.01, 0.1, 100.0])
def test_lambda_lies_between_one_and_its_greatest(budget):
    run, method = world(), REOPD(**WIDE, budget=budget, gamma_max=0.5)
    scale = scored(run, method).token["reward_scale"]
    assert float(scale.min()) >= 1 and float(scale.max()) <= 1.5
    assert float(scale.max()) > 1


def test_a_teacher_that_is_the_reference_has_nothing_to_extrapolate():
    run = world(reference=policy(1))
    method = REOPD()
    batch = scored(run, method)
    assert method.state_dict() == {} and run.metrics["gamma"] == 0.0
    assert torch.equal(advantage(run, method, batch), advantage(run, OPD(), batch))


def test_what_the_gate_closes_is_never_read():
    method = REOPD()
    reward, gate = torch.tensor([1.0, -torch.inf, 0.5]), torch.tensor([1.0, 0.0, 0.5])
    assert math.isfinite(method.gamma(reward, gate))
    torch.testing.assert_close(
        torch.tensor(method.state_dict()["s"]), torch.tensor([1.0, 0.0, 0.25]).square().mean().sqrt()
    )


def test_averages_move_slowly_begin_at_the_first_batch_and_resume():
    method = REOPD(decay=0.75)
    reward = torch.tensor([1.0, -1.0])
    method.gamma(reward, torch.tensor([1.0, 1.0]))
    assert method.state_dict() == {"rho": 1.0, "s": 1.0}
    method.gamma(reward, torch.tensor([0.5, 0.5]))
    assert method.state_dict() == {"rho": 0.875, "s": 0.875}
    later = REOPD(decay=0.75)
    later.load_state_dict(json.loads(json.dumps(method.state_dict())))
    more = torch.tensor([0.1, 0.7])
    assert later.gamma(reward, more) == method.gamma(reward, more)
    assert later.state_dict() == method.state_dict()


def test_several_updates_keep_the_batch_s_gate():
    run, method = world(off_policy=True), REOPD(**WIDE)
    batch = scored(run, method)
    scale = batch.token["reward_scale"]
    with torch.no_grad():
        run.student.head.weight.mul_(1.3)
    assert torch.equal(method.loss(run, batch).metrics["reward_scale"], scale)
    assert "old" in batch.scores


def test_only_the_student_has_a_gradient_and_the_gate_none():
    run, method = world(), REOPD(**WIDE)
    batch = scored(run, method)
    assert not batch.token["reward_scale"].requires_grad
    assert not advantage(run, method, batch).requires_grad
    values = method.loss(run, batch).terms[0].values
    expected = -(advantage(run, method, batch) * token_logp(run.student, batch))
    torch.testing.assert_close(
        gradient(run.student, values.sum()), gradient(run.student, expected.sum()), rtol=2e-4, atol=2e-5
    )


@pytest.mark.parametrize(
    "changes",
    [{"gate_temperature": 0.0}, {"budget": -1.0}, {"gamma_max": -0.1}, {"decay": 1.0}, {"estimator": "full"}],
    ids=str,
)
def test_settings_that_cannot_work_are_errors(changes):
    with pytest.raises(ValueError, match=r"expected method\.|set estimator sampled"):
        REOPD(**changes)
