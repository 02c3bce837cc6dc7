"""Derivatives of the divergences at the student's logits, in closed form and in place, one tile at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surpass.learn.divergence import Divergence
from surpass.learn.fused import expectation

SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Rule:
    """A divergence in one of two forms.

    middle None: `reverse KL(S || T) + forward KL(T || S)`. Otherwise `reverse KL(S || m) + forward KL(T || m)`
    with `m = middle T + (1 - middle) S`.
    """

    reverse: float
    forward: float
    middle: float | None = None

    @property
    def balanced(self) -> bool:
        """Both parts, which only JSD has, weighted as in the mixture: the derivative through m is constant."""
        return bool(self.reverse and self.forward)


def rule(divergence: Divergence) -> Rule:
    kind, p = divergence.kind, divergence.parameter or 0.0
    if kind == "reverse_kl" or (kind, p) in (("skew_reverse_kl", 0), ("rescaled_jsd", 1)):
        return Rule(1.0, 0.0)
    if kind == "forward_kl" or (kind, p) in (("skew_forward_kl", 0), ("rescaled_jsd", 0)):
        return Rule(0.0, 1.0)
    if kind == "mixed_kl":
        return Rule(p, 1 - p)
    if kind == "skew_forward_kl":
        return Rule(0.0, 1.0, p)
    if kind == "skew_reverse_kl":
        return Rule(1.0, 0.0, 1 - p)
    scale = 1.0 if kind == "jsd" else 1 / (p * (1 - p))
    return Rule((1 - p) * scale, p * scale, p)


def slope_to_middle(
    rule: Rule,
    log_s: Tensor,
    log_t: Tensor,
    gaps: bool,
    scratch: list[Tensor],
    sums: Tensor | None,
) -> Tensor:
    """Derivative of the divergence at the student's probabilities, `[c, v]`, up to a constant per token.

    log_s, log_t: normalised log-probs of student and target; overwritten, the second by the result. sums:
    `[2, c]`, where to write this part of the divergence and of the student's expectation of the slope.
    """
    assert rule.middle is not None
    s, t, middle, log_middle, product = scratch
    torch.exp(log_s, out=s)
    torch.exp(log_t, out=t)
    torch.mul(t, rule.middle, out=middle).add_(s, alpha=1 - rule.middle).clamp_min_(SMALLEST)
    torch.log(middle, out=log_middle)
    if sums is not None and rule.forward:
        expectation(t, log_t.sub_(log_middle), gaps, product, sums[0])
        sums[0].mul_(rule.forward)
    slope = log_t.zero_()
    if rule.reverse:
        torch.sub(log_s, log_middle, out=slope)
        if sums is not None:
            expectation(s, slope, gaps, product, sums[1])
            sums[0].add_(sums[1], alpha=rule.reverse)
        slope.mul_(rule.reverse)
    if not rule.balanced:
        through = t if rule.forward else s
        slope.addcdiv_(through, middle, value=(rule.middle - 1) * (rule.forward or rule.reverse))
    if sums is not None:
        expectation(s, slope, gaps, product, sums[1])
    return slope


def at_logits(
    rule: Rule,
    z: Tensor,
    u: Tensor,
    z_normaliser: Tensor,
    u_normaliser: Tensor,
    mean: Tensor,
    gaps: bool,
    scratch: list[Tensor],
) -> Tensor:
    """Gradient `[c, v]` of the divergence at the student's logits z; overwrites z.

    u: the target's logits, or the slope where the rule has a middle. mean: student's expectation of the slope
    (reverse KL itself, without a middle).
    """
    s, t = scratch[:2]
    torch.sub(z, z_normaliser.unsqueeze(-1), out=s).exp_()
    if rule.middle is None and rule.forward:
        torch.sub(u, u_normaliser.unsqueeze(-1), out=t).exp_()
        if not rule.reverse:
            return torch.sub(s, t, out=z)
    if rule.middle is not None:
        slope = torch.sub(u, mean.unsqueeze(-1), out=z)
    else:
        slope = z.sub_(u).sub_((z_normaliser - u_normaliser + mean).unsqueeze(-1))
    if gaps:
        slope.masked_fill_(s == 0, 0.0)
    gradient = slope.mul_(s)
    if rule.middle is None and rule.forward:
        gradient.mul_(rule.reverse).add_(s.sub_(t), alpha=rule.forward)
    return gradient
