"""Rethinking OPD: reverse KL on a few likely tokens, an outcome beside it, and how far student and teacher agree.

    loss_t = sum_{k in K_t} sg( w_k (log student_k - log teacher_k) ) exp( log student_k - sg log student_k )

K_t are the k likeliest tokens of the student, of the teacher, of both (`intersection`), of either (`union`, each token
once), or of one alone (`difference`); w is a softmax over K_t of the student's or the teacher's log-probs, or 1. Over the
whole vocabulary with the student's weights this is the gradient of KL(student || teacher). On a part of it three
gradients differ, though each is called reverse KL on a top-k:

    raw     sum_k w_k (log S_k - log T_k) grad log S_k                     true log-probs in the ratio
    half    the same with S and T renormalised on K_t in the ratio
    exact   gradient of KL(S renormalised || T renormalised)

raw less half is `log(S(K)/T(K)) sum_k w_k grad log S_k`: it moves mass in or out of K_t, which exact never does.

Source: arXiv 2604.13016 and its code. Where they disagree: the paper's formula is `half`, the released code (and so the
reported numbers, and the default here) is `raw`. For `difference` the code leaves w unnormalised, as here.

A reward may join: `direct_grpo` adds `outcome_weight` times GRPO's advantage; on a support, where the code's sum over slots
would not be a policy gradient, it is the policy gradient of the written token, a term of its own. `token_grpo` reads the
log-ratio of each written token as its reward, adds `outcome_weight` times the answer's reward to the last one,
standardises over all tokens of the group and credits each token with the sum from it on; where exactly the outcome enters
is our reading.

The paper's repairs are recipes: a cold start (train on the teacher's own answers, then OPD: rethinking-cold-start.yaml,
rethinking-opd.yaml), and teacher-aligned prompts (the teacher's template by `data.teacher_template`, its RL prompts as a
domain with a share in `data.ratios`). Its warning is one too: a weak teacher pulls a strong student down
(rethinking-weak-to-strong.yaml). Agreement on likely tokens tells early which way a run goes; it is logged as `overlap/*`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from surpass.learn.advantage import group_standardised, return_to_go
from surpass.learn.aggregate import Loss
from surpass.learn.overlap import top_k_overlap
from surpass.learn.sampled import log_ratio_advantage
from surpass.learn.support import Owner, support_policy_gradient
from surpass.learn.vocabulary import support_logp
from surpass.methods.base import Needs
from surpass.methods.opd import OPD, role_column
from surpass.methods.run import Run, Weight
from surpass.records import Prompt, Rollouts
from surpass.roles.scoring import Want

OVERLAP = ("ratio", "student_mass", "teacher_mass", "advantage")


@dataclass(kw_only=True)
class RethinkingOPD(OPD):
    """On-policy distillation on top-k supports with overlap metrics and an optional outcome (arXiv 2604.13016)."""

    samples: int = 4
    """Answers to each prompt."""
    estimator: Literal["sampled", "top_k", "full"] = "top_k"
    """Which estimator of the reverse-KL gradient; `gradient`, `support` and `weighting` belong to `top_k`."""
    top_k: int = 16
    """Size of each side's support; cut to the vocabulary."""
    support: Owner = "student"
    """Whose most likely tokens form the support."""
    tail: Literal["drop", "renormalise", "bucket"] = "renormalise"
    """What happens to the mass outside the support under gradient `exact`."""
    gradient: Literal["raw", "half", "exact"] = "raw"
    """Which gradient on the support: of the released code, of the paper's formula, or of the divergence itself."""
    weighting: Literal["student_p", "teacher_p", "uniform"] = "student_p"
    """Weights w of the support's tokens under `raw` and `half`."""
    outcome: Literal["none", "direct_grpo", "token_grpo"] = "none"
    """How the reward of the answer joins the teacher's signal; `token_grpo` needs estimator `sampled`."""
    outcome_weight: float = 1.0
    """Weight of the outcome; at 0 no reward is needed."""
    monitor: int = 16
    """k of the `overlap/*` metrics, cut to the vocabulary; 0: not measured, which saves a forward of either side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient != "exact" and self.tail != "renormalise":
            raise ValueError(
                f"method.tail {self.tail!r} belongs to method.gradient exact; {self.gradient!r} reads no mass outside the "
                "support: leave tail at renormalise"
            )
        if self.gradient == "exact" and self.weighting != "student_p":
            raise ValueError(
                f"the exact gradient weighs tokens by the student, found method.weighting {self.weighting!r}; choose "
                "method.gradient raw or half for other weights"
            )
        if self.outcome == "token_grpo" and (self.estimator != "sampled" or self.discount):
            raise ValueError(
                "outcome token_grpo standardises the rewards of the written tokens and sums them up itself; it needs "
                f"method.estimator sampled and method.discount 0, found {self.estimator} and {self.discount}"
            )
        if self.outcome != "none" and self.samples < 2:
            raise ValueError(
                f"outcome {self.outcome!r} compares the answers to one prompt, found method.samples {self.samples}; "
                "set at least 2"
            )

    @property
    def rewarded(self) -> bool:
        return self.outcome != "none" and self.outcome_weight != 0

    def needs(self) -> Needs:
        sampled = self.estimator == "sampled" or (self.outcome == "direct_grpo" and self.rewarded)
        return Needs(teacher=True, reward=self.rewarded, sampler_law=sampled)

    def support_size(self, run: Run) -> int:
        return min(self.top_k, run.shared_vocabulary)

    def collect(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        rollouts = run.generate(prompts, self.samples)
        if self.rewarded:
            rollouts = run.reward(rollouts)
        return self.combine(run, self.score(run, rollouts))

    def score(self, run: Run, rollouts: Rollouts) -> Rollouts:
        return super().score(run, self.observe(run, rollouts) if self.monitor else rollouts)

    def observe(self, run: Run, rollouts: Rollouts) -> Rollouts:
        """Measure the agreement of student and teacher on the student's tokens, as token columns `overlap/*`."""
        want = Want(logp=False, entropy=True, top_k=min(self.monitor, run.shared_vocabulary))
        seen = run.score(run.score(rollouts, "old", want), "teacher", want).scores
        student, teacher = seen["old"], seen["teacher"]
        assert (
            student.support is not None and student.support_logp is not None and student.entropy is not None
        )
        assert (
            teacher.support is not None and teacher.support_logp is not None and teacher.entropy is not None
        )
        found = top_k_overlap(student.support, student.support_logp, teacher.support, teacher.support_logp)
        columns = {f"overlap/{name}": getattr(found, name) for name in OVERLAP}
        # Where they share no token there is no advantage to average.
        columns["overlap/advantage"] = found.advantage.masked_fill(found.count == 0, torch.nan)
        return rollouts.with_(token={**columns, "entropy_gap": (teacher.entropy - student.entropy).abs()})

    def combine(self, run: Run, rollouts: Rollouts) -> Rollouts:
        """Bring in the outcome, with statistics of whole groups. An answer without a reward has none."""
        reward = rollouts.reward if self.rewarded else None
        if self.outcome == "direct_grpo" and reward is not None:
            if run.off_policy and "old" not in rollouts.scores:
                rollouts = run.score(rollouts, "old")
            return rollouts.with_(sequence={"outcome": group_standardised(reward, rollouts.group)})
        if self.outcome != "token_grpo":
            return rollouts
        if "old" not in rollouts.scores:
            rollouts = run.score(rollouts, "old")
        teacher, old = rollouts.scores["teacher"].logp, rollouts.scores["old"].logp
        assert teacher is not None and old is not None
        signal = log_ratio_advantage(teacher, old)
        if reward is not None:
            answered = rollouts.lengths > 0
            last = (rollouts.response.offsets[1:] - 1)[answered]
            signal[last] += self.outcome_weight * reward.nan_to_num(0.0)[answered]
        standardised = group_standardised(signal, rollouts.response.expand(rollouts.group))
        return rollouts.with_(token={"advantage": return_to_go(rollouts.ragged(standardised), 1.0)})

    def advantage(self, run: Run, batch: Rollouts, logp: Tensor, weights: dict[str, Weight]) -> Tensor:
        if self.outcome == "token_grpo":
            return batch.token["advantage"].to(logp.device)
        advantage = super().advantage(run, batch, logp, weights)
        if "outcome" in batch.sequence:
            advantage = advantage + self.outcome_weight * self.outcome_advantage(batch).to(logp.device)
        return advantage

    def outcome_advantage(self, batch: Rollouts) -> Tensor:
        """GRPO's advantage of every token's answer `[T]`."""
        return batch.response.expand(batch.sequence["outcome"])

    def support_divergence(
        self, run: Run, batch: Rollouts, hidden: Tensor, weights: dict[str, Weight]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.gradient == "exact":
            return super().support_divergence(run, batch, hidden, weights)
        ids, valid = batch.token["support"].to(hidden.device), batch.token["support_valid"].to(hidden.device)
        student = support_logp(hidden, run.student.head, ids, run.temperature)
        teacher = role_column(batch.scores["teacher"].support_logp, "teacher").to(hidden.device)
        values = support_policy_gradient(
            student,
            teacher,
            valid,
            weighting={"student_p": "student", "teacher_p": "teacher", "uniform": "uniform"}[self.weighting],  # type: ignore[arg-type]
            log_ratio="raw" if self.gradient == "raw" else "renormalised",
            normalised=self.support != "difference",
        )
        mass = {
            name: logp.detach().exp().masked_fill(~valid, 0.0).sum(-1)
            for name, logp in (("support/student_mass", student), ("support/target_mass", teacher))
        }
        return values, mass

    def distillation(self, run: Run, batch: Rollouts, hidden: Tensor) -> Loss:
        loss = super().distillation(run, batch, hidden)
        observed = {k: v for k, v in batch.token.items() if k.startswith("overlap/") or k == "entropy_gap"}
        metrics = {**observed, **loss.metrics}
        if self.estimator == "sampled" or "outcome" not in batch.sequence:
            return Loss(loss.terms, metrics)
        logp, _ = run.student_logp(batch, hidden)
        values, more = self.surrogate(batch, logp, self.outcome_advantage(batch).to(logp.device))
        outcome = self.term("outcome", values, coefficient=self.outcome_weight)
        return Loss((*loss.terms, outcome), {**metrics, **more})
