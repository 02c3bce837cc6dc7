"""On-policy distillation: the student writes, the teacher grades every token.

    min_theta  E_{y ~ student} sum_t KL( student(. | s_t) || teacher(. | s_t) )

Source: arXiv 2306.13649 (on-policy data, reverse KL) and the 2025 recipe that runs it as reinforcement learning with
the per-token advantage `A_t = log teacher(y_t) - log student(y_t)`; arXiv 2602.12125 is the generalisation in `exopd`.
Each token is credited with its own divergence only (discount 0), as all published recipes do; `discount > 0` adds the
later tokens' advantages and is known not to help.

Estimators of the same gradient: `sampled` (policy gradient on the written token), `top_k` (analytic on a support) and
`full` (analytic on the whole vocabulary; the lowest variance, best when the teacher runs in this process).
Where code and text disagree: the cookbook takes log student from the sampler; here the trainer's own log-prob is
used and the sampler's mismatch is corrected by a truncated importance weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from surpass.learn.advantage import return_to_go
from surpass.learn.aggregate import Loss
from surpass.learn.divergence import Divergence
from surpass.learn.sampled import log_ratio_advantage
from surpass.learn.support import combine_support, top_k_log_linear_divergence
from surpass.learn.targets import log_linear_sampled
from surpass.learn.vocabulary import support_logp
from surpass.methods.base import Needs, PolicyGradient, divergence_metrics, kl_metrics
from surpass.methods.run import Run, Weight
from surpass.records import Prompt, Rollouts
from surpass.roles.distribution import roles_read
from surpass.roles.scoring import Want


@dataclass(kw_only=True)
class OPD(PolicyGradient):
    """On-policy distillation with reverse KL (arXiv 2306.13649, 2602.12125 at reward scale 1)."""

    estimator: Literal["sampled", "top_k", "full"] = "sampled"
    """Which estimator of the reverse-KL gradient."""
    top_k: int = 16
    """Size of the support of `top_k`."""
    support: Literal["student", "teacher", "union", "intersection"] = "student"
    """Whose most likely tokens form the support."""
    tail: Literal["drop", "renormalise", "bucket"] = "bucket"
    """What happens to the mass outside the support: dropped, both sides renormalised, or one shared extra entry."""
    discount: float = 0.0
    """Credit of later tokens' advantages (`sampled` only)."""

    def needs(self) -> Needs:
        return Needs(teacher=True, sampler_law=self.estimator == "sampled")

    def weights(self, run: Run, batch: Rollouts) -> dict[str, Weight]:
        """Exponents of the log-linear target, by role."""
        del run, batch
        return {"teacher": 1.0}

    def want(self) -> Want:
        """What the estimator reads from each role."""
        return Want(hidden=self.estimator == "full")

    def collect(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        rollouts = run.generate(prompts, self.samples)
        return self.score(run, rollouts)

    def score(self, run: Run, rollouts: Rollouts) -> Rollouts:
        """Ask everyone the target needs."""
        support = None
        if run.off_policy and self.estimator == "sampled":
            rollouts = run.score(rollouts, "old")
        if self.estimator == "top_k":
            rollouts, support = self.score_support(run, rollouts)
        rollouts = run.score(rollouts, "teacher", self.want(), support)
        if self.needs().reference:
            rollouts = run.score(rollouts, "reference", self.want(), support)
        return rollouts

    def support_size(self, run: Run) -> int:
        """How many tokens an owner's support has."""
        del run
        return self.top_k

    def score_support(self, run: Run, rollouts: Rollouts) -> tuple[Rollouts, Tensor]:
        """The support `[T, K]` by the owner's top-k; duplicates of a union are masked out in `loss`."""
        owners = {"student": ["old"], "teacher": ["teacher"]}.get(self.support, ["old", "teacher"])
        for owner in owners:
            rollouts = run.score(rollouts, owner, Want(top_k=self.support_size(run)))
        tops = [rollouts.scores[owner].support for owner in owners]
        assert tops[0] is not None and tops[-1] is not None
        ids, valid = combine_support(tops[0], tops[-1], self.support)
        # Vocabularies may be padded to different sizes: nobody is asked about a token that another does not have.
        shared = run.shared_vocabulary
        ids, valid = ids.clamp(max=shared - 1), valid & (ids < shared)
        return rollouts.with_(token={"support": ids, "support_valid": valid}), ids

    def loss(self, run: Run, batch: Rollouts) -> Loss:
        return self.distillation(run, batch, run.student_hidden(batch))

    def distillation(self, run: Run, batch: Rollouts, hidden: Tensor) -> Loss:
        """Reverse KL to the target on the student's own tokens, from its hidden states `[T, D]`."""
        weights = self.weights(run, batch)
        if self.estimator == "full":
            kl = run.divergence(
                batch, hidden, weights, Divergence("reverse_kl"), loss_weight=self.loss_weight(batch)
            )
            metrics = {**divergence_metrics(kl), "reverse_kl": kl.value.detach()}
            return Loss((self.term("reverse_kl", kl.value),), metrics)
        logp, entropy = run.student_logp(batch, hidden)
        metrics = {"entropy": entropy, **kl_metrics(batch, logp)}
        if self.estimator == "top_k":
            values, mass = self.support_divergence(run, batch, hidden, weights)
            return Loss((self.term("reverse_kl", values),), {**metrics, **mass})
        advantage = self.advantage(run, batch, logp.detach(), weights)
        values, more = self.surrogate(batch, logp, advantage)
        return Loss((self.term("policy_gradient", values),), {**metrics, **more})

    def advantage(self, run: Run, batch: Rollouts, logp: Tensor, weights: dict[str, Weight]) -> Tensor:
        """`A_t = sum_i w_i log p_i(y_t) - log student(y_t)` `[T]`, detached."""
        del run
        used = roles_read(weights)
        columns = [
            role_column(batch.scores[name].logp, name, batch.masks.get("trained")).to(logp.device)
            for name in used
        ]
        advantage = log_ratio_advantage(log_linear_sampled(columns, list(used.values())), logp)
        if self.discount:
            advantage = return_to_go(batch.ragged(advantage), self.discount)
        return advantage

    def support_divergence(
        self, run: Run, batch: Rollouts, hidden: Tensor, weights: dict[str, Weight]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reverse KL `[T]` on the stored support, and the mass it captures of either side."""
        ids, valid = batch.token["support"].to(hidden.device), batch.token["support_valid"].to(hidden.device)
        student = support_logp(hidden, run.student.head, ids, run.temperature)
        used = roles_read(weights)
        columns = [role_column(batch.scores[name].support_logp, name).to(hidden.device) for name in used]
        result = top_k_log_linear_divergence(
            Divergence("reverse_kl"), student, columns, list(used.values()), valid, self.tail
        )
        return result.value, {
            "support/student_mass": result.student_mass,
            "support/target_mass": result.target_mass,
        }


def role_column(values: Tensor | None, role: str, trained: Tensor | None = None) -> Tensor:
    """The scores of a role. trained: `[T]` bool, the tokens on which it must have one; None: all."""
    if values is None:
        raise ValueError(f"role {role!r} was not asked for the log-probs this estimator needs")
    missing = torch.isnan(values if trained is None else values[trained])
    if missing.any():
        raise ValueError(
            f"role {role!r} gave no score on {int(missing.sum())} entries; nothing is trained on them"
        )
    return values
