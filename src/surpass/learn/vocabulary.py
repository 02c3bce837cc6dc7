"""Whole-vocabulary quantities from hidden states, without ever holding `[T, V]`.

Logits are made for a few tokens at a time, used, and thrown away; the backward pass makes them again. What is
kept between the two passes is `[T, D]` and `[T]`. Gradients go to the student's hidden states and to the
weight and bias of its head, summed over tiles in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from surpass.learn.divergence import Divergence, entropy
from surpass.learn.head import Head
from surpass.learn.targets import Weight, log_linear

# Bytes of one tile of float32 logits; about a dozen tensors of that size live at once. A CPU is fastest near
# its cache; a GPU needs large tiles, or it waits for the weight gradient to be read and written.
TILE_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}

# From the logits `[c, V]` of the tokens in a slice to `[c, m]` columns.
Columns = Callable[[Tensor, slice], Tensor]


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

    chunk: tokens per tile, by default as many as fit the memory budget. entropy_gradient: entropy takes part
    in the backward pass (an entropy bonus); otherwise it is detached and costs nothing there.
    """

    def chosen(logits: Tensor, span: slice) -> Tensor:
        logp = logits.log_softmax(-1)
        columns = [logp.gather(-1, ids[span].unsqueeze(-1))]
        return torch.cat([*columns, entropy(logp).unsqueeze(-1)], -1) if entropy_gradient else columns[0]

    def all_columns(logits: Tensor, span: slice) -> Tensor:
        logp = logits.log_softmax(-1)
        return torch.stack([logp.gather(-1, ids[span].unsqueeze(-1)).squeeze(-1), entropy(logp)], -1)

    out = _tiled(hidden, head, temperature, chunk, all_columns, chosen)
    return TokenLogp(out[:, 0], out[:, 1] if entropy_gradient else out[:, 1].detach())


def support_logp(
    hidden: Tensor, head: Head, ids: Tensor, temperature: float = 1.0, chunk: int | None = None
) -> Tensor:
    """Log-probs `[T, K]` of the support `ids` `[T, K]` under the full distribution, differentiable."""

    def columns(logits: Tensor, span: slice) -> Tensor:
        # gather before the normalisation: the gradient of a [c, V] log-softmax is never built
        return logits.gather(-1, ids[span]) - torch.logsumexp(logits, -1, keepdim=True)

    return _tiled(hidden, head, temperature, chunk, columns, columns)


@torch.no_grad()
def top_k(
    hidden: Tensor, head: Head, k: int, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Ids `[T, k]` and full-vocabulary log-probs `[T, k]` of the k likeliest tokens, best first; detached."""
    if not 1 <= k <= head.vocabulary:
        raise ValueError(f"k must be between 1 and the vocabulary of {head.vocabulary}, found {k}")
    ids = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
    logp = torch.empty(len(hidden), k, device=hidden.device)
    for span in _spans(hidden, head, chunk):
        logits = head.logits(hidden[span], temperature)
        best = logits.topk(k, dim=-1)
        ids[span] = best.indices
        logp[span] = best.values - torch.logsumexp(logits, -1, keepdim=True)
    return ids, logp


def log_linear_divergence(
    student_hidden: Tensor,
    student_head: Head,
    terms: Sequence[TargetTerm],
    divergence: Divergence,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> VocabularyDivergence:
    """Divergence `[t]` between the student and the log-linear target `log q = sum_i w_i log p_i + const`.

    student_hidden: `[t, D]`. All logits are divided by `temperature` and cut to the shared vocabulary (the
    smallest of the student's and of those read) before the softmax; what that drops is reported. A term whose
    weight is the float 0 is not read at all. Gradients reach the student alone. Raises ValueError if a term
    has another number of tokens.
    """
    used = [term for term in terms if isinstance(term.weight, Tensor) or term.weight != 0]
    for term in used:
        if len(term.hidden) != len(student_hidden):
            raise ValueError(
                f"the student has {len(student_hidden)} tokens, a role of the target has {len(term.hidden)}; "
                "all must be scored on the same response tokens"
            )
    shared = min([student_head.vocabulary, *(term.head.vocabulary for term in used)])

    def target(span: slice) -> tuple[Tensor, Tensor]:
        logps, weights, dropped = [], [], []
        for hidden, head, weight in used:
            logits = head.logits(hidden[span], temperature)
            weight = weight[span] if isinstance(weight, Tensor) else weight
            outside = _dropped(logits, shared)
            dropped.append(torch.where(weight != 0, outside, 0) if isinstance(weight, Tensor) else outside)
            logps.append(logits[:, :shared].log_softmax(-1))
            weights.append(weight)
        return log_linear(logps, weights), torch.stack(dropped).amax(0)

    def value(logits: Tensor, span: slice) -> Tensor:
        with torch.no_grad():
            target_logp, _ = target(span)
        return divergence(logits[:, :shared].log_softmax(-1), target_logp).unsqueeze(-1)

    def all_columns(logits: Tensor, span: slice) -> Tensor:
        target_logp, target_dropped = target(span)
        student_logp = logits[:, :shared].log_softmax(-1)
        agree = (student_logp.argmax(-1) == target_logp.argmax(-1)).to(student_logp.dtype)
        columns = [divergence(student_logp, target_logp), entropy(student_logp), entropy(target_logp), agree]
        return torch.stack([*columns, _dropped(logits, shared), target_dropped], -1)

    out = _tiled(student_hidden, student_head, temperature, chunk, all_columns, value)
    return VocabularyDivergence(out[:, 0], *out[:, 1:].detach().unbind(-1))


def _dropped(logits: Tensor, shared: int) -> Tensor:
    """`[c]`: probability of the tokens from `shared` on; exactly 0 where there are none."""
    if logits.shape[-1] == shared:
        return logits.new_zeros(len(logits))
    return (torch.logsumexp(logits[:, shared:], -1) - torch.logsumexp(logits, -1)).exp()


def _spans(hidden: Tensor, head: Head, chunk: int | None) -> list[slice]:
    """Slices of tokens, at least one (perhaps empty)."""
    if chunk is None:
        budget = TILE_BYTES.get(hidden.device.type, TILE_BYTES["cuda"])
        chunk = max(1, budget // (4 * head.vocabulary))
    elif chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, found {chunk}")
    return [slice(start, min(start + chunk, len(hidden))) for start in range(0, max(len(hidden), 1), chunk)]


def _tiled(
    hidden: Tensor, head: Head, temperature: float, chunk: int | None, forward: Columns, backward: Columns
) -> Tensor:
    """`forward` on every tile, `[T, m]`. `backward` gives the leading columns alone, those with a
    gradient.
    """
    arguments = (hidden, head.weight, head.bias, head, temperature, chunk, forward, backward)
    return _Tiled.apply(*arguments)  # type: ignore[return-value]


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        temperature: float,
        chunk: int | None,
        forward: Columns,
        backward: Columns,
    ) -> Tensor:
        spans = _spans(hidden, head, chunk)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.head, ctx.temperature, ctx.spans, ctx.columns = head, temperature, spans, backward
        return torch.cat([forward(head.logits(hidden[span], temperature), span) for span in spans])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        hidden, weight, bias = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_gradient = torch.zeros_like(hidden) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        bias_gradient = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for span in ctx.spans:
            logits = ctx.head.logits(hidden[span], ctx.temperature)
            with torch.enable_grad():
                leaf = logits.detach().requires_grad_()
                columns = ctx.columns(leaf, span)
            (at_logits,) = torch.autograd.grad(columns, leaf, gradient[span, : columns.shape[-1]])
            at_product = _before_shaping(at_logits, logits, ctx.head, ctx.temperature)
            low = at_product.to(weight.dtype)
            if hidden_gradient is not None:
                hidden_gradient[span] = (low @ weight).to(hidden.dtype)
            if weight_gradient is not None:
                inputs = hidden[span].to(weight.dtype)
                if weight.dtype == torch.float32:
                    weight_gradient.addmm_(low.T, inputs)
                else:
                    weight_gradient += low.T @ inputs
            if bias_gradient is not None:
                bias_gradient += at_product.sum(0)
        return (
            hidden_gradient,
            None if weight_gradient is None else weight_gradient.to(weight.dtype),
            None if bias_gradient is None else bias_gradient.to(bias.dtype),
            *[None] * 5,
        )


def _before_shaping(gradient: Tensor, logits: Tensor, head: Head, temperature: float) -> Tensor:
    """The gradient at the matrix product, from that at the logits `Head.logits` made of it."""
    if temperature != 1.0:
        gradient = gradient / temperature
    if head.softcap is not None:
        gradient = gradient * (1 - (logits * (temperature / head.softcap)).square())
    return gradient if head.scale == 1.0 else gradient * head.scale
