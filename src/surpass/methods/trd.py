"""TRD: the teacher rewrites the student's whole answer, and the student learns the rewritten one.

    y_o ~ student_0(. | x);   y_r ~ teacher(. | refine(x, y_o))
    min_theta  sum_t KL( teacher(. | refine(x, y_o), y_r,<t) || student(. | x, y_r,<t) )

On a failing prefix a teacher wavers between going on and turning round, and token by token the student learns half-turns.
A rewritten answer keeps what was right in the attempt and has no wrong prefix. The response ids are scored as they were
written, after two different prompts: only the teacher reads the attempt. In self-distillation the student's initial
weights rewrite, and read the reference solution too.

Source: arXiv 2606.08432 and its code (full vocabulary, teacher frozen, tokens averaged over the batch). All attempts are
written first, by the initial student; writing each when its prompt comes up, from the initial weights, is the same and
is done here. `drafts: present` lets the student of the moment write them instead. Where paper and code disagree: the code
trains on the bare prompt, a line break and the answer, without chat template and without end of sequence, which the model
is then evaluated with; here the student reads its own template and is taught to stop. The comparisons of the paper on
y_o are settings of other methods: `gkd` (forward or reverse KL on the student's text), `opd` and `rethinking_opd` (reverse
KL on a top-k). Attempts too long for the teacher's window are cut at the end (`draft_tokens`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from surpass.learn.aggregate import Loss
from surpass.learn.divergence import Divergence
from surpass.methods.base import Method, Needs, RoleSpec, divergence_metrics
from surpass.methods.run import Run
from surpass.prompts.views import View
from surpass.records import Prompt, Rollouts
from surpass.roles.role import Role
from surpass.roles.scoring import Want


@dataclass(kw_only=True)
class TRD(Method):
    """Trajectory-refined distillation: forward KL on answers the teacher rewrote (arXiv 2606.08432)."""

    refiner: Literal["teacher", "self"] = "teacher"
    """Who rewrites and grades: the teacher, or the student's initial weights, which read the `solution` too."""
    drafts: Literal["initial", "present"] = "initial"
    """Which student writes the attempts: one round with its initial weights, or every step anew."""
    draft_tokens: int | None = None
    """The refiner reads at most this many tokens of an attempt; null: all of it."""
    context: Literal["refine", "plain"] = "refine"
    """What the teacher reads while it grades the rewritten answer: problem and attempt, or the problem alone."""
    clamp: float | None = None
    """Nats: a token's divergence counts at most this much (and has no gradient beyond); null: no bound."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draft_tokens is not None and self.draft_tokens < 1:
            raise ValueError(f"method.draft_tokens must be at least 1, found {self.draft_tokens}")
        if self.clamp is not None and self.clamp <= 0:
            raise ValueError(f"method.clamp must be above 0 nats, found {self.clamp}")

    def needs(self) -> Needs:
        return Needs(teacher=True)

    def roles(self) -> dict[str, RoleSpec]:
        if self.refiner == "self":
            return {"teacher": RoleSpec("initial")}
        return {"initial": RoleSpec("initial")} if self.drafts == "initial" else {}

    @property
    def view(self) -> View:
        """What the refiner reads."""
        return View("refine" if self.refiner == "teacher" else "refine_with_solution")

    def collect(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        drafts = run.generate(prompts, self.samples, self.writer(run))
        run.metrics["drafts/mean_length"] = float(drafts.lengths.float().mean())
        refined = run.write_by_teacher(self.with_draft(run, drafts), view=self.view)
        refined = refined.with_(group=drafts.group)
        reads = self.view if self.context == "refine" else None
        return run.score(refined, "teacher", Want(logp=False, hidden=True), view=reads)

    def writer(self, run: Run) -> Role | None:
        """The role that writes the attempts; None: the student as it is now."""
        if self.drafts == "present":
            return None
        return run.teachers["default"] if self.refiner == "self" else run.role("initial")

    def with_draft(self, run: Run, drafts: Rollouts) -> list[Prompt]:
        """Each attempt's prompt, with the attempt as privileged text that only the refiner reads."""
        texts = run.student.tokenizer.batch_decode(
            [ids[: self.draft_tokens] for ids in drafts.response.tolist()], skip_special_tokens=True
        )
        return [
            replace(prompt, privileged={**prompt.privileged, "draft": str(text)})
            for prompt, text in zip(drafts.prompts, texts, strict=True)
        ]

    def loss(self, run: Run, batch: Rollouts) -> Loss:
        found = run.divergence(batch, run.student_hidden(batch), {"teacher": 1.0}, Divergence("forward_kl"))
        values = found.value if self.clamp is None else found.value.clamp(max=self.clamp)
        metrics = {"forward_kl": found.value.detach(), **divergence_metrics(found)}
        return Loss((self.term("forward_kl", values, "teacher"),), metrics)
