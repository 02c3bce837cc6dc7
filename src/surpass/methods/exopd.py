"""G-OPD / ExOPD: on-policy distillation with reward extrapolation.

    max_theta  E_{y ~ student} [ lambda * log teacher(y)/reference(y) ] - KL(student || reference)

which is reverse KL to the log-linear target `log q = lambda log teacher + (1 - lambda) log reference + const`, taken
token by token: `A_t = lambda log teacher(y_t) + (1 - lambda) log reference(y_t) - log student(y_t)`.
lambda = 1 is plain OPD (the reference is never read), 0 < lambda < 1 interpolates, lambda > 1 extrapolates beyond the
teacher (ExOPD), lambda = 0 pulls back to the reference.

Source: arXiv 2602.12125. Settings of the paper:
- single teacher: teacher = an RL-trained copy of the student, reference = the student's initial weights;
- merging N teachers: one teacher per prompt domain, the shared base as student and reference;
- strong-to-weak: a larger teacher, reference = the student's initial weights (`--reference student`);
- reward correction: reference = the teacher's own checkpoint before its RL (`--reference PATH`).

Where the paper and its code disagree: the code silently trains plain OPD where only one of two reference paths is
set, and for unknown domain tags; here both are errors. It averages tokens per micro-batch of one sequence
(`sequence_mean`); the text says token mean, which is the default. With several updates per batch the code keeps the
old log-prob in A_t; here A_t uses the present one.

Safeguards that are not in the paper, off by default: `guard_entropy` and `guard_top1` set lambda to 1 where the teacher is
nearly certain, since near-deterministic format tokens collapse first beyond an extrapolation limit (arXiv 2605.08737);
`baseline` subtracts a detached constant that leaves the expected gradient unchanged (at the optimum every advantage
equals log Z_lambda(s), which only adds variance).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from surpass.learn.aggregate import Loss
from surpass.methods.base import Needs
from surpass.methods.opd import OPD
from surpass.methods.run import Run, Weight
from surpass.records import Rollouts
from surpass.roles.distribution import log_normaliser
from surpass.roles.scoring import Want


@dataclass(kw_only=True)
class ExOPD(OPD):
    """On-policy distillation with reward extrapolation (G-OPD, arXiv 2602.12125)."""

    reward_scale: float = 1.25
    """lambda: weight of the reward log teacher/reference against the KL to the reference."""
    reward_scale_start: float | None = None
    """lambda at step 0, rising linearly to `reward_scale`; null: fixed."""
    reward_scale_steps: int = 0
    """Steps over which lambda rises from `reward_scale_start`."""
    guard_entropy: float | None = None
    """lambda is 1 on tokens where the teacher's entropy is below this many nats (0.5 is usual)."""
    guard_top1: float | None = None
    """lambda is 1 on tokens where the teacher's largest probability is above this (0.9 is usual)."""
    baseline: Literal["none", "batch_mean", "log_normaliser"] = "none"
    """Detached constant subtracted from the sampled advantage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.reward_scale_start is None) != (self.reward_scale_steps == 0):
            raise ValueError(
                "a schedule of lambda needs both method.reward_scale_start and method.reward_scale_steps"
            )
        if self.estimator == "top_k" and self.tail == "drop" and self.needs().reference:
            raise ValueError(
                "tail 'drop' needs the target's normaliser over the whole vocabulary, which a top-k of two roles does not "
                "give; choose method.tail bucket or renormalise, or estimator full"
            )
        if self.baseline != "none" and self.estimator != "sampled":
            raise ValueError(
                f"baseline {self.baseline!r} reduces the variance of the sampled estimator; estimator "
                f"{self.estimator!r} has no sampled advantage to subtract it from"
            )

    @property
    def guarded(self) -> bool:
        return self.guard_entropy is not None or self.guard_top1 is not None

    def scale(self, step: int) -> float:
        """lambda of a training step."""
        if self.reward_scale_start is None:
            return self.reward_scale
        share = min(1.0, step / self.reward_scale_steps)
        return self.reward_scale_start + share * (self.reward_scale - self.reward_scale_start)

    def needs(self) -> Needs:
        always_one = self.reward_scale == 1.0 and self.reward_scale_start in (None, 1.0)
        return Needs(teacher=True, reference=not always_one, sampler_law=self.estimator == "sampled")

    def want(self) -> Want:
        hidden = self.estimator == "full" or self.baseline == "log_normaliser"
        return Want(hidden=hidden, entropy=self.guarded)

    def weights(self, run: Run, batch: Rollouts) -> dict[str, Weight]:
        scale: Weight = self.scale(run.step)
        if self.guarded:
            scale = torch.where(self.held(batch), 1.0, torch.tensor(scale))
            return {"teacher": scale, "reference": 1.0 - scale}
        return {"teacher": scale, "reference": 1.0 - scale}

    def held(self, batch: Rollouts) -> Tensor:
        """`[T]` bool: tokens on which the guard keeps lambda at 1."""
        teacher = batch.scores["teacher"]
        assert teacher.entropy is not None and teacher.top1 is not None
        held = torch.zeros_like(teacher.entropy, dtype=torch.bool)
        if self.guard_entropy is not None:
            held |= teacher.entropy < self.guard_entropy
        if self.guard_top1 is not None:
            held |= teacher.top1 > self.guard_top1
        return held

    def loss(self, run: Run, batch: Rollouts) -> Loss:
        loss = super().loss(run, batch)
        if self.guarded:
            loss.metrics["guard_share"] = self.held(batch).float()
        return loss

    def score(self, run: Run, rollouts: Rollouts) -> Rollouts:
        rollouts = super().score(run, rollouts)
        if self.baseline != "batch_mean":
            return rollouts
        if "old" not in rollouts.scores:
            rollouts = run.score(rollouts, "old")
        old = rollouts.scores["old"].logp
        assert old is not None
        advantage = rollouts.ragged(super().advantage(run, rollouts, old, self.weights(run, rollouts)))
        # The mean over the *other* sequences: a baseline that saw its own sample would bias the gradient.
        total, count = advantage.sum(), advantage.lengths
        others = (total.sum() - total) / (count.sum() - count).clamp(min=1)
        return rollouts.with_(sequence={"baseline": others})

    def advantage(self, run: Run, batch: Rollouts, logp: Tensor, weights: dict[str, Weight]) -> Tensor:
        advantage = super().advantage(run, batch, logp, weights)
        if self.baseline == "batch_mean":
            advantage = advantage - batch.response.expand(batch.sequence["baseline"]).to(advantage.device)
        if self.baseline == "log_normaliser":
            log_z = log_normaliser(batch, weights, lambda role: run.role(role).head, run.temperature)
            advantage = advantage - log_z.to(advantage.device)
        return advantage
