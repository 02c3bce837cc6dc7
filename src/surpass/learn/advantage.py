"""From rewards to advantages, by groups of answers to one prompt.

rewards `[N]`, group `[N]` int64 (any ids, groups of any size) -> advantages `[N]`, constants. A NaN reward
means "not applicable": it is left out of every statistic and gets advantage 0. Take statistics on whole
groups, before any row is dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from surpass.learn.sampled import token_signal
from surpass.records import Ragged


class GroupStatistics(NamedTuple):
    """Of each row's group, `[N]` each, over its applicable rewards: count, mean, varied (rewards are not all
    equal).
    """

    count: Tensor
    mean: Tensor
    varied: Tensor


def group_statistics(rewards: Tensor, group: Tensor) -> GroupStatistics:
    """Statistics of the groups, handed to every row. A group without an applicable reward has count 0 and
    mean 0.
    """
    applicable = ~token_signal(rewards).isnan()
    groups, index = torch.unique(group, return_inverse=True)
    sums = rewards.new_zeros(len(groups)).index_add(0, index, rewards.masked_fill(~applicable, 0.0))
    count = rewards.new_zeros(len(groups)).index_add(0, index, applicable.to(rewards.dtype))
    mean = sums / count.clamp(min=1)
    highest = rewards.new_full((len(groups),), -torch.inf)
    highest = highest.scatter_reduce(0, index, rewards.masked_fill(~applicable, -torch.inf), reduce="amax")
    lowest = rewards.new_full((len(groups),), torch.inf)
    lowest = lowest.scatter_reduce(0, index, rewards.masked_fill(~applicable, torch.inf), reduce="amin")
    return GroupStatistics(count[index], mean[index], (highest > lowest)[index])


def zero_variance(rewards: Tensor, group: Tensor) -> Tensor:
    """`[N]` bool: rows of groups whose applicable rewards are all equal (or fewer than two): they teach
    nothing.
    """
    return ~group_statistics(rewards, group).varied


def group_mean(rewards: Tensor, group: Tensor) -> Tensor:
    """`r - mean` of the group (Dr.GRPO, arXiv 2503.20783). Exactly 0 where all rewards of the group are
    equal.
    """
    return _deviation(rewards, group_statistics(rewards, group))


def group_standardised(rewards: Tensor, group: Tensor, ddof: int = 1, epsilon: float = 1e-6) -> Tensor:
    """`(r - mean) / (std + epsilon)` of the group (GRPO, arXiv 2402.03300).

    ddof: 1 is the unbiased deviation of the released implementations, 0 the population's. A group of one has
    no baseline and no deviation: its advantage is 0 (some implementations hand the bare reward through
    instead).
    """
    statistics = group_statistics(rewards, group)
    deviation = _deviation(rewards, statistics)
    _, index = torch.unique(group, return_inverse=True)
    squares = torch.zeros_like(deviation).index_add(0, index, deviation.square())[index]
    std = (squares / (statistics.count - ddof).clamp(min=1)).sqrt()
    return deviation / (std + epsilon)


def leave_one_out(rewards: Tensor, group: Tensor) -> Tensor:
    """`r - mean of the others` = `G / (G - 1) (r - mean)` (RLOO, arXiv 2402.14740); 0 for a group of one."""
    statistics = group_statistics(rewards, group)
    factor = statistics.count / (statistics.count - 1).clamp(min=1)
    return factor * _deviation(rewards, statistics)


def batch_whitened(values: Tensor, weight: Tensor | None = None, epsilon: float = 1e-6) -> Tensor:
    """`(v - mean) / (std + epsilon)` over the whole batch, population deviation.

    weight: `[N]` trained tokens of each row, to whiten over tokens as REINFORCE++ (arXiv 2501.03262) does;
    None counts rows. NaN values are left out and get 0. All values equal gives 0.
    """
    applicable = ~token_signal(values).isnan()
    weight = torch.ones_like(values) if weight is None else weight.to(values.dtype)
    weight = weight * applicable
    known = values.masked_fill(~applicable, 0.0)
    total = weight.sum().clamp(min=torch.finfo(values.dtype).tiny)
    deviation = known - (weight * known).sum() / total
    counted = weight > 0
    if bool(counted.any()) and known[counted].amin() == known[counted].amax():
        deviation = torch.where(counted, torch.zeros_like(deviation), deviation)
    std = ((weight * deviation.square()).sum() / total).sqrt()
    return (deviation / (std + epsilon)).masked_fill(~applicable, 0.0)


def return_to_go(signal: Ragged, discount: float) -> Tensor:
    """`[T]`: `sum_{t' >= t} discount^(t' - t) signal_t'` within each sequence; discount 0 gives the signal
    itself.
    """
    token_signal(signal.values)
    return signal.suffix_sum(discount)


def _deviation(rewards: Tensor, statistics: GroupStatistics) -> Tensor:
    # Rounding of the mean must not invent a signal in a group without one, so those rows are set to 0, not
    # computed.
    used = statistics.varied & ~rewards.isnan()
    return torch.where(used, rewards - statistics.mean, torch.zeros_like(rewards))
