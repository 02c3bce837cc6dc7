"""Uni-OPD: on-policy distillation whose advantages are calibrated by the outcome.

    G_i = mean_t A_it                                the teacher's verdict on answer i
    gap = stat{ G_i : correct } - stat{ G_i : incorrect }
    A_it += s_i,   s_i = +share (delta - gap) if correct, -(1 - share) (delta - gap) if not,   where gap < delta

so that in every group the correct answers lead the incorrect ones by delta; the statistic is the mean, or the least
correct against the greatest incorrect. Beside it: the class in excess is thinned at random to a given
correct : incorrect ratio, and tokens on which student and teacher are further apart than `outlier` nats get no
advantage. `calibration: mask` drops the answers that narrow the gap most instead of shifting.

Source: arXiv 2605.03677. On the student's side it also flattens the difficulty of the prompts before training
(`surpass.prompts.difficulty.flat_difficulty`). `reward_scale` above 1 calibrates the advantages of ExOPD (2602.12125).

Where the paper and its code disagree: the margin of the paper is `minmax`, the scripts that made its results use
`mean`, the default here. Followed: thinned answers still enter the margin's statistics, tokens beyond `outlier` keep
their place in their answer's average, and dropped answers (`mask`) theirs in the batch's; thinned answers have none.
Not followed: the code lets answers on which the teacher failed enter as G = 0, counts answers that nobody judged as
incorrect when it thins, and ignores the direction in a single process. Here an answer that the teacher did not score is
not trained at all, one that nobody judged is trained by plain distillation, and neither enters any statistic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from surpass.learn.aggregate import Loss
from surpass.learn.weights import Direction, Statistic, balanced, margin_mask, margin_shift
from surpass.methods.base import Needs, Reduction
from surpass.methods.exopd import ExOPD
from surpass.methods.run import Run, Weight
from surpass.records import Prompt, Rollouts
from surpass.rollout.sampling import sequence_seed

Scope = Literal["group", "batch"]


@dataclass(kw_only=True)
class UniOPD(ExOPD):
    """On-policy distillation with outcome-guided margin calibration (Uni-OPD, arXiv 2605.03677)."""

    samples: int = 16
    """Answers to each prompt: the group."""
    reduction: Reduction = "sequence_mean"
    """Mean over each answer's tokens, then over answers."""
    clip_high: float = 0.28
    """Ratios above `1 + clip_high` get no gradient where the advantage is positive."""
    reward_scale: float = 1.0
    """lambda: 1 calibrates plain distillation (no reference is read), above 1 ExOPD."""
    calibration: Literal["none", "shift", "mask"] = "shift"
    """Shift advantages until the margin is reached, or drop the answers in its way."""
    margin: float = 0.4
    """delta: by how much correct answers are to lead, in nats per token."""
    margin_scope: Scope = "group"
    """Answers whose returns are compared: those to one prompt, or all."""
    statistic: Statistic = "mean"
    """What of either class is compared: the means, or the least correct and the greatest incorrect return."""
    direction: Direction = "both"
    """Which class is shifted; `both`: half of the lack each."""
    least_kept: float = 0.25
    """Share of a group that `calibration: mask` leaves at least."""
    balance_ratio: float | None = 1.0
    """Correct answers per incorrect one, the excess left out at random; 0: incorrect alone, .inf: correct alone."""
    balance_scope: Scope = "group"
    """Where the ratio holds: within each group, or over the batch."""
    outlier: float | None = 10.0
    """Tokens with |log student - log teacher| of at least this get no advantage; null: none is left out."""
    correct_above: float = 0.5
    """An answer is correct where its reward is above this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimator != "sampled":
            raise ValueError(
                f"margins shift the sampled advantage, and estimator {self.estimator!r} has none; set estimator sampled"
            )
        if self.balance_ratio is not None and not self.balance_ratio >= 0:
            raise ValueError(f"method.balance_ratio is at least 0, found {self.balance_ratio}")
        if not 0 < self.least_kept <= 1:
            raise ValueError(f"method.least_kept is a share in (0, 1], found {self.least_kept}")
        if self.outlier is not None and not self.outlier > 0:
            raise ValueError(
                f"method.outlier is above 0 nats, found {self.outlier}; null leaves no token out"
            )
        if self.samples == 1 and "group" in self.scopes:
            raise ValueError(
                "a group of one answer has no correct and incorrect ones to compare; raise method.samples, or set "
                "method.margin_scope and method.balance_scope batch"
            )

    @property
    def scopes(self) -> set[Scope]:
        """The scopes in use."""
        margin: set[Scope] = set() if self.calibration == "none" else {self.margin_scope}
        return margin if self.balance_ratio is None else {*margin, self.balance_scope}

    def needs(self) -> Needs:
        return replace(super().needs(), reward=bool(self.scopes))

    def collect(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        rollouts = run.generate(prompts, self.samples)
        if self.needs().reward:
            rollouts = run.reward(rollouts)
        return self.calibrate(run, self.score(run, rollouts))

    def calibrate(self, run: Run, rollouts: Rollouts) -> Rollouts:
        """Adds the stream `trained`, and per answer its `shift` or whether it is `kept`."""
        teacher = rollouts.scores["teacher"].logp
        assert teacher is not None
        scored = rollouts.ragged(teacher.isnan()).sum() == 0
        trained = rollouts.mask("student") & rollouts.response.expand(scored)
        correct = torch.full((len(rollouts),), torch.nan)
        if rollouts.reward is not None:
            known = scored & ~rollouts.reward.isnan()
            correct = torch.where(known, (rollouts.reward > self.correct_above).float(), correct)
        if self.calibration != "none":
            rollouts = self.with_margin(run, rollouts.with_(masks={"trained": trained}), correct)
        if self.balance_ratio is not None:
            generator = torch.Generator().manual_seed(sequence_seed(run.seed, run.step, "balance", 0))
            kept = balanced(correct, _ids(rollouts, self.balance_scope), self.balance_ratio, generator)
            run.metrics["balance/kept"] = float(kept.float().mean())
            trained = trained & rollouts.response.expand(kept)
        return rollouts.with_(masks={"trained": trained})

    def with_margin(self, run: Run, rollouts: Rollouts, correct: Tensor) -> Rollouts:
        """Adds the margin's `shift` or `kept` `[N]`. correct: `[N]` 1, 0, NaN where unknown."""
        returns = self.returns(run, rollouts)
        right, wrong = returns[correct == 1], returns[correct == 0]
        if len(right) and len(wrong):
            run.metrics["margin/gap"] = float(right.mean() - wrong.mean())
            order = (right.unsqueeze(1) > wrong).float() + (right.unsqueeze(1) == wrong).float() / 2
            run.metrics["margin/order"] = float(order.mean())
        given = (returns, correct, _ids(rollouts, self.margin_scope), self.margin, self.statistic)
        if self.calibration == "mask":
            kept = margin_mask(*given, self.least_kept)
            run.metrics["margin/kept"] = float(kept.float().mean())
            return rollouts.with_(sequence={"kept": kept})
        shift = margin_shift(*given, self.direction)
        run.metrics["margin/shifted"] = float((shift != 0).float().mean())
        return rollouts.with_(sequence={"shift": shift})

    def returns(self, run: Run, rollouts: Rollouts) -> Tensor:
        """`[N]` mean advantage of each answer's trained tokens, NaN where it has none."""
        old = rollouts.scores.get("old") or run.score(rollouts, "old").scores["old"]
        assert old.logp is not None
        advantage = super().advantage(run, rollouts, old.logp, self.weights(run, rollouts))
        trained = rollouts.mask("trained")
        total = rollouts.ragged(torch.where(trained, advantage, torch.zeros_like(advantage))).sum()
        return total / rollouts.ragged(trained).sum()

    def advantage(self, run: Run, batch: Rollouts, logp: Tensor, weights: dict[str, Weight]) -> Tensor:
        advantage = super().advantage(run, batch, logp, weights)
        if "shift" in batch.sequence:
            advantage = advantage + batch.response.expand(batch.sequence["shift"]).to(advantage.device)
        if "kept" in batch.sequence:
            kept = batch.response.expand(batch.sequence["kept"]).to(advantage.device)
            advantage = torch.where(kept, advantage, torch.zeros_like(advantage))
        if self.outlier is not None:
            apart = self.apart(batch, logp) >= self.outlier
            advantage = torch.where(apart, torch.zeros_like(advantage), advantage)
        return advantage

    def apart(self, batch: Rollouts, logp: Tensor) -> Tensor:
        """`[T]` nats between the present student and the teacher."""
        teacher = batch.scores["teacher"].logp
        assert teacher is not None
        return (logp - teacher.to(logp.device)).abs()

    def loss(self, run: Run, batch: Rollouts) -> Loss:
        loss = super().loss(run, batch)
        return Loss(tuple(replace(term, stream="trained") for term in loss.terms), loss.metrics)


def _ids(rollouts: Rollouts, scope: Scope) -> Tensor:
    return rollouts.group if scope == "group" else torch.zeros_like(rollouts.group)
