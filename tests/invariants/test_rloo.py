"""RLOO (arXiv 2402.14740): the other answers' mean reward as baseline, the whole answer as one action."""

import torch
from grouped import judged
from hypothesis import given, settings
from hypothesis import strategies as st
from world import (
    CLOSE,
    every_answer,
    gradient,
    probability,
    rollouts,
    sequence_logp,
    step_gradient,
    world,
)

from surpass.methods.dr_grpo import DrGRPO
from surpass.methods.rloo import RLOO

ANSWERS = [[0, 1], [1], [3], [0, 3]]
REWARDS = [1.0, 0.0, 0.25, 1.0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-8, 8).map(float), min_size=2, max_size=9))
def test_is_g_over_g_minus_one_times_dr_grpo(rewards):
    reward, group = torch.tensor(rewards, dtype=torch.float64), torch.zeros(len(rewards), dtype=torch.int64)
    size = len(rewards)
    found = RLOO().advantages(reward, group)
    torch.testing.assert_close(found, size / (size - 1) * DrGRPO().advantages(reward, group))
    others = torch.stack([r - (reward.sum() - r) / (size - 1) for r in reward])
    torch.testing.assert_close(found, others, rtol=0, atol=1e-12)


def test_gradient_is_that_of_whole_answers():
    run, method = world(), RLOO()
    batch = judged(run, method, ANSWERS, REWARDS)
    expected = gradient(
        run.student, -(batch.sequence["advantage"] * sequence_logp(run.student, batch)).mean()
    )
    torch.testing.assert_close(step_gradient(run, method, batch), expected, **CLOSE)


def test_expected_gradient_over_all_pairs_is_that_of_the_expected_reward():
    run, method = world(), RLOO(samples=2)
    answers = every_answer(1)
    reward = {0: 1.0, 1: 0.0, 2: 0.5, 3: 2.0}
    every = rollouts(run, answers)
    chance = probability(run.student, every)
    found = torch.zeros(())
    for i, first in enumerate(answers):
        for j, second in enumerate(answers):
            pair = judged(run, method, [first, second], [reward[first[0]], reward[second[0]]])
            found = found + chance[i] * chance[j] * step_gradient(run, method, pair)
    value = (sequence_logp(run.student, every).exp() * torch.tensor([reward[a[0]] for a in answers])).sum()
    torch.testing.assert_close(found, -gradient(run.student, value), **CLOSE)
