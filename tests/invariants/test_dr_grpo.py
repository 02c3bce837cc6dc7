"""Dr. GRPO (arXiv 2503.20783): no division by the deviation, none by the answer's own length."""

import pytest
import torch
from grouped import judged
from world import CLOSE, gradient, step_gradient, token_logp, world

from surpass.methods.dr_grpo import DrGRPO
from surpass.methods.grpo import GRPO

EQUAL = [[0, 1], [1, 1], [2, 0], [0, 3]]
UNEQUAL = [[0, 1], [1], [3], [0, 3]]
REWARDS = [1.0, 0.0, 0.25, 1.0]


def test_advantage_is_the_reward_less_the_mean_and_scales_with_it():
    found = judged(world(), DrGRPO(), EQUAL, REWARDS).sequence["advantage"]
    torch.testing.assert_close(found, torch.tensor([0.4375, -0.5625, -0.3125, 0.4375]))
    doubled = judged(world(), DrGRPO(), EQUAL, [2 * r + 1 for r in REWARDS]).sequence["advantage"]
    torch.testing.assert_close(doubled, 2 * found)


def test_equal_lengths_give_grpo_times_deviation_and_length_over_horizon():
    run, horizon, epsilon = world(), 50, 1e-6
    grpo, dr = GRPO(epsilon=epsilon), DrGRPO(horizon=horizon)
    expected = step_gradient(run, grpo, judged(run, grpo, EQUAL, REWARDS))
    factor = (torch.tensor(REWARDS).std() + epsilon) * 2 / horizon
    found = step_gradient(run, dr, judged(run, dr, EQUAL, REWARDS))
    # The gradients are small by the horizon: compare them at the scale of the tolerance.
    torch.testing.assert_close(found * horizon, factor * expected * horizon, **CLOSE)


def test_every_token_weighs_one_over_answers_times_horizon():
    run, dr = world(), DrGRPO(horizon=10)
    batch = judged(run, dr, UNEQUAL, REWARDS)
    advantage = batch.response.expand(batch.sequence["advantage"])
    expected = gradient(run.student, -(advantage * token_logp(run.student, batch)).sum() / (4 * 10))
    torch.testing.assert_close(step_gradient(run, dr, batch), expected, **CLOSE)


@pytest.mark.parametrize("settings", [{"horizon": None}, {"reduction": "token_mean"}], ids=str)
def test_horizon_and_reduction_go_together(settings):
    with pytest.raises(ValueError, match=r"method\.horizon is the constant length"):
        DrGRPO(**settings)
