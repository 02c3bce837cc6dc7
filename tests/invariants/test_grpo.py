"""GRPO (arXiv 2402.03300) and what its relatives share with it."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from grouped import judged, off_policy, token_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from tabular import PRINTED, REFERENCE, STUDENT, at_root, tabular
from world import (
    CLOSE,
    PROMPT,
    distributions,
    every_answer,
    expected_gradient,
    gradient,
    probability,
    prompts,
    rollouts,
    step_gradient,
    token_logp,
    world,
)

from surpass.learn.divergence import forward_kl, reverse_kl
from surpass.methods.dapo import DAPO
from surpass.methods.dr_grpo import DrGRPO
from surpass.methods.grpo import GRPO
from surpass.methods.gspo import GSPO
from surpass.methods.rloo import RLOO

FAMILY = [GRPO(), DrGRPO(), DAPO(), GSPO(), RLOO()]
family = pytest.mark.parametrize("method", FAMILY, ids=lambda m: type(m).__name__)
EQUAL = [[0, 1], [1, 1], [2, 0], [0, 3]]
UNEQUAL = [[0, 1], [1, 1], [3], [0, 3]]
REWARDS = [1.0, 0.0, 0.0, 1.0]


# -- advantages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "right"), [(8, 1), (8, 3), (8, 7), (2, 1), (5, 2)])
def test_advantages_of_binary_rewards_in_closed_form(size, right):
    rewards = [1.0] * right + [0.0] * (size - right)
    found = judged(world(), GRPO(epsilon=0.0), [[0]] * size, rewards).sequence["advantage"]
    p = right / size
    up = math.sqrt((1 - p) * (size - 1) / (p * size))
    down = -math.sqrt(p * (size - 1) / ((1 - p) * size))
    expected = torch.tensor([up] * right + [down] * (size - right))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_ddof_zero_takes_the_population_deviation():
    found = judged(world(), GRPO(ddof=0, epsilon=0.0), [[0]] * 4, [1.0, 0.0, 0.0, 0.0]).sequence["advantage"]
    torch.testing.assert_close(found, torch.tensor([3.0, -1.0, -1.0, -1.0]) / math.sqrt(3))


REWARD_LISTS = st.lists(st.integers(-8, 8).map(float), min_size=2, max_size=8)


@settings(max_examples=50, deadline=None)
@given(REWARD_LISTS, st.floats(0.5, 4.0), st.floats(-5.0, 5.0))
def test_standardised_advantages_do_not_see_an_affine_change_of_reward(rewards, scale, shift):
    reward, group = torch.tensor(rewards, dtype=torch.float64), torch.zeros(len(rewards), dtype=torch.int64)
    method = GRPO(epsilon=1e-12)
    torch.testing.assert_close(
        method.advantages(scale * reward + shift, group),
        method.advantages(reward, group),
        rtol=1e-6,
        atol=1e-6,
    )


@settings(max_examples=50, deadline=None)
@given(REWARD_LISTS)
def test_advantages_of_a_group_sum_to_zero(rewards):
    reward, group = torch.tensor(rewards, dtype=torch.float64), torch.zeros(len(rewards), dtype=torch.int64)
    for method in FAMILY:
        assert float(method.advantages(reward, group).sum()) == pytest.approx(0.0, abs=1e-6)


def test_groups_do_not_see_each_other():
    run = world()
    both = judged(run, GRPO(), EQUAL, [1.0, 0.0, 5.0, 9.0], [0, 0, 1, 1])
    alone = judged(run, GRPO(), EQUAL[:2], [1.0, 0.0])
    assert torch.equal(both.sequence["advantage"][:2], alone.sequence["advantage"])


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2 answers"):
        GRPO(samples=1)


# -- the gradient ---------------------------------------------------------------------------------------------------


@family
def test_on_policy_loss_is_the_negative_advantage_and_nothing_is_clipped(method):
    run = world()
    batch = judged(run, method, UNEQUAL, REWARDS)
    loss = method.loss(run, batch)
    expected = -batch.response.expand(batch.sequence["advantage"])
    # The sampler's log-probs come from another forward: its weight is 1 to rounding.
    torch.testing.assert_close(loss.terms[0].values.detach(), expected, rtol=1e-5, atol=1e-6)
    assert not bool(loss.metrics["clip_ratio"].any())


def test_on_policy_with_equal_lengths_grpo_dapo_and_gspo_are_one():
    run = world()
    found = [step_gradient(run, m, judged(run, m, EQUAL, REWARDS)) for m in (GRPO(), DAPO(), GSPO())]
    torch.testing.assert_close(found[1], found[0], **CLOSE)
    torch.testing.assert_close(found[2], found[0], **CLOSE)
    assert float(found[0].norm()) > 0.1


def test_on_policy_gradient_is_that_of_reinforce_with_the_papers_mean():
    run = world()
    batch = judged(run, GRPO(), UNEQUAL, REWARDS)
    per_answer = batch.ragged(token_logp(run.student, batch)).mean()
    expected = gradient(run.student, -(batch.sequence["advantage"] * per_answer).mean())
    torch.testing.assert_close(step_gradient(run, GRPO(), batch), expected, **CLOSE)


def test_with_unequal_lengths_token_mean_and_sequence_mean_differ():
    run = world()
    mean, token = GRPO(), GRPO(reduction="token_mean")
    batch = judged(run, mean, UNEQUAL, REWARDS)
    first, second = step_gradient(run, mean, batch), step_gradient(run, token, batch)
    assert float((first - second).norm()) > 0.02 * float(first.norm())


@family
def test_a_group_without_variance_gives_no_gradient_at_all(method):
    run = world()
    for reward in (0.0, 0.1, 1.0):
        batch = judged(run, method, UNEQUAL, [reward] * 4)
        assert not bool(step_gradient(run, method, batch).any())


@family
def test_another_reward_another_gradient(method):
    run = world()
    first = step_gradient(run, method, judged(run, method, UNEQUAL, REWARDS))
    second = step_gradient(run, method, judged(run, method, UNEQUAL, [0.0, 0.0, 1.0, 0.0]))
    assert float((first - second).norm()) > 0.1 * float(first.norm())


@family
def test_answers_the_judge_left_out_are_not_trained_and_do_not_count(method):
    run = world()
    with_them = judged(run, method, [*UNEQUAL, [1, 2], [2]], [*REWARDS, math.nan, math.nan])
    without = judged(run, method, UNEQUAL, REWARDS)
    found = step_gradient(run, method, with_them)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, step_gradient(run, method, without), **CLOSE)
    assert not bool(with_them.ragged(with_them.mask("trained"))[4].any())


def test_foreign_tokens_are_not_trained():
    run, method = world(), GRPO()
    batch = rollouts(run, UNEQUAL).with_(reward=torch.tensor(REWARDS))
    author = batch.author.clone()
    author[0] = 2  # the first token came back from a tool
    mixed = method.with_advantage(dataclasses.replace(batch, author=author))
    assert mixed.mask("trained").tolist() == [False] + [True] * (len(author) - 1)


# -- the clip ---------------------------------------------------------------------------------------------------------

CLIPS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0, "sampler_cap": None}


@pytest.mark.parametrize("kind", [GRPO, DrGRPO, DAPO, RLOO], ids=lambda k: k.__name__)
def test_the_gradient_of_a_token_is_exactly_zero_just_where_the_clip_says(kind):
    run, method = world(), kind(**CLIPS)
    ratios = [0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 2.9, 3.1] * 2
    signs = [1.0] * 8 + [-1.0] * 8
    batch = judged(run, method, [[i % 4] for i in range(16)], signs)
    batch = off_policy(run, batch, torch.tensor(ratios).log())
    cut = [
        (sign > 0 and ratio > 1.28) or (sign < 0 and (ratio < 0.8 or ratio > 3.0))
        for sign, ratio in zip(signs, ratios)
    ]
    assert method.loss(run, batch).metrics["clip_ratio"].bool().tolist() == cut
    assert (token_gradients(run, method, batch) == 0).tolist() == cut


def test_without_a_dual_clip_a_large_ratio_keeps_its_gradient_where_the_advantage_is_negative():
    run, method = world(), GRPO(**{**CLIPS, "dual_clip": None})
    batch = off_policy(run, judged(run, method, [[0], [1]], [0.0, 1.0]), torch.tensor([50.0, 1.0]).log())
    assert float(token_gradients(run, method, batch)[0]) > 0


def test_the_importance_weight_is_taken_from_the_first_weights_on_this_batch():
    run, method = world(), GRPO(dual_clip=None, sampler_cap=5.0)
    batch = judged(run, method, EQUAL, REWARDS)
    shifted = dataclasses.replace(batch, sampler_logp=batch.sampler_logp - math.log(1.5))
    batch = off_policy(run, shifted, torch.full((len(batch.response.values),), math.log(1.1)))
    # trainer before the update / sampler: exp(-log 1.1 + log 1.5)
    weight = method.loss(run, batch).metrics["sampling/importance_weight"]
    torch.testing.assert_close(weight, torch.full_like(weight, 1.5 / 1.1), rtol=1e-5, atol=1e-5)


# -- the KL term --------------------------------------------------------------------------------------------------------

DIRECTIONS = {"reverse": reverse_kl, "forward": forward_kl}


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_kl_term_has_the_gradient_it_is_named_by(direction):
    run = world()
    method = GRPO(kl_coefficient=0.3, kl_gradient=direction)
    answers = every_answer(2)
    batch = judged(run, method, answers, [0.5] * len(answers))
    batch = run.score(batch, "reference")
    assert run.reference is not None
    student, reference = (
        distributions(run.student, batch),
        distributions(run.reference.policy, batch).detach(),
    )
    values = batch.ragged(DIRECTIONS[direction](student, reference)).sum()
    exact = 0.3 * gradient(run.student, (values * probability(run.student, batch)).sum())
    torch.testing.assert_close(expected_gradient(run, method, batch), exact, **CLOSE)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_kl_term_on_three_tokens(direction):
    student, reference = torch.tensor(STUDENT), torch.tensor(REFERENCE)
    ratio = (student / reference).log()
    expected = {
        "reverse": student * (ratio - (student * ratio).sum()),
        "forward": student - reference,
    }[direction]
    run = world([[0]], student=tabular(STUDENT), reference=tabular(REFERENCE))
    method = GRPO(kl_coefficient=1.0, kl_gradient=direction)
    batch = run.score(judged(run, method, [[0], [1], [2]], [0.0] * 3), "reference")
    torch.testing.assert_close(at_root(expected_gradient(run, method, batch)), expected, **PRINTED)


def test_kl_is_scored_by_collect_and_read_only_where_its_weight_is_not_zero():
    run = world(reward=lambda text: float(text.startswith("b")))
    assert "reference" in GRPO(samples=4, kl_coefficient=0.1).collect(run, [PROMPT]).scores
    alone = dataclasses.replace(run, reference=None)
    assert "reference" not in GRPO(samples=4).collect(alone, [PROMPT]).scores
    with pytest.raises(ValueError, match="needs a reference"):
        GRPO(samples=4, kl_coefficient=0.1).collect(alone, [PROMPT])


# -- collecting -----------------------------------------------------------------------------------------------------------


@family
def test_collect_judges_whole_groups(method):
    method = dataclasses.replace(method, samples=4)
    answers = [[1, 2], [2, 2], [3], [1, 3]]
    run = world(answers, reward=lambda text: float(text.startswith("b")))
    batch = method.collect(run, prompts(2))
    assert batch.group.tolist() == [0] * 4 + [1] * 4
    assert batch.reward is not None
    accuracy = batch.sequence.get("accuracy", batch.reward)
    assert accuracy.tolist() == [1.0, 0.0, 0.0, 1.0] * 2
    assert batch.response.tolist() == answers * 2
    expected = method.advantages(batch.reward, batch.group)
    assert torch.equal(batch.sequence["advantage"], expected)
    assert "old" not in batch.scores
    again = method.collect(dataclasses.replace(run, off_policy=True), prompts(2))
    old = again.scores["old"].logp
    assert old is not None
    torch.testing.assert_close(old, token_logp(run.student, again).detach(), rtol=1e-5, atol=1e-5)


def test_no_judge_is_an_error():
    with pytest.raises(ValueError, match="needs rewards"):
        GRPO().collect(world(), [PROMPT])
