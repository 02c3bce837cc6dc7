"""Batches of judged answers in groups, for the methods whose baseline is the group's own rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from world import rollouts, token_logp

from surpass.methods.grpo import GRPO
from surpass.methods.run import Run
from surpass.records import Rollouts, Scores


def judged(
    run: Run,
    method: GRPO,
    answers: Sequence[Sequence[int]],
    rewards: Sequence[float],
    group: Sequence[int] | None = None,
) -> Rollouts:
    """The student's answers with their rewards and the method's advantages."""
    batch = rollouts(run, answers, group=group)
    return method.with_advantage(batch.with_(reward=torch.tensor(rewards)))


def off_policy(run: Run, batch: Rollouts, log_ratio: Tensor) -> Rollouts:
    """The batch as if the weights before the first update had been further away: `log rho = log_ratio` `[T]`."""
    now = token_logp(run.student, batch).detach()
    return batch.with_(scores={"old": Scores(logp=now - log_ratio)})


def token_gradients(run: Run, method: GRPO, batch: Rollouts) -> Tensor:
    """`[T]` norms of the gradient of each token's own loss."""
    values = method.loss(run, batch).terms[0].values
    weights = [p for p in run.student.model.parameters() if p.requires_grad]
    norms = []
    for value in values:
        parts = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
        norms.append(torch.stack([part.norm() for part in parts if part is not None]).norm())
    return torch.stack(norms)
