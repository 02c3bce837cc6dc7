"""GSPO: GRPO with one importance ratio per answer, clipped as a whole.

    s_i = exp( mean_t (logp_t - old_logp_t) ),   loss_i = max( -A_i s_i, -A_i clip(s_i, 1 - low, 1 + high) )

Source: arXiv 2507.18071. Written in the token form `sg(s_i) * exp(logp_t - sg(logp_t))`, which has the same value and
gradient while the advantage is constant within an answer. The clip range is tiny because s_i is a geometric mean.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from surpass.learn.surrogate import Clipped, gspo
from surpass.methods.grpo import GRPO
from surpass.records import Rollouts


@dataclass(kw_only=True)
class GSPO(GRPO):
    """Group sequence policy optimisation (arXiv 2507.18071)."""

    clip_low: float = 3e-4
    """Sequence ratios below `1 - clip_low` get no gradient where the advantage is negative."""
    clip_high: float = 4e-4
    """Sequence ratios above `1 + clip_high` get no gradient where the advantage is positive."""
    dual_clip: float | None = None
    """Not part of GSPO."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual_clip is not None:
            raise ValueError("GSPO has no dual clip: leave method.dual_clip null")

    def clip(self, batch: Rollouts, logp: Tensor, old: Tensor, advantage: Tensor) -> Clipped:
        del advantage  # constant within an answer: the ratio of the whole answer takes it per answer
        per_answer = batch.sequence["advantage"].to(logp.device)
        trained = batch.mask("trained").to(logp.device)
        return gspo(batch.ragged(logp), old, per_answer, trained, self.clip_low, self.clip_high)
