"""TRL's GRPO against surpass's surrogates, reductions and advantages: the same numbers in, the same numbers out?

A real `GRPOTrainer` is built around a random model. Its own `compute_loss` gets log-probs of our choice (only the
model's forward pass is replaced), its own rollout code rewards of our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from surpass.learn.advantage import group_mean, group_standardised
from surpass.learn.aggregate import Reduction, denominator, reduce
from surpass.learn.sampled import forward_kl_k3
from surpass.learn.surrogate import gspo, ppo_clip
from surpass.models.zoo import char_tokenizer
from surpass.records import Ragged


@dataclass(frozen=True)
class Policy:
    """A TRL configuration, and the parts of surpass that mean the same."""

    name: str
    settings: dict[str, Any]
    reduction: Reduction
    horizon: int | None = None
    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    kl: float = 0.0
    by_sequence: bool = False

    def loss(
        self, logp: Ragged, old_logp: Tensor, reference_logp: Tensor, advantage: Tensor, mask: Ragged
    ) -> Tensor:
        """surpass's loss from `[T]` log-probs and `[N]` advantages."""
        if self.by_sequence:
            values = gspo(logp, old_logp, advantage, mask.values, self.low, self.high).loss
        else:
            each = logp.expand(advantage)
            values = ppo_clip(logp.values, old_logp, each, self.low, self.high, self.dual).loss
        if self.kl:
            values = values + self.kl * forward_kl_k3(logp.values, reference_logp)
        return reduce(values, mask, self.reduction, denominator(mask, self.reduction, self.horizon))


HORIZON = 16
POLICIES = (
    Policy("grpo", {"loss_type": "grpo"}, "sequence_mean"),
    Policy("bnpo", {"loss_type": "bnpo"}, "token_mean"),
    Policy("dapo", {"loss_type": "dapo", "epsilon_high": 0.28}, "token_mean", high=0.28),
    Policy("dr_grpo", {"loss_type": "dr_grpo"}, "constant_length", HORIZON),
    Policy("grpo, delta 1.3", {"loss_type": "grpo", "delta": 1.3}, "sequence_mean", dual=1.3),
    # TRL's default also multiplies this KL term by the ratio, which surpass does not; without it they mean the same.
    Policy(
        "grpo, beta 0.04, KL unweighted",
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
        "sequence_mean",
        kl=0.04,
    ),
    Policy(
        "grpo, sequence ratios",
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.03,
            "epsilon_high": 0.04,
        },
        "sequence_mean",
        low=0.03,
        high=0.04,
        by_sequence=True,
    ),
)
REWARDS = [1.0, 0.0, 0.3, 2.5, 0.7, 0.7, 0.7, 0.7, None, 1.0, 0.1, 0.4]
GROUP = 4


def trainer(checkpoint: Path, settings: dict[str, Any]) -> GRPOTrainer:
    """A real trainer for `REWARDS`, three prompts with `GROUP` answers each."""
    arguments = GRPOConfig(
        output_dir=str(checkpoint.parent),
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=len(REWARDS),
        num_generations=GROUP,
        max_completion_length=HORIZON,
        **settings,
    )
    rows = Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}])
    made = GRPOTrainer(
        model=str(checkpoint),
        args=arguments,
        reward_funcs=lambda completions, **_: REWARDS,
        train_dataset=rows,
        processing_class=char_tokenizer(),
    )
    made.current_gradient_accumulation_steps = 1  # which train() would set
    return made


def compare_losses(checkpoint: Path) -> list[dict[str, Any]]:
    """TRL's `compute_loss` and ours on the same log-probs: the loss, and its gradient at them."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, HORIZON + 1, (len(REWARDS),), generator=generator)
    shape = (len(REWARDS), int(lengths.max()))
    mask = torch.arange(shape[1]) < lengths.unsqueeze(1)
    logp = -5 * torch.rand(shape, generator=generator)
    # ratios of about 0.4 to 2.5: far enough for every clip to bite on some tokens
    old, reference = (logp + 0.4 * torch.randn(shape, generator=generator) for _ in range(2))
    advantage = torch.randn(len(REWARDS), generator=generator)
    rows = []
    for policy in POLICIES:
        theirs = trainer(checkpoint, policy.settings)
        leaf = logp.clone().requires_grad_()
        theirs._get_per_token_logps_and_entropies = lambda *_, leaf=leaf, **__: (
            leaf,
            torch.zeros(shape),
            None,
        )
        batch = {
            "prompt_ids": torch.ones(shape[0], 1, dtype=torch.int64),
            "prompt_mask": torch.ones(shape[0], 1, dtype=torch.int64),
            "completion_ids": torch.ones(shape, dtype=torch.int64),
            "completion_mask": mask.long(),
            "advantages": advantage,
            "old_per_token_logps": old,
            "ref_per_token_logps": reference,
            "num_items_in_batch": mask.sum(),
        }
        expected = theirs.compute_loss(theirs.model.train(), batch)
        (expected_gradient,) = torch.autograd.grad(expected, leaf)

        flat = Ragged.from_lengths(logp[mask].requires_grad_(), lengths)
        trained = flat.like(torch.ones(len(flat.values), dtype=torch.bool))
        found = policy.loss(flat, old[mask], reference[mask], advantage, trained)
        (gradient,) = torch.autograd.grad(found, flat.values)
        value, at_logp = record.difference(
            [found.detach(), gradient], [expected.detach(), expected_gradient[mask]]
        )
        no_gradient = float((gradient == 0).double().mean())
        rows.append(
            {
                "loss": policy.name,
                "TRL": float(expected.detach()),
                "surpass": float(found.detach()),
                "value": value,
                "gradient": at_logp,
                "share without gradient": no_gradient,
            }
        )
    return rows


def compare_advantages(checkpoint: Path) -> list[dict[str, Any]]:
    """The advantages TRL's rollout code makes of `REWARDS` (a group of equal ones and a missing one among them)."""
    reward = torch.tensor([torch.nan if r is None else r for r in REWARDS])
    group = torch.arange(len(REWARDS)) // GROUP
    ours = {
        "group": group_standardised(reward, group, ddof=1, epsilon=1e-4),  # TRL's epsilon
        "none": group_mean(reward, group),
    }
    rows = []
    for scale, found in ours.items():
        theirs = trainer(checkpoint, {"scale_rewards": scale})
        prompts = [{"prompt": "abc"[i]} for i in group.tolist()]
        expected = theirs._generate_and_score_completions(prompts)["advantages"]
        rows.append({"scale_rewards": scale, "advantage": record.difference([found], [expected])[0]})
    return rows
