"""Whole-vocabulary quantities from hidden states, without ever holding `[T, V]`.

Logits are made a tile at a time, used, and thrown away. Between forward and backward pass stay `[T, D]`, `[T]`
and, for divergences, the gradient `[V, D]` of the head. Gradients go to the student's hidden states and to the
weight and bias of its head, summed over tiles in float32. With a bfloat16 head each logit and each entry of the
gradient at the logits is rounded to 8 bits once (2^-8 of its size); all sums stay float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from surpass.learn.derivatives import rule
from surpass.learn.divergence import Divergence
from surpass.learn.fused import TILE_BYTES as TILE_BYTES
from surpass.learn.fused import Gradients, Scratch, Sums, Target, cut, has_gaps, spans, tiles
from surpass.learn.fused_divergence import FusedDivergence, Problem
from surpass.learn.head import Head
from surpass.learn.targets import Weight


class TokenLogp(NamedTuple):
    """logp: `[T]` of the given tokens; entropy: `[T]` nats."""

    logp: Tensor
    entropy: Tensor


class TargetTerm(NamedTuple):
    """One role of a log-linear target: hidden `[t, D_i]`, its head, its weight (float, or `[t]`)."""

    hidden: Tensor
    head: Head
    weight: Weight


class VocabularyDivergence(NamedTuple):
    """Per token, `[t]`; all but `value` are detached.

    value: the divergence in nats. student_entropy, target_entropy: nats. top1_agreement: 1 where both put the
    same token first. student_dropped: probability of the student outside the shared vocabulary;
    target_dropped: the largest such probability of the roles read at that token.
    """

    value: Tensor
    student_entropy: Tensor
    target_entropy: Tensor
    top1_agreement: Tensor
    student_dropped: Tensor
    target_dropped: Tensor


def token_logp(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
    entropy_gradient: bool = False,
) -> TokenLogp:
    """Log-prob of token `ids` `[T]` after states `hidden` `[T, D]`, and the entropy there.

    chunk: tokens per tile, by default what suits the device. entropy_gradient: entropy takes part in the
    backward pass (an entropy bonus); otherwise it is detached and costs nothing there.
    """
    logp, entropy = _selected(hidden, head, ids.unsqueeze(-1), temperature, chunk)
    return TokenLogp(logp.squeeze(-1), entropy if entropy_gradient else entropy.detach())


def support_logp(
    hidden: Tensor, head: Head, ids: Tensor, temperature: float = 1.0, chunk: int | None = None
) -> Tensor:
    """Log-probs `[T, K]` of the support `ids` `[T, K]` under the full distribution, differentiable."""
    return _selected(hidden, head, ids, temperature, chunk)[0]


@torch.no_grad()
def top_k(
    hidden: Tensor, head: Head, k: int, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Ids `[T, k]` and full-vocabulary log-probs `[T, k]` of the k likeliest tokens, best first; detached."""
    if not 1 <= k <= head.vocabulary:
        raise ValueError(f"k must be between 1 and the vocabulary of {head.vocabulary}, found {k}")
    ids = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
    logp = torch.empty(len(hidden), k, device=hidden.device)
    step, width = tiles(len(hidden), head.vocabulary, hidden.device.type, chunk, kept=False)
    columns, gaps = spans(head.vocabulary, width), has_gaps([head])
    heads, scratch = cut(head, columns), Scratch(2, step * width, hidden.device)
    for tokens in spans(len(hidden), step):
        sums = Sums(len(heads), len(hidden[tokens]), hidden.device)
        values, found = [], []
        for index, part in enumerate(heads):
            z = part.logits(hidden[tokens], temperature)
            best = z.topk(min(k, part.vocabulary), -1)
            values.append(best.values)
            found.append(best.indices + columns[index].start)
            sums.add(index, sums.centre(index, z, z), gaps, *scratch.tiles(*z.shape))
        # stable: of equal logits the first token is the better one
        best, order = torch.cat(values, -1).sort(stable=True, dim=-1, descending=True)
        ids[tokens] = torch.cat(found, -1).gather(-1, order[:, :k])
        logp[tokens] = best[:, :k] - sums.combine().log_normaliser.unsqueeze(-1)
    return ids, logp


def log_linear_divergence(
    student_hidden: Tensor,
    student_head: Head,
    terms: Sequence[TargetTerm],
    divergence: Divergence,
    temperature: float = 1.0,
    chunk: int | None = None,
    loss_weight: Tensor | None = None,
) -> VocabularyDivergence:
    """Divergence `[t]` between the student and the log-linear target `log q = sum_i w_i log p_i + const`.

    student_hidden: `[t, D]`. All logits are divided by `temperature` and cut to the shared vocabulary (the
    smallest of the student's and of those read) before the softmax; what that drops is reported. A term whose
    weight is the float 0 is not read at all. Gradients reach the student alone. Raises ValueError if a term
    has another number of tokens.

    loss_weight: `[t]`, what each value will be multiplied by in the loss, up to a common factor; equal by
    default. A matter of speed, never of the result: the gradient of the head is summed with these weights
    while the logits are there, and if the loss then weighs the tokens otherwise, all logits are made again.
    """
    used = [term for term in terms if isinstance(term.weight, Tensor) or term.weight != 0]
    for term in used:
        if len(term.hidden) != len(student_hidden):
            raise ValueError(
                f"the student has {len(student_hidden)} tokens, a role of the target has {len(term.hidden)}; "
                "all must be scored on the same response tokens"
            )
    if not used:
        weights = [term.weight for term in terms]
        raise ValueError(f"all target weights are 0 ({weights}): no role is left to learn from")
    problem = Problem(
        student_head,
        Target(
            [(term.hidden.detach(), term.head, term.weight) for term in used],
            min([student_head.vocabulary, *(term.head.vocabulary for term in used)]),
            temperature,
            has_gaps([student_head, *(term.head for term in used)]),
        ),
        rule(divergence),
        chunk,
        loss_weight,
        torch.is_grad_enabled(),
    )
    out = FusedDivergence.apply(student_hidden, student_head.weight, student_head.bias, problem)
    return VocabularyDivergence(out[0], *out[1].unbind(-1))  # type: ignore[index]


def _selected(
    hidden: Tensor, head: Head, ids: Tensor, temperature: float, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Log-probs `[T, K]` of `ids` `[T, K]` and entropies `[T]`."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < head.vocabulary:
        raise ValueError(
            f"token ids must lie in 0 to {head.vocabulary - 1} (the head's vocabulary), found "
            f"{int(ids.min())} to {int(ids.max())}; does the tokenizer belong to this model?"
        )
    return _Selected.apply(hidden, head.weight, head.bias, head, ids, temperature, chunk)  # type: ignore


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        ids: Tensor,
        temperature: float,
        chunk: int | None,
    ) -> tuple[Tensor, Tensor]:
        gaps = has_gaps([head])
        sides = tiles(len(hidden), head.vocabulary, hidden.device.type, chunk, kept=False)
        columns = spans(head.vocabulary, sides[1])
        heads, scratch = cut(head, columns), Scratch(2, sides[0] * sides[1], hidden.device)
        logp = torch.zeros(ids.shape, device=hidden.device)
        normaliser, entropy = (torch.zeros(len(hidden), device=hidden.device) for _ in range(2))
        for tokens in spans(len(hidden), sides[0]):
            states, wanted, chosen = hidden[tokens], ids[tokens], logp[tokens]
            sums = Sums(len(heads), len(states), hidden.device)
            for index, part in enumerate(heads):
                z = part.logits(states, temperature)
                inside, place = _within(wanted, columns[index])
                chosen.copy_(torch.where(inside, z.gather(-1, place), chosen))
                sums.add(index, sums.centre(index, z, z), gaps, *scratch.tiles(*z.shape))
            moments = sums.combine()
            # first to the largest logit, then to the normaliser: no digits are lost to the size of the logits
            chosen.sub_(moments.top.unsqueeze(-1)).sub_(moments.total.log().unsqueeze(-1))
            normaliser[tokens], entropy[tokens] = moments.log_normaliser, moments.entropy
        ctx.save_for_backward(hidden, weight, bias)
        ctx.head, ctx.ids, ctx.temperature, ctx.sides, ctx.gaps = head, ids, temperature, sides, gaps
        ctx.normaliser, ctx.entropy = normaliser, entropy
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        of_logp, of_entropy = incoming
        of_logp = torch.zeros(ctx.ids.shape, device=hidden.device) if of_logp is None else of_logp
        total = of_logp.sum(-1, keepdim=True)
        gradients = Gradients(hidden, ctx.head, ctx.temperature, ctx.needs_input_grad[:3])
        columns = spans(ctx.head.vocabulary, ctx.sides[1])
        scratch = Scratch(1, ctx.sides[0] * ctx.sides[1], hidden.device)
        for part_columns, part in zip(columns, cut(ctx.head, columns)):
            for tokens in spans(len(hidden), ctx.sides[0]):
                z = part.logits(hidden[tokens], ctx.temperature)
                shaping = gradients.shaping(z)
                log_p = z.sub_(ctx.normaliser[tokens].unsqueeze(-1))
                p = torch.exp(log_p, out=scratch.tiles(*z.shape)[0])
                if of_entropy is None:
                    gradient = p.mul_(-total[tokens])
                else:  # the entropy's: -p (log p + entropy)
                    surprise = log_p.masked_fill_(p == 0, 0.0) if ctx.gaps else log_p
                    surprise.add_(ctx.entropy[tokens].unsqueeze(-1)).mul_(of_entropy[tokens].unsqueeze(-1))
                    gradient = surprise.add_(total[tokens]).mul_(p).neg_()
                inside, place = _within(ctx.ids[tokens], part_columns)
                gradient.scatter_add_(-1, place, torch.where(inside, of_logp[tokens], 0.0))
                gradients.add(gradient, shaping, tokens, part_columns, None)
        results = zip((gradients.hidden, gradients.weight, gradients.bias), (hidden, weight, bias))
        return *(None if found is None else found.to(like.dtype) for found, like in results), *[None] * 4


def _within(ids: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which ids fall into these columns, and their place there (some valid place for the others)."""
    inside = (ids >= columns.start) & (ids < columns.stop)
    return inside, (ids - columns.start).clamp_(0, columns.stop - columns.start - 1)
