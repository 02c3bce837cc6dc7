"""The parts of whole-vocabulary quantities: tiles that fit a cache, running sums, derivatives by hand.

A tile is a few tokens by a part of the vocabulary. One sweep over the parts gives log-normalisers, entropies
and KL divergences of the tokens, each part relative to its own maximum (as in arXiv 1805.02867); another one
gives the gradient at the logits, in closed form and in place. Nothing here is seen by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from surpass.learn.head import Head
from surpass.learn.targets import Weight, log_linear, log_linear_sampled

LOWEST = torch.finfo(torch.float32).min

# Bytes of one tile of float32 logits. About four such tiles are in use at once, and an element-wise operation
# outside a processor's second-level cache (1 to 2 MB) costs three times one inside it. A constant, not the size
# of the cache found: results must not differ in the last bit between machines. A GPU wants large matrices.
TILE_BYTES = {"cpu": 512 << 10, "cuda": 256 << 20}
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
    width = elements // chunk
    return chunk, max(min(width - width % 64 or width, vocabulary), 1)


def cut(head: Head, columns: Sequence[slice]) -> list[Head]:
    """The head in parts of the vocabulary."""
    biases = [None if head.bias is None else head.bias[part] for part in columns]
    return [replace(head, weight=head.weight[part], bias=bias) for part, bias in zip(columns, biases)]


def fill(out: Tensor, head: Head, hidden: Tensor, temperature: float) -> Tensor:
    """`Head.logits` into out, `[c, v]`, sparing copies where nothing follows the product."""
    if head.bias is not None or head.softcap is not None or not head.scale == 1.0 == temperature:
        return out.copy_(head.logits(hidden, temperature))
    hidden = hidden.to(head.weight.dtype)
    if head.weight.dtype == out.dtype:
        return torch.mm(hidden, head.weight.T, out=out)
    return out.copy_(hidden @ head.weight.T)


def has_gaps(heads: Sequence[Head]) -> bool:
    """Whether a logit can be -inf: a head forbids tokens by its bias. Then 0 * inf must be kept out of sums."""
    return any(head.bias is not None and not bool(head.bias.isfinite().all()) for head in heads)


class Scratch:
    """Tile-sized memory, used over and over so that it stays in the cache."""

    def __init__(self, count: int, elements: int, device: torch.device) -> None:
        self.elements = elements
        self._memory = torch.empty(count, elements, device=device)
        self._views: dict[tuple[int, int], list[Tensor]] = {}

    def tiles(self, tokens: int, vocabulary: int) -> list[Tensor]:
        """`[tokens, vocabulary]` each; what they hold is anything."""
        if (tokens, vocabulary) not in self._views:
            used = self._memory[:, : tokens * vocabulary]
            self._views[tokens, vocabulary] = [flat.view(tokens, vocabulary) for flat in used]
        return self._views[tokens, vocabulary]


def expectation(p: Tensor, values: Tensor, gaps: bool, scratch: Tensor, out: Tensor) -> None:
    """`sum_v p values` into out, `[c]`; p = 0 counts as 0 whatever the value."""
    torch.mul(p, values, out=scratch)
    if gaps:
        scratch.masked_fill_(p == 0, 0.0)
    torch.sum(scratch, -1, out=out)


class Sums:
    """Sums over the vocabulary for c tokens, a row `[c]` for each part, relative to its largest logit.

    top: that logit; total: `sum exp(z - top)`; first: `sum exp(z - top) (z - top)`; cross: the same with the
    logits of another distribution, relative to its own top. best: the token of the largest logit of all.
    """

    def __init__(self, parts: int, tokens: int, device: torch.device) -> None:
        self.top, self.total, self.first, self.cross = torch.zeros(4, parts, tokens, device=device).unbind()
        self.best = torch.zeros(tokens, dtype=torch.int64, device=device)
        self._largest = torch.full((tokens,), -torch.inf, device=device)

    def centre(self, index: int, logits: Tensor, out: Tensor) -> Tensor:
        """Part `index` of the logits, relative to the largest there, into out (may be logits)."""
        top = torch.amax(logits, -1, out=self.top[index]).clamp_min_(LOWEST)
        return torch.sub(logits, top.unsqueeze(-1), out=out)

    def find_best(self, index: int, logits: Tensor, offset: int) -> None:
        """After `centre`, before logits are overwritten. Few rows after the first part, for argmax is slow."""
        rows = (self.top[index] > self._largest).nonzero().squeeze(-1)
        self.best[rows] = logits[rows].argmax(-1).add_(offset)
        torch.maximum(self._largest, self.top[index], out=self._largest)

    def add(self, index: int, centred: Tensor, gaps: bool, p: Tensor, scratch: Tensor) -> Tensor:
        """Fills and gives p, the exponentials of centred logits."""
        torch.exp(centred, out=p)
        torch.sum(p, -1, out=self.total[index])
        expectation(p, centred, gaps, scratch, self.first[index])
        return p

    def combine(self) -> Moments:
        top = self.top.amax(0)
        lower = self.top - top
        decay = lower.exp()
        first = ((self.first + self.total * lower) * decay).sum(0)
        return Moments(top, (self.total * decay).sum(0), first)

    def combine_cross(self, other: Sums) -> Tensor:
        """`sum exp(z - top) (u - top of u)`, `[c]`, with the logits u that `other` saw."""
        lower = other.top - other.top.amax(0)
        return ((self.cross + self.total * lower) * (self.top - self.top.amax(0)).exp()).sum(0)


class Moments(NamedTuple):
    """Sums over all of the vocabulary, `[c]`; see `Sums`."""

    top: Tensor
    total: Tensor
    first: Tensor

    @property
    def log_normaliser(self) -> Tensor:
        return self.top + self.total.log()

    @property
    def entropy(self) -> Tensor:
        return self.total.log() - self.first / self.total


def kl(p: Moments, q: Moments, cross: Tensor) -> Tensor:
    """`KL(p || q)`, `[c]`. cross: of p with q, see `Sums.combine_cross`."""
    return (p.first - cross) / p.total - p.total.log() + q.total.log()


class Gradients:
    """Sums of gradients in float32: hidden `[T, D]`, weight `[V, D]`, bias `[V]`, each where it is wanted."""

    def __init__(self, hidden: Tensor, head: Head, temperature: float, wanted: Sequence[bool]) -> None:
        parts = (hidden, head.weight, head.bias)
        sums = [
            torch.zeros_like(like, dtype=torch.float32) if want and like is not None else None
            for like, want in zip(parts, wanted)
        ]
        self.hidden, self.weight, self.bias = sums
        self._from, self._head = hidden, head
        self._factor = head.scale / temperature
        self._to_cap = None if head.softcap is None else temperature / head.softcap

    @property
    def wanted(self) -> bool:
        return any(sums is not None for sums in (self.hidden, self.weight, self.bias))

    def shaping(self, logits: Tensor) -> Tensor | None:
        """Derivative of soft-capping at those logits, taken before they are overwritten; None without."""
        return None if self._to_cap is None else 1 - (logits * self._to_cap).square_()

    def add(
        self, at_logits: Tensor, shaping: Tensor | None, tokens: slice, columns: slice, weights: Tensor | None
    ) -> None:
        """Take in the gradient `[c, v]` of one tile. weights: `[c]`, of the tokens in the sums over tokens."""
        at_product = at_logits if shaping is None else at_logits.mul_(shaping)
        matrix = self._head.weight[columns]
        low = at_product.to(matrix.dtype)
        if self.hidden is not None:
            _add_product(self.hidden[tokens], low, matrix, self._factor)
        if self.weight is not None:
            inputs = self._from[tokens].to(matrix.dtype)
            inputs = inputs if weights is None else inputs * weights.unsqueeze(-1).to(matrix.dtype)
            _add_product(self.weight[columns], low.T, inputs, self._factor)
        if self.bias is not None:
            total = at_product.sum(0) if weights is None else weights @ at_product
            self.bias[columns].add_(total, alpha=self._factor)


def _add_product(total: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """`total += factor * left @ right`, the sum in float32."""
    if right.dtype == torch.float32:
        total.addmm_(left, right, alpha=factor)
    else:
        total.add_(left @ right, alpha=factor)


@dataclass(frozen=True)
class Target:
    """A log-linear target over the first `vocabulary` tokens, as logits: normalisers of roles cancel in it.

    Each role is its hidden states `[t, D_i]`, its head and its weight (float, or `[t]`).
    """

    roles: Sequence[tuple[Tensor, Head, Weight]]
    vocabulary: int
    temperature: float
    gaps: bool

    def cut(self, columns: Sequence[slice]) -> list[list[Head]]:
        """The heads of all roles for each part of the vocabulary."""
        return [list(heads) for heads in zip(*(cut(head, columns) for _, head, _ in self.roles))]

    def fill(
        self,
        out: Tensor,
        heads: Sequence[Head],
        tokens: slice,
        scratch: Tensor,
        read: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Logits into out, `[c, v]`. heads: of the roles, one part. read: is shown every role's own logits."""
        logits = []
        weights = [w[tokens].float() if isinstance(w, Tensor) else w for _, _, w in self.roles]
        for index, ((hidden, _, _), head, weight) in enumerate(zip(self.roles, heads, weights)):
            memory = out if index == 0 else torch.empty_like(out) if self.gaps else scratch
            z = fill(memory, head, hidden[tokens], self.temperature)
            if read is not None:
                read(index, z)
            if self.gaps:
                logits.append(z)
            elif isinstance(weight, Tensor):
                z.mul_(weight.unsqueeze(-1))
                z[weight == 0] = 0.0  # what is not read may be NaN
            elif weight != 1:
                z.mul_(weight)
            if index and not self.gaps:
                out.add_(z)
        if self.gaps:
            combined = log_linear_sampled(logits, weights)
            if bool((combined == torch.inf).any()):
                log_linear(logits, weights)  # raises: the target is infinite
            out.copy_(combined)
        return out
