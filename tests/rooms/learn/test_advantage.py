import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rooms_learn import close

from surpass.learn.advantage import (
    batch_whitened,
    group_mean,
    group_standardised,
    group_statistics,
    leave_one_out,
    return_to_go,
    zero_variance,
)
from surpass.records import Ragged

EXACT = {"rtol": 0.0, "atol": 1e-12}
ALL = (group_mean, group_standardised, leave_one_out)

# Groups of 1 to 5 rows, rewards on a coarse grid so that equal ones occur, ids not consecutive.
grouped = st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=5), min_size=1, max_size=6)


def rows(groups):
    rewards = torch.tensor([r / 3 for g in groups for r in g], dtype=torch.float64)
    group = torch.tensor([7 * i - 5 for i, g in enumerate(groups) for _ in g])
    return rewards, group


@pytest.mark.parametrize("correct", range(1, 8))
def test_binary_rewards_closed_form(correct):
    size, p = 8, correct / 8
    rewards = torch.tensor([1.0] * correct + [0.0] * (size - correct), dtype=torch.float64)
    found = group_standardised(rewards, torch.zeros(size, dtype=torch.int64), ddof=1, epsilon=0.0)
    close(found[0], math.sqrt((1 - p) * (size - 1) / (p * size)), **EXACT)
    close(found[-1], -math.sqrt(p * (size - 1) / ((1 - p) * size)), **EXACT)


@settings(max_examples=60, deadline=None)
@given(grouped, st.randoms())
def test_group_identities(groups, random):
    rewards, group = rows(groups)
    order = list(range(len(rewards)))
    random.shuffle(order)
    shuffled = torch.tensor(order)
    for advantage in ALL:
        found = advantage(rewards, group)
        sums = torch.zeros(len(groups), dtype=torch.float64).index_add(0, (group + 5) // 7, found)
        close(sums, torch.zeros(len(groups)), rtol=0, atol=1e-9)
        close(advantage(rewards[shuffled], group[shuffled]), found[shuffled], **EXACT)
        assert (found[zero_variance(rewards, group)] == 0).all()
    for i, g in enumerate(groups):
        alone, size = torch.tensor(g, dtype=torch.float64) / 3, len(g)
        mine = group == 7 * i - 5
        close(group_mean(rewards, group)[mine], alone - alone.mean(), **EXACT)
        if size > 1:
            close(leave_one_out(rewards, group)[mine], size / (size - 1) * (alone - alone.mean()), **EXACT)
            others = (alone.sum() - alone) / (size - 1)
            close(leave_one_out(rewards, group)[mine], alone - others, **EXACT)
            for ddof in (0, 1):
                expected = (alone - alone.mean()) / (alone.std(correction=ddof) + 1e-6)
                close(group_standardised(rewards, group, ddof=ddof)[mine], expected, rtol=0, atol=1e-9)


def test_scale_and_shift():
    rewards, group = rows([[1, 2, 0], [3, -1], [0, 0, 1]])
    moved = 5 * rewards + 2
    close(
        group_standardised(moved, group, epsilon=0.0),
        group_standardised(rewards, group, epsilon=0.0),
        **EXACT,
    )
    close(group_mean(moved, group), 5 * group_mean(rewards, group), **EXACT)


def test_not_applicable_rewards_do_not_count():
    nan = torch.nan
    rewards = torch.tensor([1.0, nan, 0.0, 1.0, nan, nan, 0.5, nan])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    kept = ~rewards.isnan()
    for advantage in ALL:
        found = advantage(rewards, group)
        assert torch.equal(found[kept], advantage(rewards[kept], group[kept]))
        assert (found[~kept] == 0).all()
    assert group_statistics(rewards, group).count.tolist() == [3, 3, 3, 3, 0, 0, 1, 1]
    assert zero_variance(rewards, group).tolist() == [False] * 4 + [True] * 4
    close(batch_whitened(rewards)[kept], batch_whitened(rewards[kept]), rtol=1e-6, atol=1e-6)


def test_equal_rewards_give_exactly_nothing():
    # The mean of three times 0.1 is not 0.1 in binary.
    rewards, group = torch.full((3,), 0.1, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    for advantage in ALL:
        assert torch.equal(advantage(rewards, group), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(batch_whitened(rewards), torch.zeros(3, dtype=torch.float64))


def test_whitening_over_tokens():
    values, tokens = torch.tensor([1.0, -1.0, 3.0], dtype=torch.float64), torch.tensor([1, 4, 2])
    spread = torch.repeat_interleave(values, tokens)
    found = batch_whitened(values, tokens, epsilon=0.0)
    close(found, (values - spread.mean()) / spread.std(correction=0), **EXACT)
    ones = torch.ones(3, dtype=torch.int64)
    close(batch_whitened(values, ones), batch_whitened(values), **EXACT)


def test_return_to_go():
    signal = Ragged.from_lengths(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([3, 0, 1]))
    assert return_to_go(signal, 0.5).tolist() == [3.0, 4.0, 4.0, 8.0]
    assert return_to_go(signal, 0.0).tolist() == [1.0, 2.0, 4.0, 8.0]
    with pytest.raises(ValueError, match="requires grad"):
        return_to_go(signal.like(signal.values.requires_grad_()), 0.5)
