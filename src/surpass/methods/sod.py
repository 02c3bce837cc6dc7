"""SOD: a teacher's signal beside the outcome's, weighed step by step by how far the student has drifted from it.

    step k = the k-th run of tokens the student wrote, between two observations
    d_k = mean_{t in k} | log student(y_t) - log teacher(y_t) |
    w_1 = 1,   w_k = min( prod_{u < k} (d_u + eps) / (d_{u+1} + eps), 1 + delta ) = min( (d_1 + eps) / (d_k + eps), 1 + delta )
    A_t = A_GRPO + kappa w_{k(t)} ( log teacher(y_t) - log student(y_t) )

A bad tool call leads the student into states where the teacher's grades of single tokens are noise: drift weakens the
signal, recovery strengthens it, at most by delta. All of it is detached, at the weights that wrote the answers.

Source: arXiv 2605.07725 and its code. The paper presents the product as a running re-weighting; the code accumulates it
before clipping, so that it telescopes and only the first and the present step count. That is followed
(`weighting: telescoped`): a first step that already agrees mutes all later ones, a hopeless one lifts them to the bound.
`weighting: clipped` clips every partial product instead. delta is 0.2 in the scripts (followed), 0.5 in the code's
defaults. What the paper calls OPD is GRPO + OPD (`weighting: none`). Left out: an earlier branch of the code that scales
the teacher's signal by a sigmoid of the outcome's advantage, whose settings are not published. An answer of one turn is
one step. An answer that nobody judged is not trained on, as in GRPO.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from surpass.methods.base import Needs, Reduction, old_logp
from surpass.methods.grpo import GRPO
from surpass.methods.opd import role_column
from surpass.methods.run import Run
from surpass.methods.turns import generate_turns, reward_turns
from surpass.records import Prompt, Ragged, Rollouts
from surpass.roles.scoring import Want

Weighting = Literal["telescoped", "clipped", "none"]


def steps_of(written: Ragged, turn: Tensor | None = None) -> Ragged:
    """The tokens `written` `[T]` bool marks, cut into steps; values are their step `[T]`, counted from 0 in each row.

    A step is a maximal run of marked tokens, and ends where `turn` `[T]` changes. Other tokens get -1.
    """
    mine, first = written.values, written.position == 0
    before = torch.cat([mine[:1], mine[:-1]])
    begins = mine & (first | ~before)
    if turn is not None:
        begins |= mine & ~first & (turn != torch.cat([turn[:1], turn[:-1]]))
    counted = begins.to(torch.int64).cumsum(0)
    started = torch.cat([counted.new_zeros(1), counted])[written.offsets[:-1]]
    return written.like(torch.where(mine, counted - written.expand(started) - 1, -1))


def step_weights(
    distance: Tensor, steps: Ragged, bound: float, epsilon: float, weighting: Weighting = "telescoped"
) -> Tensor:
    """`[T]` weights of the steps of each row, from `distance` `[T]`, the student's |log-ratio| to the teacher.

    bound: delta, no weight is above 1 + delta. Tokens of no step get 0.
    """
    weight = torch.zeros_like(distance)
    for row in range(len(steps)):
        here = slice(int(steps.offsets[row]), int(steps.offsets[row + 1]))
        step, apart, product, previous = steps.values[here], distance[here], 1.0, None
        for k in range(int(step.max()) + 1 if len(step) else 0):
            mean = float(apart[step == k].double().mean()) + epsilon
            if previous is not None:
                product *= previous / mean
            if weighting == "clipped":
                product = min(product, 1 + bound)
            weight[here][step == k] = 1.0 if weighting == "none" else min(product, 1 + bound)
            previous = mean
    return weight


@dataclass(kw_only=True)
class SOD(GRPO):
    """Step-wise on-policy distillation for agents (arXiv 2605.07725)."""

    samples: int = 16
    """Answers to each prompt: the group."""
    reduction: Reduction = "token_mean"
    """How token losses are averaged over one optimiser update (all micro-batches, all ranks)."""
    clip_high: float = 0.28
    """Ratios above `1 + clip_high` get no gradient where the advantage is positive."""
    distillation: float = 1.0
    """kappa: weight of the teacher's signal; at 0 no teacher is read, and this is GRPO."""
    weighting: Weighting = "telescoped"
    """How the ratio to earlier steps is clipped: once at the end, at every step, or `none`: all steps count alike."""
    step_bound: float = 0.2
    """delta: no step counts more than 1 + delta times the first."""
    step_epsilon: float = 1e-6
    """Added to a step's distance, in nats, before ratios are taken."""
    environment: str | None = None
    """What the student acts upon: embedded:TASK, python, or your own; null: each prompt's own, if it has one."""
    max_turns: int = 16
    """Most turns of an answer."""
    turn_seconds: float = 10.0
    """An answer whose environment takes longer than this for one step is broken off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distillation < 0 or self.step_bound < 0 or self.step_epsilon <= 0:
            raise ValueError(
                "method.distillation and method.step_bound must not be negative, and method.step_epsilon must be above 0; "
                f"found {self.distillation}, {self.step_bound} and {self.step_epsilon}"
            )
        if self.max_turns < 1 or self.turn_seconds <= 0:
            raise ValueError(
                "method.max_turns is at least 1 and method.turn_seconds above 0; found "
                f"{self.max_turns} and {self.turn_seconds}"
            )

    def needs(self) -> Needs:
        return replace(super().needs(), teacher=self.distillation != 0)

    def collect(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        needs = self.needs()
        rollouts = generate_turns(
            run, prompts, self.samples, self.max_turns, self.environment, self.turn_seconds
        )
        rollouts = reward_turns(run, rollouts)
        if run.off_policy:
            rollouts = run.score(rollouts, "old")
        if needs.teacher:
            rollouts = run.score(rollouts, "teacher", Want())
        if needs.reference:
            rollouts = run.score(rollouts, "reference", Want())
        return self.with_advantage(rollouts)

    def token_advantage(self, batch: Rollouts, logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        advantage, metrics = super().token_advantage(batch, logp)
        if not self.distillation:
            return advantage, metrics
        student = old_logp(batch, logp).cpu()
        teacher = role_column(batch.scores["teacher"].logp, "teacher", batch.mask("trained"))
        steps = steps_of(batch.ragged(batch.mask("student")), batch.turn)
        ratio = teacher - student
        weight = step_weights(ratio.abs(), steps, self.step_bound, self.step_epsilon, self.weighting)
        signal = torch.where(steps.values >= 0, weight * ratio, torch.zeros_like(ratio)).to(logp.device)
        return advantage + self.distillation * signal, {**metrics, "step_weight": weight}
