"""The one place where per-token losses are averaged.

A denominator belongs to a whole optimiser step: it is summed over micro-batches and ranks before any of them
is reduced. Each micro-batch (of whole sequences) then adds its own contribution, so that neither the loss nor
its gradient depends on how the step was split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from surpass.records import Ragged

Reduction = Literal["token_mean", "sequence_mean", "sequence_sum", "constant_length", "joint"]


@dataclass(frozen=True)
class Term:
    """One part of a loss.

    values: `[T]` per-token losses, not averaged. stream: the mask they are averaged over (`Rollouts.mask`).
    reduction:
    - token_mean: every trained token of the step weighs the same (DAPO, arXiv 2503.14476);
    - sequence_mean: mean over each sequence's trained tokens, then over sequences (GRPO, arXiv 2402.03300);
    - sequence_sum: sum over each sequence's trained tokens, then mean over sequences;
    - constant_length: the same, divided by `horizon` tokens (Dr.GRPO, arXiv 2503.20783);
    - joint: sum over trained tokens, divided by the trained tokens of all joint terms together.
    coefficient: factor in the loss. Sequences without a trained token do not count. optional: where a whole
    update holds no token of the stream the term is 0, instead of an error.
    """

    name: str
    values: Tensor
    stream: str = "student"
    reduction: Reduction = "token_mean"
    coefficient: float = 1.0
    horizon: int | None = None
    optional: bool = False

    @property
    def key(self) -> tuple[str, Reduction, int | None]:
        """What its denominator depends on: stream, reduction, horizon."""
        return self.stream, self.reduction, self.horizon

    def contribution(self, mask: Ragged, denominator: Tensor) -> Tensor:
        """Scalar this micro-batch adds to the loss, `coefficient` included.

        Raises ValueError when tokens are trained but the values have no gradient: a detached signal is an
        advantage.
        """
        if torch.is_grad_enabled() and not self.values.requires_grad and bool(mask.values.any()):
            raise ValueError(
                f"loss term {self.name!r} has no gradient; an advantage or a detached value is not a loss: "
                "hand it to a "
                "surrogate (reinforce, ppo_clip, ...) together with the student's log-probs"
            )
        if self.optional and float(denominator) == 0:
            return torch.where(mask.values, self.values, torch.zeros_like(self.values)).sum()
        return self.coefficient * reduce(self.values, mask, self.reduction, denominator, self.stream)


@dataclass(frozen=True)
class Loss:
    """terms: added up, each with its own denominator. metrics: `[T]` columns or scalars to log, detached."""

    terms: tuple[Term, ...]
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(f"the terms of a loss need different names, found {names}")


def denominator(mask: Ragged, reduction: Reduction, horizon: int | None = None) -> Tensor:
    """Float64 scalar: what `reduce` divides by. Sum it over all micro-batches and ranks of the optimiser
    step.

    mask: `[T]` bool. horizon: tokens, for constant_length alone. For `joint` it is this stream's share: add
    up the streams.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"unknown reduction {reduction!r}; choose one of {', '.join(get_args(Reduction))}")
    if (horizon is not None) != (reduction == "constant_length") or (horizon is not None and horizon <= 0):
        raise ValueError(
            f"constant_length needs a horizon of at least 1 token and no other reduction has one; found "
            f"{reduction} with {horizon}"
        )
    tokens = _trained_tokens(mask)
    if reduction in ("token_mean", "joint"):
        return tokens.sum().double()
    rows = (tokens > 0).sum().double()
    return rows * horizon if horizon is not None else rows


def denominators(
    keys: Iterable[tuple[str, Reduction, int | None]], masks: Mapping[str, Ragged]
) -> dict[tuple[str, Reduction, int | None], Tensor]:
    """The denominators of several terms (by `Term.key`) from the masks `[T]` of their streams; joint ones
    share their sum.
    """
    result = {key: denominator(masks[key[0]], key[1], key[2]) for key in dict.fromkeys(keys)}
    joint = [value for (_, reduction, _), value in result.items() if reduction == "joint"]
    if joint:
        shared = torch.stack(joint).sum()
        result |= {key: shared for key in result if key[1] == "joint"}
    return result


def reduce(
    values: Tensor, mask: Ragged, reduction: Reduction, denominator: Tensor, stream: str = "student"
) -> Tensor:
    """Scalar contribution of a micro-batch: `values` `[T]` over the trained tokens of `mask`, divided by
    `denominator`.

    Values outside the mask are never read. Raises ValueError when the step has no trained token at all.
    """
    if float(denominator) <= 0:
        raise ValueError(
            f"no trained token in stream {stream!r} in the whole optimiser step: its mask is empty; check "
            "that the rollouts hold "
            "tokens of this stream and that filters left some"
        )
    if len(values) != len(mask.values):
        raise ValueError(
            f"stream {stream!r}: expected {len(mask.values)} per-token values, found {len(values)}"
        )
    trained = torch.where(mask.values, values, torch.zeros_like(values))
    if reduction == "sequence_mean":
        per_token = 1.0 / _trained_tokens(mask).clamp(min=1).to(values.dtype)
        trained = trained * mask.expand(per_token)
    return trained.sum() / denominator.to(values.device)


def _trained_tokens(mask: Ragged) -> Tensor:
    """`[N]` int64."""
    return mask.like(mask.values.to(torch.int64)).sum()
