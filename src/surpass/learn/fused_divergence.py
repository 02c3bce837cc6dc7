"""The divergence from a log-linear target over the whole vocabulary, with its gradient by hand.

For a slice of tokens the vocabulary is swept once for the sums (and once more where the divergence goes through
a mixture), then for the gradient. In between the target's logits are kept and the student's made again: that
costs one small product, and room for twice the tokens makes all products faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from surpass.learn.derivatives import Rule, at_logits, slope_to_middle
from surpass.learn.fused import Gradients, Scratch, Sums, Target, cut, expectation, fill, kl, spans, tiles
from surpass.learn.head import Head


class _Constants(NamedTuple):
    """What the gradient of a token needs beside its logits, each `[c]`: see `at_logits`."""

    student: Tensor
    target: Tensor
    mean: Tensor


class _Part(NamedTuple):
    """A part of the vocabulary, and the heads there."""

    columns: slice
    student: Head
    roles: list[Head]

    @property
    def vocabulary(self) -> int:
        return self.student.vocabulary


@dataclass(frozen=True)
class Problem:
    """One divergence. head: the student's; loss_weight: see `log_linear_divergence`; differentiate: whether a
    gradient may be asked for.
    """

    head: Head
    target: Target
    rule: Rule
    chunk: int | None
    loss_weight: Tensor | None
    differentiate: bool

    def forward(self, hidden: Tensor, gradients: Gradients) -> tuple[Tensor, Tensor, _Constants]:
        """Values `[T]`, the columns of `VocabularyDivergence` after it `[T, 5]`, and what the gradient needs.

        Adds to `gradients`: hidden ones for a value weighing 1, head ones with `loss_weight`.
        """
        keep = gradients.wanted or self.rule.middle is not None
        tokens, parts, scratch = self._tiles(hidden, keep)
        kept = Scratch(len(parts) if keep else 1, scratch.elements, hidden.device)
        slices = [self._slice(hidden, span, parts, kept, scratch, gradients) for span in tokens]
        value, columns, constants = zip(*slices)
        return torch.cat(value), torch.cat(columns), _Constants(*map(torch.cat, zip(*constants)))

    def backward(self, hidden: Tensor, constants: _Constants, weights: Tensor, gradients: Gradients) -> None:
        """Adds to `gradients` of the head those of `sum_t weights_t value_t`; makes all logits again."""
        tokens, parts, scratch = self._tiles(hidden, False)
        target = Scratch(1, scratch.elements, hidden.device)
        for part in parts:
            for span in tokens:
                own = _Constants(*(column[span] for column in constants))
                u = target.tiles(len(own.mean), part.vocabulary)[0]
                self.target.fill(u, part.roles, span, scratch.tiles(*u.shape)[0])
                if self.rule.middle is not None:
                    self._slope(hidden[span], part, u, own.student, own.target, scratch, None)
                self._add(hidden, span, part, u, own, weights, scratch, gradients)

    def _slice(
        self,
        hidden: Tensor,
        span: slice,
        parts: Sequence[_Part],
        kept: Scratch,
        scratch: Scratch,
        gradients: Gradients,
    ) -> tuple[Tensor, Tensor, _Constants]:
        rule, states = self.rule, hidden[span]
        sums = [Sums(len(parts), len(states), hidden.device) for _ in range(2 + len(self.target.roles))]
        student, target, roles = sums[0], sums[1], sums[2:]
        targets = [kept.tiles(len(states), part.vocabulary) for part in parts]
        targets = [tiles[min(index, len(tiles) - 1)] for index, tiles in enumerate(targets)]
        for index, (part, u) in enumerate(zip(parts, targets)):
            self._sweep(states, span, index, part, u, student, target, roles, scratch)
        s, t = student.combine(), target.combine()
        value = mean = torch.zeros_like(s.total)
        if rule.middle is not None:
            pieces = torch.zeros(len(parts), 2, len(states), device=hidden.device)
            for part, u, piece in zip(parts, targets, pieces):
                self._slope(states, part, u, s.log_normaliser, t.log_normaliser, scratch, piece)
            value, mean = pieces.sum(0)
        elif rule.reverse:
            mean = kl(s, t, student.combine_cross(target))
            value = rule.reverse * mean
        if rule.middle is None and rule.forward:
            value = value + rule.forward * kl(t, s, target.combine_cross(student))
        constants = _Constants(s.log_normaliser, t.log_normaliser, mean)
        if gradients.wanted:
            for part, u in zip(parts, targets):
                self._add(hidden, span, part, u, constants, self.loss_weight, scratch, gradients)
        agree = (student.best == target.best).float()
        dropped = self._outside(hidden, self.head, span, s.log_normaliser)
        report = [s.entropy, t.entropy, agree, dropped, self._target_dropped(span, roles)]
        return value, torch.stack(report, -1), constants

    def _sweep(
        self,
        states: Tensor,
        span: slice,
        index: int,
        part: _Part,
        u: Tensor,
        student: Sums,
        target: Sums,
        roles: list[Sums],
        scratch: Scratch,
    ) -> None:
        """Sums of one part of the vocabulary; fills u with the target's logits there."""
        rule, gaps = self.rule, self.target.gaps
        z, p, centred, product = scratch.tiles(*u.shape)[:4]

        def read(role: int, logits: Tensor) -> None:
            if self._padded(role):
                roles[role].add(index, roles[role].centre(index, logits, centred), gaps, p, product)

        self.target.fill(u, part.roles, span, z, read)
        fill(z, part.student, states, self.target.temperature)
        student.centre(index, z, z)
        student.find_best(index, z, part.columns.start)
        student.add(index, z, gaps, p, product)
        target.centre(index, u, centred)
        target.find_best(index, centred, part.columns.start)
        if rule.middle is None and rule.reverse:
            expectation(p, centred, gaps, product, student.cross[index])
        target.add(index, centred, gaps, p, product)
        if rule.middle is None and rule.forward:
            expectation(p, z, gaps, product, target.cross[index])

    def _padded(self, role: int) -> bool:
        return self.target.roles[role][1].vocabulary > self.target.vocabulary

    def _tiles(self, hidden: Tensor, kept: bool) -> tuple[list[slice], list[_Part], Scratch]:
        shared = self.target.vocabulary
        step, width = tiles(len(hidden), shared, hidden.device.type, self.chunk, kept)
        columns = spans(shared, width)
        parts = map(_Part, columns, cut(self.head, columns), self.target.cut(columns))
        scratch = Scratch(4 if self.rule.middle is None else 6, step * width, hidden.device)
        return spans(len(hidden), step), list(parts), scratch

    def _slope(
        self,
        states: Tensor,
        part: _Part,
        u: Tensor,
        z_normaliser: Tensor,
        u_normaliser: Tensor,
        scratch: Scratch,
        sums: Tensor | None,
    ) -> None:
        """Overwrites u, the target's logits, by the slope."""
        z, *room = scratch.tiles(*u.shape)
        fill(z, part.student, states, self.target.temperature)
        log_s, log_t = z.sub_(z_normaliser.unsqueeze(-1)), u.sub_(u_normaliser.unsqueeze(-1))
        slope_to_middle(self.rule, log_s, log_t, self.target.gaps, room, sums)

    def _add(
        self,
        hidden: Tensor,
        span: slice,
        part: _Part,
        u: Tensor,
        constants: _Constants,
        weights: Tensor | None,
        scratch: Scratch,
        gradients: Gradients,
    ) -> None:
        z, *room = scratch.tiles(*u.shape)
        fill(z, part.student, hidden[span], self.target.temperature)
        shaping = gradients.shaping(z)
        gradient = at_logits(self.rule, z, u, *constants, self.target.gaps, room)
        gradients.add(gradient, shaping, span, part.columns, None if weights is None else weights[span])

    def _outside(self, hidden: Tensor, head: Head, span: slice, inside: Tensor) -> Tensor:
        """`[c]`: probability of the tokens outside the shared vocabulary; exactly 0 where there are none."""
        shared = self.target.vocabulary
        if head.vocabulary == shared:
            return torch.zeros_like(inside)
        width = tiles(len(inside), shared, hidden.device.type, self.chunk, False)[1]
        columns = [slice(shared + s.start, shared + s.stop) for s in spans(head.vocabulary - shared, width)]
        states = hidden[span]
        pieces = [part.logits(states, self.target.temperature).logsumexp(-1) for part in cut(head, columns)]
        outside = torch.stack(pieces).logsumexp(0)
        return (outside - torch.logaddexp(outside, inside)).exp()

    def _target_dropped(self, span: slice, sums: Sequence[Sums]) -> Tensor:
        """`[c]`: the largest of the roles read at each token."""
        dropped = []
        for role, (hidden, head, weight) in enumerate(self.target.roles):
            inside = sums[role].combine().log_normaliser
            outside = self._outside(hidden, head, span, inside)
            dropped.append(
                torch.where(weight[span] != 0, outside, 0.0) if isinstance(weight, Tensor) else outside
            )
        return torch.stack(dropped).amax(0)


class FusedDivergence(torch.autograd.Function):
    """`apply(hidden, weight, bias, problem)` -> values `[T]`, columns `[T, 5]`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem
    ) -> tuple[Tensor, Tensor]:
        wanted = [need and problem.differentiate for need in ctx.needs_input_grad[:3]]
        gradients = Gradients(hidden, problem.head, problem.target.temperature, wanted)
        value, columns, constants = problem.forward(hidden, gradients)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.problem, ctx.constants, ctx.of_hidden = problem, constants, gradients.hidden
        ctx.of_head = gradients.weight, gradients.bias
        ctx.mark_non_differentiable(columns)
        return value, columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        (hidden, weight, bias), problem, upstream = ctx.saved_tensors, ctx.problem, incoming[0]
        of_hidden = None if ctx.of_hidden is None else ctx.of_hidden * upstream.unsqueeze(-1)
        of_weight, of_bias = None, None
        if any(ctx.needs_input_grad[1:3]):
            factor = _common_factor(upstream, problem.loss_weight)
            if factor is not None and ctx.of_head is not None:
                # scaled in place and given away, for it may be large; a second backward pass starts anew
                of_weight, of_bias = (None if sums is None else sums.mul_(factor) for sums in ctx.of_head)
                ctx.of_head = None
            else:
                gradients = Gradients(
                    hidden, problem.head, problem.target.temperature, (False, *ctx.needs_input_grad[1:3])
                )
                problem.backward(hidden, ctx.constants, upstream, gradients)
                of_weight, of_bias = gradients.weight, gradients.bias
        results = zip((of_hidden, of_weight, of_bias), (hidden, weight, bias))
        return *(None if found is None else found.to(like.dtype) for found, like in results), None


def _common_factor(upstream: Tensor, weights: Tensor | None) -> Tensor | None:
    """The number that takes `weights` (None: ones) to `upstream`, to rounding; None where there is none."""
    if not len(upstream):
        return upstream.new_zeros(())
    weights = torch.ones_like(upstream) if weights is None else weights.to(upstream.dtype)
    largest = weights.abs().argmax()
    factor = upstream[largest] / weights[largest]
    expected = factor * weights
    same = (upstream - expected).abs() <= 4 * torch.finfo(upstream.dtype).eps * expected.abs()
    return factor if bool(same.all()) else None
