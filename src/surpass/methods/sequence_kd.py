"""Sequence-level knowledge distillation: cross-entropy on text the teacher wrote.

    min_theta  E_{y ~ teacher(. | x)} sum_t -log student(y_t | x, y_<t)

which is forward KL between the distributions of whole answers, up to the teacher's entropy.

Source: arXiv 1606.07947. The paper takes the teacher's beam-search mode of each source sentence, written once; here
the teacher samples under `rollout.*`, as distillation of language models does (several answers to a prompt are then
useful), and writes anew at every step. Text it wrote beforehand is read from the data set with `text: stored`: that is
SFT on it, and no teacher is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from surpass.learn.aggregate import Loss
from surpass.methods.base import Method, Needs
from surpass.methods.run import Run
from surpass.records import Author, Prompt, Rollouts


@dataclass(kw_only=True)
class SequenceKD(Method):
    """Cross-entropy on the teacher's answers (arXiv 1606.07947)."""

    text: Literal["written", "stored"] = "written"
    """The teacher writes during the run, or wrote the data set's `response` column before it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text == "stored" and self.samples != 1:
            raise ValueError(
                f"a stored prompt has one response, found method.samples {self.samples}; leave it 1, or let the "
                "teacher write (method.text written)"
            )

    def needs(self) -> Needs:
        if self.text == "stored":
            return Needs(response=True, rollouts=False)
        return Needs(teacher=True)

    def collect(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        if self.text == "written":
            return run.write_by_teacher(prompts, self.samples)
        stored = run.from_data(prompts)
        return stored.with_(author=torch.full_like(stored.author, int(Author.TEACHER)))

    def loss(self, run: Run, batch: Rollouts) -> Loss:
        logp, entropy = run.student_logp(batch)
        return Loss((self.term("cross_entropy", -logp, "teacher"),), {"entropy": entropy})
