"""Divergences on a few tokens of the vocabulary: which tokens, what becomes of the rest, what is measured.

Three separate choices. Owner: whose top-k the support is. Tail: what happens to the mass outside,
- `drop`: it is ignored. The two sides stay sub-distributions, the value may be negative, and reverse KL has a
  gradient
  that moves mass in or out of the support;
- `renormalise`: both sides become distributions on the support. The mass outside gets no gradient at all;
- `bucket`: the mass outside becomes one more token. Nothing is lost but the differences inside the tail.
  Log-probs
  are rounded, so a tail below the machine epsilon of the dtype counts as epsilon on either side.
Direction: a `Divergence`. Nothing is clamped at 0: a clamp would end the gradient just where the truncation
hurts.

A log-linear target `log q = sum_i w_i log p_i - log Z` is formed after the restriction of its roles. Under
`renormalise` that is exactly the full target conditioned on the support. Under `bucket` the tail's weight is
`prod_i tail_i^{w_i}`, an approximation of the sum over the tail of `prod_i p_i^{w_i}`. Under `drop` the
values on the support need the `log Z` of the whole vocabulary, which must be handed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from surpass.learn.divergence import Divergence
from surpass.learn.targets import Weight, log_linear, log_linear_sampled

Owner = Literal["student", "teacher", "union", "intersection", "difference"]
Tail = Literal["drop", "renormalise", "bucket"]


class Support(NamedTuple):
    """ids: `[t, K]` token ids; valid: `[t, K]` bool, False at slots that repeat another or are not in the
    support.
    """

    ids: Tensor
    valid: Tensor


class TopKDivergence(NamedTuple):
    """value: `[t]` nats; student_mass, target_mass: `[t]` probability that falls in the support, detached."""

    value: Tensor
    student_mass: Tensor
    target_mass: Tensor


def choose_support(student_logp: Tensor, teacher_logp: Tensor, k: int, owner: Owner) -> Support:
    """Top-k tokens of `[t, V]` log-probs: K = k, or 2k for the union. Raises ValueError unless 1 <= k <=
    V.
    """
    if not 1 <= k <= student_logp.shape[-1]:
        raise ValueError(f"k must be between 1 and the vocabulary of {student_logp.shape[-1]}, found {k}")
    student_ids = student_logp.detach().topk(k).indices
    teacher_ids = teacher_logp.detach().topk(k).indices
    return combine_support(student_ids, teacher_ids, owner)


def combine_support(student_ids: Tensor, teacher_ids: Tensor, owner: Owner) -> Support:
    """Support from the top-k ids `[t, k]` of either side. Ids of the intersection are a subset of the
    student's; the difference is the union without the intersection.
    """
    if owner == "student":
        return Support(student_ids, torch.ones_like(student_ids, dtype=torch.bool))
    if owner == "teacher":
        return Support(teacher_ids, torch.ones_like(teacher_ids, dtype=torch.bool))
    same = student_ids.unsqueeze(-1) == teacher_ids.unsqueeze(-2)
    if owner == "intersection":
        return Support(student_ids, same.any(-1))
    if owner == "union":
        first = torch.ones_like(student_ids, dtype=torch.bool)
        return Support(torch.cat([student_ids, teacher_ids], -1), torch.cat([first, ~same.any(-2)], -1))
    if owner == "difference":
        return Support(
            torch.cat([student_ids, teacher_ids], -1), torch.cat([~same.any(-1), ~same.any(-2)], -1)
        )
    raise ValueError(
        f"unknown support owner {owner!r}; choose student, teacher, union, intersection or difference"
    )


def restrict(logp: Tensor, valid: Tensor, tail: Tail) -> Tensor:
    """Log-probs `[t, K]` of the whole vocabulary, made into what the tail policy says: `[t, K]`, bucket `[t,
    K + 1]`.

    Invalid slots get -inf. A row without any valid slot has no mass, so every divergence on it is 0 (for
    `bucket` all of it is in the bucket).
    """
    kept = logp.masked_fill(~valid, -torch.inf)
    if tail == "drop":
        return kept
    empty = ~valid.any(-1, keepdim=True)
    # The shift of empty rows is never used, but logsumexp of nothing would have a NaN gradient.
    total = torch.logsumexp(kept.masked_fill(empty, 0.0), dim=-1, keepdim=True)
    if tail == "renormalise":
        return kept - total
    if tail == "bucket":
        epsilon = torch.finfo(logp.dtype).eps
        outside = (-torch.expm1(total)).masked_fill(empty, 1.0).clamp(min=epsilon)
        return torch.cat([kept, outside.log()], dim=-1)
    raise ValueError(f"unknown tail policy {tail!r}; choose drop, renormalise or bucket")


def top_k_divergence(
    divergence: Divergence, student_logp: Tensor, target_logp: Tensor, valid: Tensor, tail: Tail
) -> TopKDivergence:
    """`divergence` between student and one target, both given as log-probs `[t, K]` of the whole vocabulary
    on a support.

    With K = V every tail policy gives the full divergence and its gradient. The value is a loss to
    differentiate, not an advantage.
    """
    return top_k_log_linear_divergence(divergence, student_logp, [target_logp], [1.0], valid, tail)


def top_k_log_linear_divergence(
    divergence: Divergence,
    student_logp: Tensor,
    target_logps: Sequence[Tensor],
    weights: Sequence[Weight],
    valid: Tensor,
    tail: Tail,
    log_normaliser: Tensor | None = None,
) -> TopKDivergence:
    """The same for a log-linear target over roles, each `[t, K]` on the support; see the top of the file for
    the tails.

    log_normaliser: `[t]` `log Z` of the whole vocabulary, read by `drop` alone and needed there unless one
    role stands alone with weight 1 (ValueError).
    target_mass is that of the restricted target under `drop` and `bucket`; under `renormalise` the target's
    mass outside is unknown for several roles, so the least mass any used role has in the support is given.
    """
    used = [
        (logp, weight)
        for logp, weight in zip(target_logps, weights, strict=True)
        if isinstance(weight, Tensor) or weight != 0
    ]
    logps, weights = [logp for logp, _ in used], [weight for _, weight in used]
    plain = len(used) == 1 and not isinstance(weights[0], Tensor) and weights[0] == 1
    student = restrict(student_logp, valid, tail)
    if tail != "drop":
        target = log_linear([restrict(logp, valid, tail) for logp in logps], weights)
    elif plain:
        target = restrict(logps[0], valid, tail)
    elif log_normaliser is None:
        raise ValueError(
            "tail='drop' with a log-linear target needs its log_normaliser over the whole vocabulary, found "
            "none; hand it "
            "in, or choose tail='renormalise' or 'bucket'"
        )
    else:
        target = restrict(log_linear_sampled(logps, weights) - log_normaliser.unsqueeze(-1), valid, tail)
    if tail == "renormalise":
        target_mass = torch.stack([_mass(logp, valid) for logp in logps]).amin(0)
    else:
        target_mass = _mass(target[..., : valid.shape[-1]], valid)
    return TopKDivergence(divergence(student, target), _mass(student_logp, valid), target_mass)


def support_policy_gradient(
    student_logp: Tensor,
    target_logp: Tensor,
    valid: Tensor,
    weighting: Literal["student", "teacher", "uniform"] = "student",
    log_ratio: Literal["raw", "renormalised"] = "raw",
    normalised: bool = True,
) -> Tensor:
    """Loss `[t]` with gradient `sum_k w_k (log p_k - log q_k) grad log p_k`, all but the last factor
    constant.

    The loss of Rethinking OPD (arXiv 2604.13016): `w` is a softmax over the support of the student's or the
    teacher's log-probs, or 1; with `normalised` False their probabilities as they are. The released code
    takes the log-ratio `raw`, the paper renormalises both sides in it. Both differ from the exact gradient on
    a support, `top_k_divergence(reverse_kl, tail="renormalise")`; all agree at K = V with the student's
    weights. The value is `sum_k w_k (log p_k - log q_k)`.
    """
    student, target = student_logp.detach(), target_logp.detach()
    weights = {"student": student, "teacher": target, "uniform": None}[weighting]
    tail: Tail = "renormalise" if normalised else "drop"
    weight = valid.to(student.dtype) if weights is None else restrict(weights, valid, tail).exp()
    if log_ratio == "renormalised":
        student, target = restrict(student, valid, "renormalise"), restrict(target, valid, "renormalise")
    signal = torch.where(valid, weight * (student - target), torch.zeros_like(student))
    # exp(x - sg(x)) is 1 with gradient 1: the policy-gradient form keeps the value of the signal.
    return (signal * (student_logp - student_logp.detach()).exp()).sum(-1)


def overlap(student_ids: Tensor, teacher_ids: Tensor) -> Tensor:
    """Share of the student's top-k `[t, k]` that is in the teacher's, `[t]` in [0, 1]; rises in runs that
    succeed (2604.13016).
    """
    return (student_ids.unsqueeze(-1) == teacher_ids.unsqueeze(-2)).any(-1).float().mean(-1)


def _mass(logp: Tensor, valid: Tensor) -> Tensor:
    return logp.detach().exp().masked_fill(~valid, 0.0).sum(-1)
