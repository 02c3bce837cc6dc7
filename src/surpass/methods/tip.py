"""TIP: distillation on the tokens that carry a signal, by the student's entropy and its distance from the teacher.

    h_t = H(student), cut at its 98th percentile,   delta_t = KL(student || teacher)
    h, delta brought to [0, 1] over the batch's response tokens
    score = h + delta - h delta   (soft_or)
    min_theta  mean of KL( student || teacher ) over the floor(rho T) tokens with the highest score

Further scores: `entropy` (h), `divergence` (delta), and `q3` (KL(teacher || student) (1 - h): confident and wrong, which
entropy alone never selects). Scores are taken once per batch, without gradient; of all other tokens neither the student's
nor the stored teacher's states ever reach a head, so memory falls with rho.

Source: arXiv 2604.14084. rho 0.5 with soft_or was best there; 0.2 and 0.1 come close. Where the paper and its code
disagree, the paper is followed: the released worker averages all tokens and never calls its selector, and it divides by
the number of active micro-batches; here the mean is over the kept tokens of the whole update. What the released helper
does is `selection: drawn`: tokens drawn without replacement with chances h^alpha (JSD / ln 2)^gamma. The repository's
reward-weighted variant (`reward_temperature`) weighs answers by `B softmax(reward / beta)`; it averages each answer's
tokens first, which is `reduction: sequence_mean`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from surpass.learn.aggregate import Loss
from surpass.learn.divergence import Divergence
from surpass.learn.weights import drawn_share, min_max, soft_or, softmax_weights, top_share
from surpass.methods.base import Method, Needs, divergence_metrics
from surpass.methods.run import Run, Weight
from surpass.records import Hidden, Prompt, Rollouts
from surpass.roles.scoring import Want
from surpass.rollout.sampling import sequence_seed

TARGET: dict[str, Weight] = {"teacher": 1.0}
REVERSE_KL = Divergence("reverse_kl")


@dataclass(kw_only=True)
class TIP(Method):
    """On-policy distillation on the most important tokens (TIP, arXiv 2604.14084)."""

    share: float = 0.5
    """rho: share of the batch's response tokens that are trained; 1 is on-policy distillation over all of them."""
    score: Literal["soft_or", "entropy", "q3", "divergence"] = "soft_or"
    """What makes a token important, for `selection: top`."""
    selection: Literal["top", "drawn"] = "top"
    """The highest scores, or a draw in proportion to `h^entropy_power (JSD / ln 2)^divergence_power`."""
    percentile: float = 0.98
    """Entropies above this quantile of the batch are cut to it; 1 cuts none."""
    entropy_power: float = 1.0
    """alpha of `selection: drawn`."""
    divergence_power: float = 1.0
    """gamma of `selection: drawn`."""
    reward_temperature: float | None = None
    """beta: answers are weighed by softmax(reward / beta) over the batch; null: all alike, and no reward is needed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"method.share is a share of tokens in (0, 1], found {self.share}")
        if not 0 < self.percentile <= 1:
            raise ValueError(f"method.percentile lies in (0, 1], found {self.percentile}")
        if self.reward_temperature is not None and self.reward_temperature <= 0:
            raise ValueError(
                f"method.reward_temperature is above 0, found {self.reward_temperature}; null weighs all answers alike"
            )
        drawn = self.entropy_power != 1.0 or self.divergence_power != 1.0
        if drawn and self.selection == "top":
            raise ValueError(
                "method.entropy_power and method.divergence_power belong to selection drawn; found selection top"
            )

    def needs(self) -> Needs:
        return Needs(teacher=True, reward=self.reward_temperature is not None)

    def collect(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        rollouts = run.generate(prompts, self.samples)
        if self.reward_temperature is not None:
            rollouts = self.with_weight(run.reward(rollouts), self.reward_temperature)
        rollouts = run.score(rollouts, "teacher", Want(logp=False, hidden=True))
        return rollouts if self.share == 1 else self.select(run, rollouts)

    def with_weight(self, rollouts: Rollouts, temperature: float) -> Rollouts:
        """Adds `weight` `[N]`, mean 1 over the judged answers; the others are not trained."""
        assert rollouts.reward is not None
        judged = rollouts.response.expand(~rollouts.reward.isnan())
        weight = softmax_weights(rollouts.reward, temperature)
        return rollouts.with_(
            sequence={"weight": weight}, masks={"trained": rollouts.mask("student") & judged}
        )

    def select(self, run: Run, rollouts: Rollouts) -> Rollouts:
        """Cut the stream `trained`, and what is stored of the teacher, down to the most important tokens."""
        candidates = (
            rollouts.mask("trained" if "trained" in rollouts.masks else "student").nonzero().squeeze(1)
        )
        chosen = candidates[self.chosen(run, rollouts, candidates)]
        kept = torch.zeros(len(rollouts.response.values), dtype=torch.bool)
        kept[chosen] = True
        run.metrics["tokens_kept"] = len(chosen) / max(len(candidates), 1)
        teacher = rollouts.scores["teacher"]
        hidden = tuple(_cut(part, kept) for part in teacher.hidden)
        return rollouts.with_(masks={"trained": kept}, scores={"teacher": replace(teacher, hidden=hidden)})

    def chosen(self, run: Run, rollouts: Rollouts, candidates: Tensor) -> Tensor:
        """`[t]` bool: which of the candidate tokens `[t]` are trained."""
        kind = Divergence("jsd", 0.5) if self.selection == "drawn" else REVERSE_KL
        if self.selection == "top" and self.score == "q3":
            kind = Divergence("forward_kl")
        measured = run.measure(rollouts, TARGET, kind)
        distance = measured.value[candidates]
        entropy = min_max(measured.student_entropy[candidates], self.percentile)
        if self.selection == "drawn":
            generator = torch.Generator().manual_seed(sequence_seed(run.seed, run.step, "tokens", 0))
            share = (distance / math.log(2)).clamp(
                min=0
            )  # rounding may leave a divergence of nothing below 0
            weight = entropy.pow(self.entropy_power) * share.pow(self.divergence_power)
            return drawn_share(weight, self.share, generator)
        # Equal states (first tokens of a group) differ by rounding, which must not choose between them.
        return top_share(importance(self.score, entropy, distance).round(decimals=4), self.share)

    def loss(self, run: Run, batch: Rollouts) -> Loss:
        hidden = run.student_hidden(batch)
        stream = "trained" if "trained" in batch.masks else "student"
        tokens = None if self.share == 1 else batch.mask(stream).nonzero().squeeze(1)
        found = run.divergence(batch, hidden, TARGET, REVERSE_KL, tokens)
        metrics = {"reverse_kl": found.value.detach(), **divergence_metrics(found)}
        values = found.value
        if tokens is not None:
            where, total = tokens.to(hidden.device), len(hidden)
            values = values.new_zeros(total).index_copy(0, where, values)
            metrics = {k: v.new_full((total,), torch.nan).index_copy(0, where, v) for k, v in metrics.items()}
        if "weight" in batch.sequence:
            values = values * batch.response.expand(batch.sequence["weight"]).to(values.device)
        return Loss((self.term("reverse_kl", values, stream),), metrics)


def importance(score: str, entropy: Tensor, distance: Tensor) -> Tensor:
    """`[t]`: a token's importance, of entropies in [0, 1] and divergences in nats."""
    if score == "entropy":
        return entropy
    if score == "divergence":
        return distance
    if score == "q3":
        return distance * (1 - entropy)
    return soft_or(entropy, min_max(distance))


def _cut(part: Hidden, kept: Tensor) -> Hidden:
    """The states of kept tokens alone."""
    inside = kept[part.tokens]
    return Hidden(part.tokens[inside], part.states[inside], part.role)
