"""Dr. GRPO: GRPO without its two biases, the division by the group's standard deviation and by the answer's length.

    A_i = r_i - mean(r),     loss = sum over all tokens / (answers * constant horizon)

Source: arXiv 2503.20783.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surpass.methods.base import Reduction
from surpass.methods.grpo import GRPO


@dataclass(kw_only=True)
class DrGRPO(GRPO):
    """GRPO with mean-only advantages and a constant denominator (arXiv 2503.20783)."""

    advantage: Literal["group_standardised", "group_mean", "leave_one_out"] = "group_mean"
    """The reward less its group's mean."""
    reduction: Reduction = "constant_length"
    """Sum over tokens divided by answers times `horizon`."""
    horizon: int | None = 3000
    """The constant length in tokens; the paper's is its longest answer."""
