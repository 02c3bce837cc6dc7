"""Do surpass and the installed TRL and Liger compute the same numbers? Values and gradients, on random tensors.

Divergences: every implementation is held against one direct formula in float64, so two libraries that share a
mistake do not confirm each other. Beta as the peers use it: the weight of the teacher in the mixture, 0 for forward
and 1 for reverse KL (surpass names those instead). Policy gradients: a real `GRPOTrainer` is built around a random
model; its own `compute_loss` gets log-probs of our choice, its own rollout code the rewards of our choice.

    python benchmarks/agreement.py [--small]
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import record
import torch
from datasets import Dataset
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from surpass.learn.advantage import group_mean, group_standardised
from surpass.learn.aggregate import Reduction, denominator, reduce
from surpass.learn.divergence import Divergence
from surpass.learn.head import Head
from surpass.learn.sampled import forward_kl_k3
from surpass.learn.surrogate import gspo, ppo_clip
from surpass.learn.vocabulary import TargetTerm, log_linear_divergence
from surpass.models.zoo import char_tokenizer, save_tiny
from surpass.records import Ragged

# Float32 rounds log-probs of size ~20 by ~1e-6; a divergence or gradient is a sum of many of their differences.
TOLERANCE = 1e-5
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


@dataclass(frozen=True)
class Problem:
    """Random hidden states `[N, D]` of student and teacher, and their heads."""

    name: str
    tokens: int
    vocabulary: int
    widths: tuple[int, int]
    temperature: float = 1.0
    shaped: bool = False  # bias, logit scale and soft-capping

    def tensors(self, seed: int = 0) -> tuple[Tensor, Head, Tensor, Head]:
        generator = torch.Generator().manual_seed(seed)
        hidden, heads = [], []
        for width in self.widths:
            hidden.append(torch.randn(self.tokens, width, generator=generator))
            # logits of deviation 3: peaked distributions, where rounding hurts most
            weight = torch.randn(self.vocabulary, width, generator=generator) * 3 / width**0.5
            bias = torch.randn(self.vocabulary, generator=generator) if self.shaped else None
            heads.append(Head(weight, bias, 10.0, 0.5) if self.shaped else Head(weight))
        return hidden[0], heads[0], hidden[1], heads[1]


PROBLEMS = (
    Problem("24 x 97", 24, 97, (16, 20)),
    Problem("24 x 97, temperature 0.7", 24, 97, (16, 20), temperature=0.7),
    Problem("64 x 2,048", 64, 2048, (64, 96)),
    Problem("48 x 40,009", 48, 40_009, (64, 128)),
    Problem("64 x 2,048, bias, scale, soft-cap", 64, 2048, (64, 96), shaped=True),
)


def exact(problem: Problem, student: Tensor, head: Head, teacher: Tensor, other: Head, beta: float) -> Tensor:
    """Mean divergence by the textbook, in float64 throughout and over all of the vocabulary at once."""

    def probabilities(hidden: Tensor, head: Head) -> Tensor:
        logits = hidden @ head.weight.double().T
        logits = (logits if head.bias is None else logits + head.bias.double()) * head.scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        return (logits / problem.temperature).softmax(-1)

    s, t = probabilities(student, head), probabilities(teacher.double(), other)
    middle = beta * t + (1 - beta) * s
    to_teacher, to_student = (t * (t / middle).log()).sum(-1), (s * (s / middle).log()).sum(-1)
    if beta == 0:
        return to_teacher.mean()  # forward KL: the middle is the student
    return to_student.mean() if beta == 1 else (beta * to_teacher + (1 - beta) * to_student).mean()


def surpass_loss(
    problem: Problem, student: Tensor, head: Head, teacher: Tensor, other: Head, beta: float
) -> Tensor:
    by_name = {0.0: Divergence("forward_kl"), 1.0: Divergence("reverse_kl")}
    kind = by_name.get(beta) or Divergence("jsd", beta)
    target = [TargetTerm(teacher, other, 1.0)]
    return log_linear_divergence(student, head, target, kind, problem.temperature, chunk=7).value.mean()


def trl_full_logits(
    problem: Problem, student: Tensor, head: Head, teacher: Tensor, other: Head, beta: float
) -> Tensor:
    logits = [head.logits(student).unsqueeze(0), other.logits(teacher).unsqueeze(0)]
    labels = torch.zeros(1, problem.tokens, dtype=torch.int64)
    return GKDTrainer.generalized_jsd_loss(*logits, labels, beta=beta, temperature=problem.temperature)


def trl_chunked(
    problem: Problem, student: Tensor, head: Head, teacher: Tensor, other: Head, beta: float
) -> Tensor:
    loss, _, _ = _chunked_divergence_loss(
        student.unsqueeze(0),
        teacher.unsqueeze(0),
        head.weight,
        other.weight,
        torch.ones(1, problem.tokens),
        beta,
        student_lm_head_bias=head.bias,
        teacher_lm_head_bias=other.bias,
        student_logit_scale=head.scale,
        teacher_logit_scale=other.scale,
        student_final_logit_softcapping=head.softcap,
        teacher_final_logit_softcapping=other.softcap,
        temperature=problem.temperature,
    )
    return loss


def liger(
    problem: Problem, student: Tensor, head: Head, teacher: Tensor, other: Head, beta: float
) -> Tensor:
    loss = LigerFusedLinearJSDLoss(
        0.0, 1.0, beta, temperature=problem.temperature, compiled=False, chunk_size=16
    )
    labels = torch.zeros(problem.tokens, dtype=torch.int64)
    return loss(student, head.weight, teacher, other.weight, labels)


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "surpass log_linear_divergence": surpass_loss,
    "TRL GKDTrainer.generalized_jsd_loss": trl_full_logits,
    "TRL _chunked_divergence_loss": trl_chunked,
    "Liger LigerFusedLinearJSDLoss": liger,
}


def value_and_gradients(
    function: Callable[..., Tensor], problem: Problem, beta: float, dtype: torch.dtype
) -> list[Tensor]:
    """The loss, and its gradients at the student's hidden states and head, in float64."""
    hidden, head, teacher, other = problem.tensors()
    hidden = hidden.to(dtype).requires_grad_()
    head = replace(head, weight=head.weight.to(dtype).requires_grad_())
    loss = function(problem, hidden, head, teacher, other, beta)
    gradients = torch.autograd.grad(loss, [hidden, head.weight])
    return [loss.detach().double(), *(gradient.double() for gradient in gradients)]


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Largest difference of each tensor, relative to the largest entry that was expected."""
    return [float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected)]


def compare_divergences(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    rows = []
    for problem in problems:
        for beta in BETAS:
            expected = value_and_gradients(exact, problem, beta, torch.float64)
            for name, function in IMPLEMENTATIONS.items():
                if problem.shaped and function is liger:
                    continue  # it has neither scale nor soft-capping
                found = value_and_gradients(function, problem, beta, torch.float32)
                value, at_hidden, at_head = difference(found, expected)
                rows.append(
                    {
                        "implementation": name,
                        "problem": problem.name,
                        "beta": beta,
                        "loss": float(expected[0]),
                        "value": value,
                        "gradient": max(at_hidden, at_head),
                    }
                )
    return rows


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
    Policy("grpo, delta 1.5", {"loss_type": "grpo", "delta": 1.5}, "sequence_mean", dual=1.5),
    Policy("grpo, beta 0.04", {"loss_type": "grpo", "beta": 0.04}, "sequence_mean", kl=0.04),
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
    # ratios of 0.6 to 1.7: far enough for every clip to bite on some tokens
    old, reference = (logp + 0.25 * torch.randn(shape, generator=generator) for _ in range(2))
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
        value, at_logp = difference([found, gradient], [expected, expected_gradient[mask]])
        no_gradient = float((gradient == 0).double().mean())
        rows.append(
            {
                "loss": policy.name,
                "TRL": float(expected),
                "surpass": float(found),
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
        rows.append({"scale_rewards": scale, "advantage": difference([found], [expected])[0]})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="leave out the large vocabulary, write nothing")
    small = parser.parse_args().small
    logging.disable(logging.WARNING)
    problems = [problem for problem in PROBLEMS if not (small and problem.vocabulary > 10_000)]
    divergences = compare_divergences(problems)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_tiny(Path(folder) / "model")
        losses, advantages = compare_losses(checkpoint), compare_advantages(checkpoint)

    print("\nlargest relative difference from the float64 formula, over beta 0, 0.1, 0.5, 0.9, 1 (float32)\n")
    pairs = dict.fromkeys((row["implementation"], row["problem"]) for row in divergences)
    shown = []
    for name, problem in pairs:
        of_pair = [r for r in divergences if (r["implementation"], r["problem"]) == (name, problem)]
        worst = [f"{max(row[key] for row in of_pair):.1e}" for key in ("value", "gradient")]
        shown.append([problem, name, *worst])
    print(record.table(["tokens x vocabulary", "implementation", "value", "gradient"], shown))
    print("\nTRL's compute_loss and surpass on the same log-probs\n")
    header = ["loss", "TRL", "surpass", "value", "gradient", "share without gradient"]
    shown = [
        [r["loss"], f"{r['TRL']:.6f}", f"{r['surpass']:.6f}", f"{r['value']:.1e}", f"{r['gradient']:.1e}"]
        + [f"{r['share without gradient']:.0%}"]
        for r in losses
    ]
    print(record.table(header, shown))
    print("\nadvantages\n")
    shown = [[row["scale_rewards"], f"{row['advantage']:.1e}"] for row in advantages]
    print(record.table(["scale_rewards", "largest relative difference"], shown))

    measured = [
        row[key]
        for row in [*divergences, *losses, *advantages]
        for key in row.keys() & {"value", "gradient", "advantage"}
    ]
    agree = all(deviation <= TOLERANCE for deviation in measured)  # a NaN does not agree
    print(
        f"\n{'all agree' if agree else 'DISAGREEMENT'}: largest {max(measured):.1e}, tolerance {TOLERANCE:.0e}"
    )
    if not small:
        result = {"tolerance": TOLERANCE, "agree": agree, "divergences": divergences, "losses": losses}
        record.save("agreement", {**record.environment(), **result, "advantages": advantages})
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
