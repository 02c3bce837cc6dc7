"""On-policy context distillation: the student's frozen beginning reads more than the student, and grades its tokens.

    min_theta  E_{y ~ student(. | x)} sum_t KL( student(. | x, y_<t) || student_0(. | context(x, y), y_<t) )

which is OPD whose teacher is the student's own initial weights with an extra context: the worked solution, or the
student's answer and a critique. The response ids are scored as they are, after another prompt; only the teacher reads
the context, which comes with the prompt (`solution`, `critique`, ... columns).

Source: arXiv 2602.12125 and its code (lambda = 1, 8 answers to each prompt, learning rate 1e-5, batches of 128). The
authors found that a moving average of the student in the teacher's place collapses, so the teacher stays frozen. Its
third mode, the teacher's own chat template, concerns another model as teacher: that is `opd` with
`data.teacher_template own`. There an external model writes a critique of every answer at temperature 0; here the run's
critic does where it has one (embedded tasks do), else the prompt's own `critique` column serves, else a request to go over
the answer again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surpass.methods.base import RoleSpec
from surpass.methods.opd import OPD
from surpass.methods.run import Run
from surpass.records import Prompt, Rollouts


@dataclass(kw_only=True)
class ContextDistillation(OPD):
    """On-policy distillation from the initial student, which reads extra context (arXiv 2602.12125)."""

    samples: int = 8
    """Answers to each prompt."""
    context: Literal["solution", "critique", "hint", "demonstration"] = "solution"
    """What the teacher reads besides the prompt; `critique`: the student's own answer and what was said of it."""

    def roles(self) -> dict[str, RoleSpec]:
        return {"teacher": RoleSpec("initial", view=self.context)}

    def collect(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        rollouts = run.generate(prompts, self.samples)
        if self.context == "critique":
            rollouts = run.feedback(rollouts)
        return self.score(run, rollouts)
