"""What a method is: a dataclass of hyper-parameters with two functions, `collect` and `loss`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from surpass.learn.aggregate import Loss, Term
from surpass.learn.surrogate import Clipped, ppo_clip, truncated_importance_weight
from surpass.learn.vocabulary import VocabularyDivergence
from surpass.methods.run import Run
from surpass.prompts.views import Kind as ViewKind
from surpass.records import Prompt, Rollouts
from surpass.roles.scoring import Want

Reduction = Literal["token_mean", "sequence_mean", "sequence_sum", "constant_length"]


@dataclass(frozen=True)
class Needs:
    """What a run must have for a method at its present settings; checked before anything is loaded.

    sampler_law: the loss uses probabilities of the sampled tokens, so sampling must follow the law that the loss
    differentiates: no truncation, and the same temperature. routed: each prompt has one teacher, that of its domain;
    False: all teachers speak on every prompt.
    """

    teacher: bool = False
    reference: bool = False
    reward: bool = False
    response: bool = False
    rollouts: bool = True
    sampler_law: bool = False
    routed: bool = True


@dataclass(frozen=True)
class RoleSpec:
    """A role a method makes of the student itself, built together with the run.

    source: whose weights. `initial`: the student's before training; `live`: its present ones; `ema`: their
    moving average, keeping the share `keep` of the old one per update; `copy`: taken anew every `updates`.
    view: name of the context it reads; None: the student's own prompt.
    A role called `teacher` speaks where no teacher was given.
    """

    source: Literal["initial", "live", "ema", "copy"]
    view: ViewKind | None = None
    keep: float | None = None
    updates: int | None = None

    def __post_init__(self) -> None:
        if (self.source == "ema") != (self.keep is not None):
            raise ValueError(f"keep belongs to source 'ema' alone; found {self.source!r}, keep {self.keep}")
        if (self.source == "copy") != (self.updates is not None):
            raise ValueError(
                f"updates belongs to source 'copy' alone; found {self.source!r}, updates {self.updates}"
            )


@dataclass(kw_only=True)
class Method:
    """Base of all methods. A method states only what is its own; these defaults cover the common case."""

    samples: int = 1
    """Answers to each prompt."""
    reduction: Reduction = "token_mean"
    """How token losses are averaged over one optimiser update (all micro-batches, all ranks)."""
    horizon: int | None = None
    """Constant length of `constant_length`, in tokens; null for every other reduction."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"method.samples must be at least 1, found {self.samples}")
        if (self.reduction == "constant_length") != (self.horizon is not None):
            raise ValueError(
                f"method.horizon is the constant length of reduction constant_length: found {self.reduction} with "
                f"horizon {self.horizon}; set both (for example 3000 tokens) or neither"
            )

    def needs(self) -> Needs:
        """What the run must provide at these settings."""
        return Needs()

    def roles(self) -> dict[str, RoleSpec]:
        """Roles made of the student itself, by name; nothing by default."""
        return {}

    def prepare(self, run: Run) -> None:
        """Once before the first step of a new run (a resumed one has its `state_dict` back); nothing by default."""

    def collect(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        """Write, judge, score and weigh, without gradient."""
        needs = self.needs()
        rollouts = run.generate(prompts, self.samples)
        if needs.reward:
            rollouts = run.reward(rollouts)
        if run.off_policy and needs.sampler_law:
            rollouts = run.score(rollouts, "old")
        if needs.teacher:
            rollouts = run.score(rollouts, "teacher", Want())
        if needs.reference:
            rollouts = run.score(rollouts, "reference", Want())
        return rollouts

    def loss(self, run: Run, batch: Rollouts) -> Loss:
        """Named terms on one micro-batch, per token and un-reduced, with gradient through the student only."""
        raise NotImplementedError(f"{type(self).__name__} does not define its loss")

    def state_dict(self) -> dict[str, Any]:
        """What a method remembers between steps (curricula, stores), as JSON; nothing by default."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but the checkpoint has {sorted(state)}")

    def loss_weight(self, batch: Rollouts, stream: str = "student") -> Tensor:
        """`[T]`: what this method's averaging multiplies each token of `stream` by, up to a common factor."""
        mask = batch.mask(stream)
        if self.reduction != "sequence_mean":
            return mask.float()
        trained = batch.ragged(mask).sum().clamp(min=1)
        return mask / batch.response.expand(trained)

    def term(self, name: str, values: Tensor, stream: str = "student", coefficient: float = 1.0) -> Term:
        """A loss term with this method's averaging over the tokens of `stream`."""
        return Term(name, values, stream, self.reduction, coefficient, self.horizon)


@dataclass(kw_only=True)
class PolicyGradient(Method):
    """Methods that turn a per-token advantage into a clipped policy gradient."""

    clip_low: float = 0.2
    """Ratios below `1 - clip_low` get no gradient where the advantage is negative."""
    clip_high: float = 0.2
    """Ratios above `1 + clip_high` get no gradient where the advantage is positive."""
    dual_clip: float | None = 3.0
    """Ratios above this get no gradient where the advantage is negative; null: no such bound."""
    sampler_cap: float | None = 5.0
    """Cap of the truncated importance weight trainer / sampler; null: no correction."""

    def needs(self) -> Needs:
        return Needs(sampler_law=True)

    def surrogate(self, batch: Rollouts, logp: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped surrogate loss `[T]` and its metrics. On-policy (no `old` scores) the ratio is exactly 1."""
        old = old_logp(batch, logp)
        values, clipped = self.clip(batch, logp, old, advantage)
        metrics = {"clip_ratio": clipped.float(), "advantage": advantage}
        weight = self.sampler_weight(batch, old)
        if weight is not None:
            values = values * weight
            metrics["sampling/importance_weight"] = weight
        return values, metrics

    def clip(self, batch: Rollouts, logp: Tensor, old: Tensor, advantage: Tensor) -> Clipped:
        """The clipped loss `[T]` of the ratio to `old`, before the sampler is corrected for; per token here."""
        del batch
        return ppo_clip(logp, old, advantage, self.clip_low, self.clip_high, self.dual_clip)

    def sampler_weight(self, batch: Rollouts, old: Tensor) -> Tensor | None:
        """Detached truncated importance weight `[T]` between the trainer's and the sampler's law."""
        if self.sampler_cap is None:
            return None
        return truncated_importance_weight(old, batch.sampler_logp.to(old.device), self.sampler_cap)


def old_logp(batch: Rollouts, logp: Tensor) -> Tensor:
    """Log-probs `[T]` before the first update on this batch; the present ones, detached, where it is the first."""
    old = batch.scores.get("old")
    if old is None or old.logp is None:
        return logp.detach()
    return old.logp.to(logp.device)


def kl_metrics(batch: Rollouts, logp: Tensor) -> dict[str, Tensor]:
    """Sampled-token log-ratio to each scored role `[T]`; its mean estimates KL(student || role)."""
    return {
        f"kl/{name}": logp.detach() - scores.logp.to(logp.device)
        for name, scores in batch.scores.items()
        if scores.logp is not None and name != "old" and not torch.isnan(scores.logp).all()
    }


def divergence_metrics(divergence: VocabularyDivergence) -> dict[str, Tensor]:
    """What a full-vocabulary divergence measures on the way, `[T]` each."""
    return {
        "entropy": divergence.student_entropy,
        "target_entropy": divergence.target_entropy,
        "top1_agreement": divergence.top1_agreement,
        "student_dropped": divergence.student_dropped,
        "target_dropped": divergence.target_dropped,
    }
