"""DAPO: GRPO with a wider upper clip, token mean, groups without signal replaced, and a soft penalty on overlong answers.

    A_i = (r_i - mean(r)) / (std(r) + eps),   loss_t = max( -A rho_t, -A clip(rho_t, 1 - 0.2, 1 + 0.28) )

Source: arXiv 2503.14476.
- clip-higher: ratios may rise to 1.28 but fall only to 0.8;
- dynamic sampling: groups whose answers are all right or all wrong are dropped and fresh prompts are drawn until the
  batch has as many groups as it should; surplus groups are discarded;
- overlong: reward 0 up to `horizon_limit - overlong_buffer` tokens, falling linearly to -1 at the limit; or truncated
  answers are left out of the loss (`filter`);
- no KL term; averaged over all tokens of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from surpass.judge.shaping import soft_overlong
from surpass.learn.advantage import zero_variance
from surpass.methods.base import Reduction
from surpass.methods.grpo import GRPO
from surpass.methods.run import Run
from surpass.records import Finish, Prompt, Rollouts


@dataclass(kw_only=True)
class DAPO(GRPO):
    """Decoupled clip and dynamic sampling policy optimisation (arXiv 2503.14476)."""

    samples: int = 16
    """Answers to each prompt."""
    reduction: Reduction = "token_mean"
    """Mean over all tokens of the batch."""
    clip_high: float = 0.28
    """Clip-higher: the upper clip alone is widened."""
    dual_clip: float | None = 10.0
    """Ratios above this get no gradient where the advantage is negative."""
    refill: int = 10
    """Most rounds of fresh prompts per step while groups without signal are replaced; 0 keeps such groups."""
    overlong: Literal["penalty", "filter", "none"] = "penalty"
    """Truncated answers: penalised softly, left out of the loss, or treated like any other."""
    overlong_buffer: float = 0.2
    """Share of `rollout.max_new_tokens` over which the penalty falls from 0 to -1."""

    def collect(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        wanted, kept, drawn = len(prompts), [], 0
        groups = 0
        while True:
            rollouts = self.judged(run, prompts)
            drawn += len(prompts)
            if self.refill == 0:
                kept = [rollouts]
                break
            live = torch.nonzero(~zero_variance(rollouts.sequence["accuracy"], rollouts.group)).squeeze(1)
            if len(live):
                kept.append(rollouts.select(live))
                groups += len(kept[-1].group.unique())
            if groups >= wanted or drawn >= wanted * (1 + self.refill):
                break
            if run.stream is None:
                raise ValueError(
                    "dynamic sampling draws fresh prompts, and this run has no prompt stream; set method.refill 0"
                )
            prompts = run.stream.next(wanted)
        if not kept:
            raise ValueError(
                f"no group out of {drawn} had both right and wrong answers, so there is nothing to learn from; "
                "use easier or harder prompts, more method.samples, or method.refill 0 to train on regardless"
            )
        rollouts = Rollouts.cat(kept)
        _, ranks = rollouts.group.unique(return_inverse=True)
        rollouts = rollouts.select(torch.nonzero(ranks < wanted).squeeze(1))
        run.metrics["dynamic_sampling/prompts_drawn"] = float(drawn)
        run.metrics["dynamic_sampling/groups_kept"] = float(len(rollouts.group.unique()))
        if run.off_policy:
            rollouts = run.score(rollouts, "old")
        if self.needs().reference:
            rollouts = run.score(rollouts, "reference")
        return self.with_advantage(rollouts)

    def judged(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        """Answers with their reward, the overlong penalty added as its own component."""
        rollouts = run.reward(run.generate(prompts, self.samples))
        assert rollouts.reward is not None
        # Groups are kept by what the verifier said: the length penalty alone is no reason to train on one.
        rollouts = rollouts.with_(sequence={"accuracy": rollouts.reward})
        if self.overlong != "penalty":
            return rollouts
        limit = run.sampling.max_new_tokens
        penalty = soft_overlong(rollouts.lengths, limit, max(1, round(limit * self.overlong_buffer)))
        return rollouts.with_(
            reward=rollouts.sequence["accuracy"] + penalty, components={"overlong": penalty}
        )

    def with_advantage(self, rollouts: Rollouts) -> Rollouts:
        rollouts = super().with_advantage(rollouts)
        if self.overlong == "filter":
            whole = rollouts.response.expand(rollouts.finish != int(Finish.LENGTH))
            rollouts = rollouts.with_(masks={"trained": rollouts.mask("trained") & whole})
        return rollouts
