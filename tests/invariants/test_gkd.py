"""Invariants of GKD: whose text, which divergence, and the reward beside it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import world

from surpass.learn.advantage import leave_one_out
from surpass.methods.gkd import GKD
from surpass.methods.opd import OPD
from surpass.methods.supervised_kd import SupervisedKD
from surpass.models.policy import Policy
from surpass.records import Author
from surpass.rollout.engine import Sampling


def reward(text: str) -> float:
    return float(text.count("b")) - 0.5 * float(text.startswith("c"))


def values(student: Policy, teacher: Policy, **settings: Any) -> torch.Tensor:
    """`[T]` divergence on the same sequences, whoever the student is."""
    run = world.world(student=student, teacher=teacher)
    method = GKD(**settings)
    batch = world.rollouts(run, world.every_answer(2))
    return method.loss(run, method.ask_teacher(run, batch)).terms[0].values.detach()


def test_off_policy_forward_kl_is_supervised_distillation():
    run = world.world(sampling=Sampling(max_new_tokens=8))
    prompts = world.prompts(3, response="ab")
    found, expected = (
        world.step_gradient(run, method, method.collect(run, prompts))
        for method in (GKD(on_policy_share=0.0), SupervisedKD())
    )
    assert torch.equal(found, expected)


def test_on_policy_reverse_kl_is_opd():
    run = world.world()
    batch = world.rollouts(run, world.every_answer(2))
    gkd, opd = GKD(divergence="reverse_kl", reduction="token_mean"), OPD(estimator="full")
    found = world.step_gradient(run, gkd, gkd.ask_teacher(run, batch))
    torch.testing.assert_close(found, world.step_gradient(run, opd, opd.score(run, batch)), **world.CLOSE)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.7])
def test_jsd_is_symmetric_and_bounded(beta: float):
    one, other = world.policy(0), world.policy(1)
    there = values(one, other, divergence="jsd", beta=beta)
    back = values(other, one, divergence="jsd", beta=1 - beta)
    torch.testing.assert_close(there, back, **world.CLOSE)
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert 1e-3 < there.max() <= bound <= math.log(2) + 1e-9
    # A divergence of two float32 distributions is zero only to rounding.
    assert there.min() > -1e-6


def test_jsd_tends_to_the_two_kls():
    one, other = world.policy(0), world.policy(1)
    for beta, limit in ((1e-3, "forward_kl"), (1 - 1e-3, "reverse_kl")):
        scaled = values(one, other, divergence="jsd", beta=beta) / min(beta, 1 - beta)
        # The next order is beta times a chi-square of the two, which is up to 50 here.
        torch.testing.assert_close(scaled, values(one, other, divergence=limit), rtol=2e-2, atol=2e-3)


def test_sampled_text_is_data():
    """How the ids came about leaves no trace: neither sampler log-probs nor seeds enter the loss."""
    run = world.world()
    batch = world.rollouts(run, world.every_answer(2))
    scored = GKD().ask_teacher(run, batch)
    other = scored.with_(sampler_logp=scored.sampler_logp * 3 - 1, version=scored.version + 7)
    assert torch.equal(world.step_gradient(run, GKD(), scored), world.step_gradient(run, GKD(), other))


def test_who_writes_depends_on_seed_and_step_alone():
    method = GKD(on_policy_share=0.3)
    run = world.world()
    draws = []
    for step in range(1000):
        run.step = step
        draws.append(method.on_policy(run))
    assert draws[:50] == [method.on_policy(replace(run, step=step)) for step in range(50)]
    assert draws[:50] != [method.on_policy(replace(run, step=step, seed=1)) for step in range(50)]
    # Five standard deviations of 1000 draws.
    assert abs(sum(draws) / 1000 - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 1000)


def test_each_batch_has_one_author_and_its_stream():
    run = world.world([[0, world.EOS]], sampling=Sampling(max_new_tokens=8), teacher_answers=[[1, 1]])
    prompts = world.prompts(2, response="ab")
    for share, text, author in ((1.0, "data", "STUDENT"), (0.0, "data", "DATA"), (0.0, "teacher", "TEACHER")):
        method = GKD(on_policy_share=share, text=text)  # type: ignore[arg-type]
        batch = method.collect(run, prompts)
        assert bool(batch.by(Author[author]).all())
        (term,) = method.loss(run, batch).terms
        assert term.stream == author.lower()


def test_own_text_needs_no_response():
    assert not GKD().needs().response
    assert GKD(on_policy_share=0.9).needs().response
    assert not GKD(on_policy_share=0.9, text="teacher").needs().response
    GKD().collect(world.world(), world.prompts(2))


def test_expected_gradient_with_a_reward():
    """Over all pairs of answers: the gradient of `alpha D - (1 - alpha) E[r]`, leave-one-out baseline included."""
    alpha = 0.4
    run = world.world(reward=reward)
    method = GKD(distillation_share=alpha, samples=2, divergence="reverse_kl")
    answers = world.every_answer(2)
    pairs = list(itertools.product(range(len(answers)), repeat=2))
    rows = [answers[i] for pair in pairs for i in pair]
    batch = world.rollouts(run, rows, group=[g for g in range(len(pairs)) for _ in range(2)])
    batch = method.ask_teacher(run, method.with_advantage(run.reward(batch)))
    single = world.rollouts(run, answers)
    p = world.probability(run.student, single)
    weight = torch.stack([p[i] * p[j] / 2 for i, j in pairs for _ in range(2)])
    found = world.expected_gradient(run, method, batch, weight)

    student = world.distributions(run.student, single)
    teacher = world.distributions(run.teachers["default"].policy, single).detach()
    divergence = single.ragged((student.exp() * (student - teacher)).sum(-1)).sum()
    rewards = run.reward(single).reward
    assert rewards is not None
    expected = alpha * (p * divergence).sum()
    expected = expected - (1 - alpha) * (world.sequence_logp(run.student, single).exp() * rewards).sum()
    torch.testing.assert_close(found, world.gradient(run.student, expected), **world.CLOSE)


def test_baseline_is_the_batch_where_each_prompt_has_one_answer():
    run = world.world([[0, 1], [1, 1], [2, 0]], reward=reward)
    batch = GKD(distillation_share=0.5).collect(run, world.prompts(3))
    assert batch.reward is not None
    torch.testing.assert_close(
        batch.sequence["advantage"], leave_one_out(batch.reward, torch.zeros(3, dtype=torch.int64))
    )
    assert batch.sequence["advantage"].abs().max() > 0.5


def test_unjudged_answers_get_no_reward_gradient():
    run = world.world(
        [[0, 1], [1, 1], [2, 0]], reward=lambda text: math.nan if text == "bb" else reward(text)
    )
    method = GKD(distillation_share=0.5)
    batch = method.collect(run, world.prompts(3))
    terms = {term.name: term for term in method.loss(run, batch).terms}
    assert batch.ragged(batch.mask(terms["policy_gradient"].stream)).sum().tolist() == [2, 0, 2]
    assert world.step_gradient(run, method, batch).isfinite().all()


def test_given_text_has_no_reward_term():
    run = world.world(reward=reward, sampling=Sampling(max_new_tokens=8))
    method = GKD(on_policy_share=1e-9, distillation_share=0.25)
    batch = method.collect(run, world.prompts(2, response="ab"))
    (term,) = method.loss(run, batch).terms
    assert (term.name, term.coefficient) == ("forward_kl", 0.25)


def test_without_a_share_for_the_reward_no_judge_is_needed():
    assert not GKD().needs().reward and not GKD().needs().sampler_law
    assert GKD(distillation_share=0.9).needs().reward and GKD(distillation_share=0.9).needs().sampler_law


@pytest.mark.parametrize(
    ("divergence", "beta"),
    [("forward_kl", None), ("reverse_kl", None), ("jsd", 0.5), ("skew_reverse_kl", 0.1)],
)
def test_another_teacher_gives_another_gradient(divergence: Any, beta: float | None):
    gradients = []
    for seed in (1, 4):
        run = world.world(teacher=world.policy(seed))
        method = GKD(divergence=divergence, beta=beta)
        gradients.append(world.step_gradient(run, method, method.collect(run, world.prompts(4))))
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_policy_share": 1.5}, "probability"),
        ({"distillation_share": 0.0}, "rloo"),
        ({"distillation_share": 0.5, "on_policy_share": 0.0}, "has none"),
        ({"cross_entropy": 1.0}, "given text"),
        ({"divergence": "jsd"}, "needs a parameter"),
        ({"divergence": "jsd", "beta": 0.0}, "takes a parameter"),
        ({"divergence": "forward_kl", "beta": 0.5}, "no parameter"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        GKD(**settings)
