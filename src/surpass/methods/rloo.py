"""RLOO: REINFORCE with the other answers' mean reward as baseline.

    A_i = r_i - mean_{j != i} r_j = G / (G - 1) * (r_i - mean(r))

Source: arXiv 2402.14740. The paper treats the whole answer as one action, so token losses are summed per answer
(`sequence_sum`). There is one update per batch; with more, the clipped ratio of the base class applies per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surpass.methods.base import Reduction
from surpass.methods.grpo import GRPO


@dataclass(kw_only=True)
class RLOO(GRPO):
    """REINFORCE leave-one-out (arXiv 2402.14740)."""

    samples: int = 4
    """Answers to each prompt."""
    advantage: Literal["group_standardised", "group_mean", "leave_one_out"] = "leave_one_out"
    """The reward less the mean of the group's other answers."""
    reduction: Reduction = "sequence_sum"
    """Sum over an answer's tokens, mean over answers."""
