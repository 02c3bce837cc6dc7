"""Policy-gradient losses per token, `[T]`, not averaged (`aggregate` owns that).

logp: the student's, with gradient. old_logp: of the policy the ratio is taken against, a constant. advantage:
a constant. A token without an old_logp or advantage (NaN, such as one nobody drew) gets the value NaN and no
gradient: harmless outside the mask, loud inside it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from surpass.learn.sampled import token_signal
from surpass.records import Ragged

# exp(20) is 5e8: any ratio beyond is a numerical accident, and clamping keeps it finite.
LOG_RATIO_LIMIT = 20.0


class Clipped(NamedTuple):
    """loss: `[T]`; clipped: `[T]` bool, the tokens whose gradient the clip has removed."""

    loss: Tensor
    clipped: Tensor


def reinforce(logp: Tensor, advantage: Tensor) -> Tensor:
    """`-A log p`, whose gradient is the on-policy gradient `-A grad log p`."""
    known, _, advantage = _known(logp, logp, advantage)
    return _where_known(known, -advantage * logp)


def importance_sampling(logp: Tensor, old_logp: Tensor, advantage: Tensor) -> Tensor:
    """`-A p / p_old`, not clipped; on-policy its gradient is that of `reinforce`."""
    known, old_logp, advantage = _known(logp, old_logp, advantage)
    return _where_known(known, -advantage * _ratio(logp, old_logp))


def ppo_clip(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    low: float = 0.2,
    high: float = 0.2,
    dual: float | None = None,
) -> Clipped:
    """`max(-A rho, -A clip(rho, 1 - low, 1 + high))`, `rho = p / p_old` (arXiv 1707.06347; low != high: DAPO,
    2503.14476).

    dual: where A < 0 the loss is at most `-A dual` (arXiv 1912.09729), None for no such bound; must be > 1.
    The gradient of a token is exactly 0 iff A > 0 and rho > 1 + high, or A < 0 and
    (rho < 1 - low or rho > dual).
    """
    if dual is not None and dual <= 1:
        raise ValueError(f"the dual clip bounds ratios above 1, found {dual}; use a value such as 3, or None")
    known, old_logp, advantage = _known(logp, old_logp, advantage)
    ratio = _ratio(logp, old_logp)
    loss, clipped = _clip(ratio, advantage, low, high)
    if dual is not None:
        bounded = (advantage < 0) & (ratio > dual)
        loss = torch.where(bounded, -advantage * dual, loss)
        clipped = clipped | bounded
    return Clipped(_where_known(known, loss), clipped & known)


def gspo(
    logp: Ragged, old_logp: Tensor, advantage: Tensor, mask: Tensor, low: float = 3e-4, high: float = 4e-4
) -> Clipped:
    """GSPO (arXiv 2507.18071) in its token form: the ratio that is clipped is that of the whole sequence.

    logp: `[T]` by sequence; advantage: `[N]`; mask: `[T]` bool, the tokens the ratio is averaged over. Each
    token's ratio is `sg(s_i) exp(logp - sg(logp))`, `s_i` the geometric mean of the row's ratios: under
    `sequence_mean` value and gradient are those of the sequence form. Tokens outside the mask get NaN and no
    gradient.
    """
    known, old_logp, advantage = _known(logp.values, old_logp, logp.expand(advantage))
    known = known & mask
    difference = torch.where(known, logp.values.detach() - old_logp, torch.zeros_like(old_logp))
    count = logp.like(known.to(difference.dtype)).sum().clamp(min=1)
    sequence = (logp.like(difference).sum() / count).clamp(max=10.0).exp()
    ratio = logp.expand(sequence) * (logp.values - logp.values.detach()).exp()
    loss, clipped = _clip(ratio, advantage, low, high)
    return Clipped(_where_known(known, loss), clipped & known)


def truncated_importance_weight(old_logp: Tensor, sampler_logp: Tensor, cap: float) -> Tensor:
    """`min(p_old / p_sampler, cap)`, `[T]`, detached: corrects a token's loss for a sampler that is not quite
    the policy.

    A token nobody drew (NaN sampler_logp) has no such weight and gets 0, so it can not take part. Raises
    ValueError unless cap > 0.
    """
    if cap <= 0:
        raise ValueError(f"the cap of an importance weight must be above 0, found {cap}")
    log_ratio = (old_logp - sampler_logp).detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.where(log_ratio.isnan(), torch.zeros_like(log_ratio), log_ratio.exp().clamp(max=cap))


def _clip(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Clipped:
    clipped = ((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - low))
    return Clipped(torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high)), clipped)


def _ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    return (logp - old_logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _known(logp: Tensor, old_logp: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Constants with their NaN taken out, because NaN times a zero gradient is NaN; and where there was
    none.
    """
    old_logp, advantage = old_logp.detach(), token_signal(advantage)
    known = ~(old_logp.isnan() | advantage.isnan())
    old_logp = torch.where(known, old_logp, logp.detach())
    return known, old_logp, torch.where(known, advantage, torch.zeros_like(advantage))


def _where_known(known: Tensor, loss: Tensor) -> Tensor:
    return torch.where(known, loss, torch.full_like(loss, torch.nan))
