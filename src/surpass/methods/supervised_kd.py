"""Supervised knowledge distillation: the teacher's whole next-token distribution, on given text.

    min_theta  E_{(x, y) ~ text} 1/|y| sum_t KL( teacher(. | s_t) || student(. | s_t) )

Source: arXiv 1503.02531 (soft targets), 1910.01108 (language models), and the baseline of that name in arXiv
2306.13649, whose averaging (mean over each answer's tokens, then over answers) is the default. The text is the data
set's, or written by the teacher. Softened targets are `loss.temperature`, which divides the logits of both; the factor
temperature^2 of arXiv 1503.02531 only rescales the loss and is left to the learning rate.

`top_k` reads the teacher's k most likely tokens instead of the vocabulary, with the mass outside as `tail` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from surpass.learn.aggregate import Loss, Term
from surpass.learn.divergence import Divergence
from surpass.learn.support import top_k_divergence
from surpass.learn.vocabulary import support_logp
from surpass.methods.base import Method, Needs, Reduction, divergence_metrics
from surpass.methods.run import Run
from surpass.records import Author, Prompt, Rollouts
from surpass.roles.scoring import Want


@dataclass(kw_only=True)
class SupervisedKD(Method):
    """Forward KL to the teacher on the text of a data set or of the teacher (arXiv 1503.02531)."""

    reduction: Reduction = "sequence_mean"
    """Mean over each answer's tokens, then over answers."""
    text: Literal["data", "teacher"] = "data"
    """Who wrote the text: the data set's `response`, or the teacher during the run."""
    estimator: Literal["full", "top_k"] = "full"
    """The whole vocabulary, or the teacher's most likely tokens."""
    top_k: int = 16
    """Size of the support of `top_k`."""
    tail: Literal["drop", "renormalise", "bucket"] = "bucket"
    """What becomes of the mass outside the support: dropped, both sides renormalised, or one extra entry."""
    cross_entropy: float = 0.0
    """Weight of the cross-entropy on the text itself (hard targets), added to the divergence."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text == "data" and self.samples != 1 and not self.student_writes:
            raise ValueError(
                f"each prompt of a data set has one response, found method.samples {self.samples}; leave it 1, or "
                "let the teacher write (method.text teacher)"
            )

    @property
    def student_writes(self) -> bool:
        """Whether some of the text is the student's own."""
        return False

    def divergence_kind(self) -> Divergence:
        """What is minimised."""
        return Divergence("forward_kl")

    def needs(self) -> Needs:
        return Needs(teacher=True, response=self.text == "data", rollouts=self.text == "teacher")

    def collect(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        return self.ask_teacher(run, self.given_text(run, prompts))

    def given_text(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        """The text of whoever writes it beside the student."""
        return run.from_data(prompts) if self.text == "data" else run.write_by_teacher(prompts, self.samples)

    def ask_teacher(self, run: Run, rollouts: Rollouts) -> Rollouts:
        """The teacher's distribution at every token."""
        full = self.estimator == "full"
        return run.score(rollouts, "teacher", Want(logp=False, hidden=full, top_k=0 if full else self.top_k))

    def loss(self, run: Run, batch: Rollouts) -> Loss:
        return self.distillation(run, batch, run.student_hidden(batch))

    def distillation(self, run: Run, batch: Rollouts, hidden: Tensor) -> Loss:
        """Divergence from the teacher, and cross-entropy on text the student did not write."""
        stream = stream_of(batch)
        values, metrics = self.measure(run, batch, hidden)
        terms: list[Term] = [self.term(self.divergence_kind().kind, values, stream)]
        if self.cross_entropy and stream != "student":
            logp, _ = run.student_logp(batch, hidden)
            terms.append(self.term("cross_entropy", -logp, stream, self.cross_entropy))
        return Loss(tuple(terms), metrics)

    def measure(self, run: Run, batch: Rollouts, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Divergence from the teacher `[T]`, with gradient, and what was measured on the way."""
        kind = self.divergence_kind()
        if self.estimator == "full":
            found = run.divergence(
                batch, hidden, {"teacher": 1.0}, kind, loss_weight=self.loss_weight(batch, stream_of(batch))
            )
            return found.value, {kind.kind: found.value.detach(), **divergence_metrics(found)}
        teacher = batch.scores["teacher"]
        assert teacher.support is not None and teacher.support_logp is not None
        ids, target = teacher.support.to(hidden.device), teacher.support_logp.to(hidden.device)
        student = support_logp(hidden, run.student.head, ids, run.temperature)
        value, student_mass, target_mass = top_k_divergence(
            kind, student, target, torch.ones_like(ids, dtype=torch.bool), self.tail
        )
        mass = {"support/student_mass": student_mass, "support/target_mass": target_mass}
        return value, {kind.kind: value.detach(), **mass}


def stream_of(batch: Rollouts) -> str:
    """The stream of a batch that one author wrote; `data` where every answer is empty."""
    return Author(int(batch.author[0])).name.lower() if len(batch.author) else "data"
