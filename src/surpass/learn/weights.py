"""How much each token, answer or prompt counts: selections, shifts and weights, all constants.

Scores of tokens are `[T]`, of answers `[N]`. What is not applicable is NaN and never enters a statistic.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

Statistic = Literal["mean", "minmax"]
Direction = Literal["correct_up", "incorrect_down", "both"]


# -- tokens ---------------------------------------------------------------------------------------------------------


def min_max(values: Tensor, percentile: float = 1.0) -> Tensor:
    """`values` brought to [0, 1] by their least and greatest; all 0 where these are equal.

    percentile: values above this quantile are cut to it first; 1 cuts nothing.
    """
    if not len(values):
        return values
    if percentile < 1:
        rank = max(math.ceil(percentile * len(values)), 1)  # torch.quantile refuses more than 2^24 values
        values = values.clamp(max=values.kthvalue(rank).values)
    low, high = values.min(), values.max()
    if high == low:
        return torch.zeros_like(values)
    return (values - low) / (high - low)


def soft_or(a: Tensor, b: Tensor) -> Tensor:
    """`a + b - a b`: near 1 where either is (TIP, arXiv 2604.14084)."""
    return a + b - a * b


def top_share(scores: Tensor, share: float) -> Tensor:
    """`[T]` bool: the highest `floor(share T)` scores, at least one; of equal scores the earlier token."""
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[torch.argsort(scores, descending=True, stable=True)[: kept_count(len(scores), share)]] = True
    return kept


def drawn_share(weights: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """`[T]` bool: `floor(share T)` tokens (at least one) drawn without replacement, in proportion to `weights`.

    Tokens of weight 0 are taken only when no other is left.
    """
    uniform = torch.rand(len(weights), generator=generator, dtype=torch.float64)
    # The largest log w + Gumbel noise are a draw without replacement, of any size.
    return top_share(weights.double().log() - (-uniform.log()).log(), share)


def kept_count(total: int, share: float) -> int:
    """`floor(share total)`, at least 1 where there is anything; exact for decimal shares (0.29 of 100 is 29)."""
    return min(total, max(1, math.floor(Fraction(str(share)) * total)))


def curvature_gate(log_ratio: Tensor, temperature: float) -> Tensor:
    """`exp(-(e^x - x - 1) / temperature)` in [0, 1]: 1 where the log-ratio `x` is 0 (REOPD, arXiv 2608.11698)."""
    return ((log_ratio - torch.expm1(log_ratio)) / temperature).exp()


# -- answers --------------------------------------------------------------------------------------------------------


def margin_shift(
    returns: Tensor,
    correct: Tensor,
    group: Tensor,
    margin: float,
    statistic: Statistic = "mean",
    direction: Direction = "both",
) -> Tensor:
    """`[N]`: what to add to each answer's return so that correct ones lead by `margin` (Uni-OPD, arXiv 2605.03677).

    returns: `[N]`, non-finite where there is none. correct: `[N]` 1, 0, or NaN where nobody judged. group: `[N]` ids.
    The gap of a group is the statistic of its correct answers (mean, or the least) less that of its incorrect ones
    (mean, or the greatest). Below the margin, the lack is added to the correct, taken from the incorrect, or half
    and half. Exactly 0 elsewhere: other rows, groups with one class only, groups with a gap of at least the margin.
    """
    shift = torch.zeros_like(returns)
    for right, wrong in _classes(returns, correct, group):
        gap = float(_gap(returns[right], returns[wrong], statistic))
        if gap >= margin:
            continue
        share = {"correct_up": 1.0, "incorrect_down": 0.0, "both": 0.5}[direction]
        shift[right] += share * (margin - gap)
        shift[wrong] -= (1 - share) * (margin - gap)
    return shift


def margin_mask(
    returns: Tensor,
    correct: Tensor,
    group: Tensor,
    margin: float,
    statistic: Statistic = "mean",
    least_kept: float = 0.25,
) -> Tensor:
    """`[N]` bool: the answers left when, one by one, those that narrow the gap most are dropped (arXiv 2605.03677).

    Arguments as in `margin_shift`. Each time either the lowest correct or the highest incorrect answer of a group is
    dropped, whichever widens its gap more (the correct one if alike), until the gap is at least the margin or one more
    would leave less than the share `least_kept` of the group. Neither class loses its last answer.
    """
    kept = torch.ones(len(returns), dtype=torch.bool)
    for right, wrong in _classes(returns, correct, group):
        total = len(right) + len(wrong)
        right = right[torch.argsort(returns[right], stable=True)]
        wrong = wrong[torch.argsort(returns[wrong], descending=True, stable=True)]
        # As Python numbers: against a float32 tensor a tiny margin would be rounded to 0 first.
        while float(_gap(returns[right], returns[wrong], statistic)) < margin:
            options = []
            if len(right) > 1:
                options.append((right[1:], wrong))
            if len(wrong) > 1:
                options.append((right, wrong[1:]))
            if not options or len(right) + len(wrong) - 1 < least_kept * total:
                break
            best = max(options, key=lambda o: float(_gap(returns[o[0]], returns[o[1]], statistic)))
            dropped = right[0] if len(best[0]) < len(right) else wrong[0]
            kept[dropped] = False
            right, wrong = best
    return kept


def balanced(correct: Tensor, group: Tensor, ratio: float, generator: torch.Generator) -> Tensor:
    """`[N]` bool: answers left when the class in excess is thinned at random to `ratio` correct per incorrect one.

    correct: `[N]` 1, 0, or NaN where nobody judged (kept, not counted). ratio 0 keeps the incorrect alone, infinity
    the correct alone; in between each class keeps at least one. Groups with one class only are left whole
    (Uni-OPD, arXiv 2605.03677).
    """
    kept = torch.ones(len(correct), dtype=torch.bool)
    rank = torch.rand(len(correct), generator=generator)
    for right, wrong in _classes(torch.zeros_like(correct), correct, group):
        for rows, wanted in ((right, ratio * len(wrong)), (wrong, len(right) / ratio if ratio else math.inf)):
            keep = min(len(rows), wanted if wanted in (0, math.inf) else max(1, round(wanted)))
            kept[rows[torch.argsort(rank[rows])[int(keep) :]]] = False
    return kept


def softmax_weights(reward: Tensor, temperature: float) -> Tensor:
    """`[N]` `N softmax(reward / temperature)`, mean 1; NaN rewards (not judged) get 0 and do not count in N."""
    judged = ~reward.isnan()
    logits = (reward / temperature).masked_fill(~judged, -torch.inf)
    if not bool(judged.any()):
        return torch.zeros_like(reward)
    return judged.sum() * logits.softmax(0)


def _classes(returns: Tensor, correct: Tensor, group: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Row indices of the correct and of the incorrect answers of each group that has both."""
    known = returns.isfinite() & ~correct.isnan()
    found = []
    for g in group[known].unique():
        rows = known & (group == g)
        right, wrong = ((rows & (correct == c)).nonzero().squeeze(1) for c in (1, 0))
        if len(right) and len(wrong):
            found.append((right, wrong))
    return found


def _gap(right: Tensor, wrong: Tensor, statistic: Statistic) -> Tensor:
    return right.mean() - wrong.mean() if statistic == "mean" else right.min() - wrong.max()


# -- prompts --------------------------------------------------------------------------------------------------------


def beta_kernel(pass_rate: Tensor, alpha: float, beta: float) -> Tensor:
    """`p^alpha (1 - p)^beta`, its greatest at `alpha / (alpha + beta)`; `0^0` is 1 (PACED, arXiv 2603.11178)."""
    return pass_rate.pow(alpha) * (1 - pass_rate).pow(beta)
