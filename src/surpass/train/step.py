"""One optimiser update: micro-batches under global denominators, one backward each, clip, guard, step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from surpass.learn.aggregate import Loss, denominators
from surpass.methods.base import Method
from surpass.methods.run import Run
from surpass.models.forward import micro_batches
from surpass.records import Rollouts


class NonFiniteError(RuntimeError):
    """A loss or gradient was NaN or infinite; nothing was updated."""


@dataclass
class UpdateResult:
    """metrics: scalars by name. signals: per-token columns `[T]` of the whole batch, for the token viewer."""

    metrics: dict[str, float]
    signals: dict[str, Tensor] = field(default_factory=dict)


def update(
    run: Run,
    method: Method,
    batch: Rollouts,
    optimiser: torch.optim.Optimizer,
    accelerator: Accelerator,
    max_grad_norm: float,
    on_non_finite: Callable[[Rollouts], str],
    want_signals: bool = False,
) -> UpdateResult:
    """One optimiser update on `batch`. The gradient does not depend on how it is cut into micro-batches.

    Raises NonFiniteError, after `on_non_finite` has saved the batch, where the loss or the gradient is not finite.
    """
    run.student.model.train()
    divisors: dict[Any, Tensor] = {}
    totals: dict[str, float] = {}
    means: dict[str, list[Tensor]] = {}
    signals: dict[str, Tensor] = {}
    optimiser.zero_grad(set_to_none=True)
    read = batch.prompt_ids.lengths + batch.response.lengths
    for rows in micro_batches(read, run.token_budget):
        micro = batch.select(rows)
        loss = method.loss(run, micro)
        divisors = divisors or _global_denominators(loss, batch, accelerator)
        total = _total(loss, micro, divisors, totals, accelerator.num_processes)
        accelerator.backward(total)
        tokens = batch.response.tokens_of(rows)
        for name, value in loss.metrics.items():
            _record(name, value.detach().float().cpu(), micro, means)
            if want_signals and value.ndim == 1 and len(value) == len(tokens):
                column = signals.setdefault(name, torch.full((len(batch.response.values),), float("nan")))
                column[tokens] = value.detach().float().cpu()
    parameters = [p for p in run.student.model.parameters() if p.requires_grad]
    norm = accelerator.clip_grad_norm_(parameters, max_grad_norm)
    grad_norm = float(norm) if norm is not None else float("nan")
    loss_value = sum(totals.values())
    if not (torch.isfinite(torch.tensor(grad_norm)) and torch.isfinite(torch.tensor(loss_value))):
        where = on_non_finite(batch)
        optimiser.zero_grad(set_to_none=True)
        raise NonFiniteError(
            f"step {run.step + 1}, update {run.updates + 1}: loss {loss_value} and gradient norm {grad_norm} are not finite. "
            f"The weights were not changed and the batch was saved to {where}. Likely causes: a learning rate too high, "
            "float16 overflow (use bfloat16), or -inf scores of a role whose vocabulary differs."
        )
    optimiser.step()
    run.updates += 1
    metrics = {"loss": loss_value, "grad_norm": grad_norm}
    metrics |= {f"loss/{name}": value for name, value in totals.items()}
    for name, pieces in means.items():
        values = torch.cat(pieces)
        metrics[name] = float(values.mean()) if len(values) else float("nan")
    return UpdateResult(metrics, signals)


def _global_denominators(loss: Loss, batch: Rollouts, accelerator: Accelerator) -> dict[Any, Tensor]:
    """The whole update's denominator of every term, summed over ranks.

    Raises ValueError where a term has no token, unless it is optional and another one has some.
    """
    masks = {term.stream: batch.ragged(batch.mask(term.stream)) for term in loss.terms}
    local = denominators([term.key for term in loss.terms], masks)
    total = {k: accelerator.reduce(v.float().to(accelerator.device), "sum") for k, v in local.items()}
    empty = {key for key, value in total.items() if float(value) == 0}  # type: ignore[arg-type]
    needed = {term.key for term in loss.terms if not term.optional or len(empty) == len(total)}
    for stream, *_ in sorted(empty & needed):
        raise ValueError(
            f"no token of stream {stream!r} to train on in this update: check that answers are not empty and that the "
            "judge did not leave out every one of them"
        )
    return total  # type: ignore[return-value]


def _total(
    loss: Loss, micro: Rollouts, divisors: dict[Any, Tensor], totals: dict[str, float], ranks: int
) -> Tensor:
    """The micro-batch's share of the loss. Data parallelism averages gradients over ranks, so the sum is scaled up."""
    shares = []
    for term in loss.terms:
        mask = micro.ragged(micro.mask(term.stream)).to(term.values.device)
        share = term.contribution(mask, divisors[term.key])
        totals[term.name] = totals.get(term.name, 0.0) + float(share.detach())
        shares.append(share)
    return torch.stack(shares).sum() * ranks


def _record(name: str, value: Tensor, micro: Rollouts, means: dict[str, list[Tensor]]) -> None:
    """Per-token metrics are averaged over the tokens the student wrote (all tokens where it wrote none)."""
    if value.ndim == 1 and len(value) == len(micro.response.values):
        own = micro.mask("student")
        value = value[own] if bool(own.any()) else value
    value = value.flatten()
    means.setdefault(name, []).append(value[~torch.isnan(value)])
