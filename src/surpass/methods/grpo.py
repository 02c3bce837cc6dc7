"""GRPO: policy gradient with the group's own rewards as baseline.

    A_i = (r_i - mean(r)) / (std(r) + eps)          the same for every token of answer i
    loss_t = max( -A rho_t, -A clip(rho_t, 1 - low, 1 + high) ),   rho_t = exp(logp_t - old_logp_t)

Source: arXiv 2402.03300. Averaging follows the paper (mean per answer, then over answers); most code bases run it with
`token_mean`, which is an option. The standard deviation is the unbiased one (ddof 1), as in the common implementations;
the paper does not say. The clip is the usual 0.2 (one large run reports 10, that is almost none).
The KL term is named by the gradient it gives: `reverse` (half the squared log-ratio; gradient of KL(student || reference)) or
`forward` (exp(d) - d - 1; gradient of KL(reference || student), what the paper's "unbiased estimator" really gives
when differentiated).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from surpass.learn.advantage import group_mean, group_standardised, leave_one_out
from surpass.learn.aggregate import Loss, Term
from surpass.learn.sampled import forward_kl_k3, reverse_kl_k2
from surpass.methods.base import Needs, PolicyGradient, Reduction, kl_metrics
from surpass.methods.run import Run
from surpass.records import Prompt, Rollouts


@dataclass(kw_only=True)
class GRPO(PolicyGradient):
    """Group relative policy optimisation (arXiv 2402.03300)."""

    samples: int = 8
    """Answers to each prompt: the group."""
    reduction: Reduction = "sequence_mean"
    """How token losses are averaged; the paper's mean per answer, then over answers."""
    advantage: Literal["group_standardised", "group_mean", "leave_one_out"] = "group_standardised"
    """Baseline and scale of the reward within its group."""
    ddof: int = 1
    """Degrees of freedom taken off in the standard deviation: 1 unbiased, 0 population."""
    epsilon: float = 1e-6
    """Added to the standard deviation."""
    kl_coefficient: float = 0.0
    """Weight of the KL to the reference; 0 never reads the reference."""
    kl_gradient: Literal["reverse", "forward"] = "reverse"
    """Which KL the term's gradient is of."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 2:
            raise ValueError(
                f"a group needs at least 2 answers to be its own baseline, found method.samples {self.samples}"
            )

    def needs(self) -> Needs:
        return Needs(reward=True, reference=self.kl_coefficient != 0, sampler_law=True)

    def collect(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        rollouts = super().collect(run, prompts)
        return self.with_advantage(rollouts)

    def with_advantage(self, rollouts: Rollouts) -> Rollouts:
        """Group statistics on whole groups, before anything is dropped; unjudged answers are not trained on."""
        assert rollouts.reward is not None
        advantage = self.advantages(rollouts.reward, rollouts.group)
        judged = ~torch.isnan(rollouts.reward)
        trained = rollouts.response.expand(judged) & rollouts.mask("student")
        return rollouts.with_(sequence={"advantage": advantage}, masks={"trained": trained})

    def advantages(self, reward: Tensor, group: Tensor) -> Tensor:
        """`[N]` rewards and group ids to `[N]` advantages."""
        if self.advantage == "group_standardised":
            return group_standardised(reward, group, ddof=self.ddof, epsilon=self.epsilon)
        return {"group_mean": group_mean, "leave_one_out": leave_one_out}[self.advantage](reward, group)

    def loss(self, run: Run, batch: Rollouts) -> Loss:
        logp, entropy = run.student_logp(batch)
        advantage, weighed = self.token_advantage(batch, logp)
        values, metrics = self.surrogate(batch, logp, advantage)
        terms: list[Term] = [self.term("policy_gradient", values, "trained")]
        if self.kl_coefficient:
            reference = batch.scores["reference"].logp
            assert reference is not None
            estimate = reverse_kl_k2 if self.kl_gradient == "reverse" else forward_kl_k3
            kl = estimate(logp, reference.to(logp.device))
            terms.append(self.term(f"{self.kl_gradient}_kl", kl, "trained", self.kl_coefficient))
        return Loss(tuple(terms), {"entropy": entropy, **kl_metrics(batch, logp), **weighed, **metrics})

    def token_advantage(self, batch: Rollouts, logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`[T]`, detached, and what was measured on the way; `logp` `[T]` is the present student's."""
        return batch.response.expand(batch.sequence["advantage"]).to(logp.device), {}
