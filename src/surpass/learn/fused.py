"""The parts of whole-vocabulary quantities: tiles that fit a cache, running sums, derivatives by hand.

A tile is a few tokens by a part of the vocabulary. One sweep over the parts gives log-normalisers, entropies
and KL divergences of the tokens (the running maximum of Milakov & Gimelshein, arXiv 1805.02867); another one
gives the gradient at the logits, in closed form and in place. Nothing here is seen by autograd.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from surpass.learn.divergence import Divergence
from surpass.learn.head import Head
from surpass.learn.targets import Weight, log_linear, log_linear_sampled

LOWEST = torch.finfo(torch.float32).min
SMALLEST = torch.finfo(torch.float32).tiny


def _second_level_cache() -> int:
    """Bytes, as the system states them; 1 MiB where it states none."""
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE") or 1 << 20
    except (ValueError, OSError, AttributeError):
        return 1 << 20


# Bytes of one tile of float32 logits. Four such tiles are in use at once, and an element-wise operation outside
# the cache costs three times one inside it. A GPU wants large matrices instead.
TILE_BYTES = {"cpu": max(_second_level_cache() // 4, 128 << 10), "cuda": 256 << 20}
# Bytes of target logits kept from the first sweep to the last for one slice of tokens, all vocabulary.
KEPT_BYTES = {"cpu": 96 << 20, "cuda": 1 << 30}
# Tokens by which a matrix product runs at full speed, with the vocabulary as the other side.
FEWEST, MOST = 64, 256


def spans(length: int, step: int) -> list[slice]:
    """Slices of at most `step`, at least one (perhaps empty)."""
    return [slice(start, min(start + step, length)) for start in range(0, max(length, 1), step)]


def tiles(tokens: int, vocabulary: int, device: str, chunk: int | None, kept: bool) -> tuple[int, int]:
    """Sides of a tile: tokens, vocabulary. kept: a row of the whole vocabulary is kept for each token."""
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, found {chunk}")
    elements = TILE_BYTES.get(device, TILE_BYTES["cuda"]) // 4
    if chunk is None:
        chunk = MOST if device == "cpu" else 4096
        if kept:
            fitting = KEPT_BYTES.get(device, KEPT_BYTES["cuda"]) // (4 * vocabulary)
            chunk = min(chunk, max(fitting - fitting % 16, 1))
    chunk = max(1, min(chunk, tokens, elements // min(vocabulary, FEWEST)))
    return chunk, max(min(elements // chunk, vocabulary), 1)


def part(head: Head, columns: slice) -> Head:
    """The head of some of the vocabulary."""
    bias = None if head.bias is None else head.bias[columns]
    return replace(head, weight=head.weight[columns], bias=bias)


def has_gaps(heads: Sequence[Head]) -> bool:
    """Whether a logit can be -inf: a head forbids tokens by its bias. Then 0 * inf must be kept out of sums."""
    return any(head.bias is not None and not bool(head.bias.isfinite().all()) for head in heads)


def expectation(p: Tensor, values: Tensor, gaps: bool) -> Tensor:
    """`sum_v p values`, `[c]`, where p = 0 counts as 0 whatever the value."""
    return torch.linalg.vecdot(p, values.masked_fill(p == 0, 0.0) if gaps else values)


class Moments:
    """Sums over the vocabulary for one slice of tokens, each `[c]`, relative to the largest logit so far.

    top: that logit; total: `sum exp(z - top)`; first: `sum exp(z - top) (z - top)`; cross: the same with the
    centred logits of another distribution; best: the token of the largest logit.
    """

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.top = torch.full((tokens,), LOWEST, device=device)
        self.total = torch.zeros(tokens, device=device)
        self.first = torch.zeros(tokens, device=device)
        self.cross = torch.zeros(tokens, device=device)
        self.best = torch.zeros(tokens, dtype=torch.int64, device=device)

    def raise_top(self, logits: Tensor, offset: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Take in the largest logit of a part that starts at token `offset`.

        Gives logits relative to it, their exponentials, and by how much it grew, `[c, v]`, `[c, v]`, `[c]`.
        """
        top = logits.amax(-1)
        higher = top > self.top
        if offset is not None:
            rows = higher.nonzero().squeeze(-1)  # few after the first part, and argmax is slow
            self.best[rows] = logits[rows].argmax(-1) + offset
        top = torch.where(higher, top, self.top)
        growth, self.top = top - self.top, top
        centred = logits - top.unsqueeze(-1)
        return centred, centred.exp(), growth

    def add(self, p: Tensor, centred: Tensor, growth: Tensor, gaps: bool) -> None:
        decay = (-growth).exp()
        self.first = (self.first - self.total * growth) * decay + expectation(p, centred, gaps)
        self.total = self.total * decay + p.sum(-1)

    def add_cross(self, p: Tensor, growth: Tensor, other: Tensor, other_growth: Tensor, gaps: bool) -> None:
        """Before `add`: other, other_growth are the other's centred logits and its growth."""
        kept = (self.cross - self.total * other_growth) * (-growth).exp()
        self.cross = kept + expectation(p, other, gaps)

    @property
    def log_total(self) -> Tensor:
        """Log-normaliser `[c]`, relative to `top`."""
        return self.total.log()

    @property
    def log_normaliser(self) -> Tensor:
        return self.top + self.log_total

    @property
    def entropy(self) -> Tensor:
        return self.log_total - self.first / self.total


def kl(p: Moments, q: Moments) -> Tensor:
    """`KL(p || q)`, `[c]`, from the moments of p (cross with q) and the normaliser of q."""
    return (p.first - p.cross) / p.total - p.log_total + q.log_total


@dataclass(frozen=True)
class Target:
    """A log-linear target over the first `vocabulary` tokens, as logits: normalisers of roles cancel in it.

    Each role is its hidden states `[t, D_i]`, its head and its weight (float, or `[t]`).
    """

    roles: Sequence[tuple[Tensor, Head, Weight]]
    vocabulary: int
    temperature: float
    gaps: bool

    def logits(self, tokens: slice, columns: slice, seen: Sequence[Moments | None] = ()) -> Tensor:
        """`[c, v]`, own memory. seen: gathers the normaliser of those roles that are not None."""
        logits, weights = [], []
        for index, (hidden, head, weight) in enumerate(self.roles):
            z = part(head, columns).logits(hidden[tokens], self.temperature)
            if seen and (moments := seen[index]) is not None:
                centred, p, growth = moments.raise_top(z)
                moments.add(p, centred, growth, self.gaps)
            logits.append(z)
            weights.append(weight[tokens].float() if isinstance(weight, Tensor) else weight)
        if not self.gaps:
            return _weighted_sum(logits, weights)
        combined = log_linear_sampled(logits, weights)
        if bool((combined == torch.inf).any()):
            log_linear(logits, weights)  # raises: the target is infinite
        return combined


def _weighted_sum(logits: Sequence[Tensor], weights: Sequence[Weight]) -> Tensor:
    """`sum_i w_i z_i` of finite logits, in the memory of the first; where w = 0 the logits may be NaN."""
    for index, (z, weight) in enumerate(zip(logits, weights)):
        if isinstance(weight, Tensor):
            z.mul_(weight.unsqueeze(-1))
            z[weight == 0] = 0.0
        elif weight != 1:
            z.mul_(weight)
        if index:
            logits[0].add_(z)
    return logits[0]


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
        """Whether the weights are those of the mixture (JSD): the derivative through m is then constant."""
        return self.middle is not None and self.forward * (1 - self.middle) == self.reverse * self.middle


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
    rule: Rule, student: Tensor, target: Tensor, gaps: bool, sums: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Derivative of the divergence at the student's probabilities, `[c, v]`, up to a constant per token.

    student, target: normalised log-probs; overwritten. sums: also this part of the divergence, `[c]`, and of
    the student's expectation of the slope, `[c]`.
    """
    assert rule.middle is not None
    s, t = student.exp(), target.exp()
    middle = torch.add(t * rule.middle, s, alpha=1 - rule.middle).clamp_min_(SMALLEST)
    log_middle = middle.log()
    value = None
    slope = student.sub_(log_middle)  # log(S / m)
    if sums:
        value = torch.zeros(len(s), device=s.device)
        if rule.reverse:
            value += rule.reverse * expectation(s, slope, gaps)
        if rule.forward:
            value += rule.forward * expectation(t, target.sub_(log_middle), gaps)
    slope = slope.mul_(rule.reverse) if rule.reverse else torch.zeros_like(slope)
    if not rule.balanced:
        through = t.mul_(rule.forward) if rule.forward else s * rule.reverse
        slope.addcdiv_(through, middle, value=rule.middle - 1)
    return slope, value, expectation(s, slope, gaps) if sums else None


def at_logits(
    rule: Rule, z: Tensor, u: Tensor, z_normaliser: Tensor, u_normaliser: Tensor, mean: Tensor, gaps: bool
) -> Tensor:
    """Gradient `[c, v]` of the divergence at the student's logits z; overwrites z.

    u: the target's logits, or the slope where the rule has a middle. mean: student's expectation of the slope
    (reverse KL itself, without a middle).
    """
    s = (z - z_normaliser.unsqueeze(-1)).exp_()
    if rule.middle is not None:
        slope = torch.sub(u, mean.unsqueeze(-1), out=z)
    elif rule.reverse:
        slope = z.sub_(u).sub_((z_normaliser - u_normaliser + mean).unsqueeze(-1))
    else:
        return s.sub_((u - u_normaliser.unsqueeze(-1)).exp_())
    if gaps:
        slope.masked_fill_(s == 0, 0.0)
    gradient = slope.mul_(s)
    if rule.middle is None and rule.reverse != 1:
        gradient.mul_(rule.reverse)
    if rule.middle is None and rule.forward:
        gradient.add_(s, alpha=rule.forward)
        gradient.sub_((u - u_normaliser.unsqueeze(-1)).exp_(), alpha=rule.forward)
    return gradient


@dataclass
class Gradients:
    """Sums of gradients in float32: hidden `[T, D]`, weight `[V, D]`, bias `[V]`, each where it is wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    shaping: Head
    temperature: float
    _rows: Tensor | None = field(default=None)

    @classmethod
    def zeros(cls, hidden: Tensor, head: Head, temperature: float, wanted: Sequence[bool]) -> Gradients:
        def of(tensor: Tensor | None, want: bool) -> Tensor | None:
            return torch.zeros_like(tensor, dtype=torch.float32) if want and tensor is not None else None

        parts = [of(tensor, want) for tensor, want in zip((hidden, head.weight, head.bias), wanted)]
        return cls(*parts, head, temperature)
