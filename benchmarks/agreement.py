"""Do surpass and the installed TRL and Liger compute the same numbers? Values and gradients, on random tensors.

Divergences: every implementation is held against one direct formula in float64, so two libraries that share a
mistake do not confirm each other. Beta as the peers use it: the weight of the teacher in the mixture, 0 for forward
and 1 for reverse KL (surpass names those instead). Policy gradients: see `policy_gradients.py`.

    python benchmarks/agreement.py [--small]
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import policy_gradients
import record
import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from torch import Tensor
from transformers.utils.logging import disable_progress_bar
from trl.experimental.gkd import GKDTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from surpass.learn.divergence import Divergence
from surpass.learn.head import Head
from surpass.learn.vocabulary import TargetTerm, log_linear_divergence
from surpass.models.zoo import save_tiny

# Relative, for float32, whose log-probs of size 16 to 32 lie 2e-6 apart. In a value such errors average out. In a
# gradient they do not: near its bound, where student and teacher hardly overlap, JSD is flat and its gradient a small
# difference of large terms; the more so the larger the vocabulary. The textbook formula run in float32 is itself up to
# 1e-4 off, and another processor may sum in another order: 3e-4. A wrong convention, mask or denominator changes the
# gradient by 1e-2 or more.
TOLERANCE = {"value": 5e-6, "gradient": 3e-4, "advantage": 5e-6}
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


def liger(problem: Problem, student: Tensor, head: Head, teacher: Tensor, other: Head, beta: float) -> Tensor:
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


def compare_divergences(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    rows = []
    for problem in problems:
        for beta in BETAS:
            expected = value_and_gradients(exact, problem, beta, torch.float64)
            for name, function in IMPLEMENTATIONS.items():
                if problem.shaped and function is liger:
                    continue  # it has neither scale nor soft-capping
                found = value_and_gradients(function, problem, beta, torch.float32)
                value, at_hidden, at_head = record.difference(found, expected)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="leave out the large vocabulary, write nothing")
    small = parser.parse_args().small
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the peers among themselves
    disable_progress_bar()
    problems = [problem for problem in PROBLEMS if not (small and problem.vocabulary > 10_000)]
    divergences = compare_divergences(problems)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_tiny(Path(folder) / "model")
        losses = policy_gradients.compare_losses(checkpoint)
        advantages = policy_gradients.compare_advantages(checkpoint)

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
    shown = []
    for r in losses:
        differences = [f"{r['value']:.1e}", f"{r['gradient']:.1e}", f"{r['share without gradient']:.0%}"]
        shown.append([r["loss"], f"{r['TRL']:.6f}", f"{r['surpass']:.6f}", *differences])
    print(record.table(header, shown))
    print("\nadvantages\n")
    shown = [[row["scale_rewards"], f"{row['advantage']:.1e}"] for row in advantages]
    print(record.table(["scale_rewards", "largest relative difference"], shown))

    measured = {
        kind: [row[kind] for row in [*divergences, *losses, *advantages] if kind in row] for kind in TOLERANCE
    }
    # compared one by one, because a NaN would get lost in a maximum
    agree = all(x <= TOLERANCE[kind] for kind, all_of_kind in measured.items() for x in all_of_kind)
    print(f"\n{'all agree' if agree else 'DISAGREEMENT'}")
    for kind, all_of_kind in measured.items():
        print(f"{kind}: largest difference {max(all_of_kind):.1e}, tolerance {TOLERANCE[kind]:.0e}")
    if not small:
        result = {"tolerance": TOLERANCE, "agree": agree, "divergences": divergences, "losses": losses}
        record.save("agreement", {**record.environment(), **result, "advantages": advantages})
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
