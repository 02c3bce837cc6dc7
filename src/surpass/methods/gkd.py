"""GKD: generalised knowledge distillation, on the student's own text or on given text, with any divergence.

    u ~ U(0, 1) once per batch;  y ~ student(. | x) where u < lambda, else y from the data set or the teacher
    min_theta  E_y 1/|y| sum_t D( teacher(. | s_t), student(. | s_t) )

D is forward KL, reverse KL, JSD_beta or one of their relatives, over the whole vocabulary. Sampled text is data: the
gradient goes through the student's distributions on it, not through the sampling. With a reward, alpha < 1 maximises

    (1 - alpha) E_{y ~ student}[ r(y) ] - alpha E_y[ D ]

by a policy gradient with a leave-one-out baseline, on the batches the student wrote.

Source: arXiv 2306.13649. lambda = 1 was best there; forward KL was used for reasoning, JSD(0.1) for translation,
reverse KL for instructions, and reverse KL or JSD(0.9) is advised beside a reward. Where the paper and the common code
disagree, the paper is followed: sampling temperature 1 (code: 0.9), lambda = 1 (code: 0.5), tokens averaged per answer
(code: over the batch, `reduction: token_mean`). The code reads JSD at beta 0 and 1 as forward and reverse KL, to which
JSD_beta does not converge; here a divergence is chosen by name. The paper leaves the policy gradient open; its
importance ratio (1 on the first update of a batch) is not clipped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from surpass.learn.advantage import leave_one_out
from surpass.learn.aggregate import Loss, Term
from surpass.learn.divergence import Divergence, Kind
from surpass.learn.surrogate import importance_sampling
from surpass.methods.base import Needs, old_logp
from surpass.methods.run import Run
from surpass.methods.supervised_kd import SupervisedKD
from surpass.records import Prompt, Rollouts
from surpass.rollout.sampling import sequence_seed


@dataclass(kw_only=True)
class GKD(SupervisedKD):
    """Generalised knowledge distillation (arXiv 2306.13649)."""

    on_policy_share: float = 1.0
    """lambda: the probability that the student writes a batch; otherwise it is given text (`text`)."""
    divergence: Kind = "forward_kl"
    """Which divergence."""
    beta: float | None = None
    """Parameter of `jsd` and its relatives; null for forward and reverse KL."""
    distillation_share: float = 1.0
    """alpha: weight of the divergence against the reward, which gets the rest; at 1 no reward is needed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.on_policy_share <= 1:
            raise ValueError(f"method.on_policy_share is a probability, found {self.on_policy_share}")
        if not 0 < self.distillation_share <= 1:
            raise ValueError(
                f"method.distillation_share lies in (0, 1], found {self.distillation_share}; without any distillation, "
                "choose the method rloo"
            )
        if self.rewarded and self.on_policy_share == 0:
            raise ValueError(
                "the reward is that of the student's own answers, and method.on_policy_share 0 has none; raise it, or "
                "set method.distillation_share 1"
            )
        if self.cross_entropy and self.on_policy_share == 1:
            raise ValueError(
                "method.cross_entropy trains on given text, and with method.on_policy_share 1 there is none; lower "
                "the share, or set method.cross_entropy 0"
            )
        self.divergence_kind()

    @property
    def student_writes(self) -> bool:
        return self.on_policy_share > 0

    @property
    def rewarded(self) -> bool:
        return self.distillation_share < 1

    def divergence_kind(self) -> Divergence:
        return Divergence(self.divergence, self.beta)

    def needs(self) -> Needs:
        given = self.on_policy_share < 1
        return Needs(
            teacher=True,
            reward=self.rewarded,
            response=given and self.text == "data",
            rollouts=self.student_writes or self.text == "teacher",
            sampler_law=self.rewarded,
        )

    def on_policy(self, run: Run) -> bool:
        """Whether the student writes the batch of this step: a draw that depends on the seed and the step alone."""
        generator = torch.Generator().manual_seed(sequence_seed(run.seed, run.step, "on_policy", 0))
        return bool(torch.rand((), generator=generator) < self.on_policy_share)

    def collect(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        own = self.on_policy(run)
        run.metrics["on_policy"] = float(own)
        if not own:
            return self.ask_teacher(run, self.given_text(run, prompts))
        rollouts = run.generate(prompts, self.samples)
        if self.rewarded:
            rollouts = self.with_advantage(run.reward(rollouts))
            if run.off_policy:
                rollouts = run.score(rollouts, "old")
        return self.ask_teacher(run, rollouts)

    def with_advantage(self, rollouts: Rollouts) -> Rollouts:
        """The reward less the mean of the prompt's other answers (of the batch's others where each prompt has one)."""
        assert rollouts.reward is not None
        group = rollouts.group if self.samples > 1 else torch.zeros_like(rollouts.group)
        judged = rollouts.response.expand(~torch.isnan(rollouts.reward))
        return rollouts.with_(
            sequence={"advantage": leave_one_out(rollouts.reward, group)}, masks={"judged": judged}
        )

    def loss(self, run: Run, batch: Rollouts) -> Loss:
        hidden = run.student_hidden(batch)
        loss = self.distillation(run, batch, hidden)
        if not self.rewarded:
            return loss
        share = self.distillation_share
        terms = [replace(term, coefficient=share * term.coefficient) for term in loss.terms]
        if "advantage" in batch.sequence:
            logp, _ = run.student_logp(batch, hidden)
            advantage = batch.response.expand(batch.sequence["advantage"]).to(logp.device)
            values = importance_sampling(logp, old_logp(batch, logp), advantage)
            # The gradient of E[r] is a sum over tokens, however the divergence is averaged.
            terms.append(Term("policy_gradient", values, "judged", "sequence_sum", 1 - share))
        return Loss(tuple(terms), loss.metrics)
