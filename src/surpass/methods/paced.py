"""PACED: distillation at the frontier of the student's competence.

    p(x) = share of right answers among K of the student's, before training
    w(x) = p(x)^alpha (1 - p(x))^beta, scaled to mean 1 over the prompts that have any
    min_theta  sum_x w(x) 1/|y| sum_t D_t(x)

A problem's gradient carries most signal where the student sometimes solves it; prompts it always or never solves have
weight 0 and are skipped (fresh ones are drawn in their place). D is forward KL on given text in the first part of
the run (`forward_share` of its steps), and reverse KL on the student's own answers in the rest. Track `distillation` has a
teacher model and is forward throughout; track `self_distillation` has the student's initial weights, which read the
ground truth beside the problem, and is reverse throughout; `forward_share: 0.5` is the two-stage schedule.

Source: arXiv 2603.11178. No code was released and the paper's text reaches us through its abstract and others' readings,
so these are our choices: the scale of the weights, the skipping, that the self-teacher is frozen, and that the second
stage trains on the student's own answers. K = 8 gives only nine values of p, and one estimate before training holds
for the whole run; `smooth` keeps 0 and 1 out of p, `refresh` estimates anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from surpass.learn.aggregate import Loss
from surpass.learn.divergence import Divergence
from surpass.learn.weights import beta_kernel
from surpass.methods.base import Method, Needs, Reduction, RoleSpec, divergence_metrics
from surpass.methods.run import Run
from surpass.records import Prompt, Rollouts
from surpass.roles.scoring import Want

FORWARD_KL, REVERSE_KL = Divergence("forward_kl"), Divergence("reverse_kl")


@dataclass(kw_only=True)
class PACED(Method):
    """Distillation weighed by the student's pass rate on each prompt (PACED, arXiv 2603.11178)."""

    samples: int = 1
    """Answers to each prompt, by the student or the teacher; a data set has one."""
    reduction: Reduction = "sequence_mean"
    """Mean over each answer's tokens, weighed by its prompt, then over answers."""
    track: Literal["distillation", "self_distillation"] = "distillation"
    """Who teaches: a model, or the student's beginning with the ground truth in its prompt."""
    forward_share: float | None = None
    """Share of the steps with forward KL on given text, the first ones; null: 1 to distil, 0 to self-distil."""
    text: Literal["data", "teacher"] = "data"
    """Whose text the forward stage reads: the data set's `response`, or the teacher's own."""
    context: Literal["solution", "silent_key", "hint", "demonstration"] = "solution"
    """What the self-teacher reads besides the problem (`self_distillation`); `silent_key`: the bare answer."""
    alpha: float = 1.0
    """Exponent of p: larger favours easier prompts. With beta 0 too, prompts are not weighed and nothing is estimated."""
    beta: float = 1.0
    """Exponent of 1 - p: larger favours harder prompts."""
    pass_rate_samples: int = 8
    """K: answers to each prompt that its pass rate is estimated with."""
    smooth: bool = False
    """p = (right + 1/2) / (K + 1), so that no prompt is given up for good."""
    refresh: int | None = None
    """Steps after which all pass rates are estimated anew; null: never."""
    correct_above: float = 0.5
    """An answer is right where its reward is above this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0 or self.beta < 0:
            raise ValueError(
                f"method.alpha and method.beta are at least 0, found {self.alpha} and {self.beta}"
            )
        if not 0 <= self.share_forward <= 1:
            raise ValueError(f"method.forward_share is a share of the steps, found {self.forward_share}")
        if self.pass_rate_samples < 1 or (self.refresh is not None and self.refresh < 1):
            raise ValueError(
                "method.pass_rate_samples and method.refresh are at least 1, found "
                f"{self.pass_rate_samples} and {self.refresh}"
            )
        if self.samples > 1 and self.share_forward == 1 and self.text == "data":
            raise ValueError(
                f"each prompt of a data set has one response, found method.samples {self.samples}; leave it 1, or "
                "let the teacher write (method.text teacher)"
            )
        self.rates: dict[str, float] = {}

    @property
    def share_forward(self) -> float:
        """The share in use."""
        if self.forward_share is not None:
            return self.forward_share
        return 1.0 if self.track == "distillation" else 0.0

    @property
    def weighed(self) -> bool:
        return self.alpha > 0 or self.beta > 0

    def needs(self) -> Needs:
        reads_data = self.share_forward > 0 and self.text == "data"
        writes = self.weighed or self.share_forward < 1 or not reads_data
        return Needs(teacher=True, reward=self.weighed, response=reads_data, rollouts=writes)

    def roles(self) -> dict[str, RoleSpec]:
        if self.track == "distillation":
            return {}
        return {"teacher": RoleSpec("initial", view=self.context)}

    def prepare(self, run: Run) -> None:
        if self.weighed:
            self.estimate(run)

    def estimate(self, run: Run) -> None:
        """Pass rates of every prompt of the stream. Raises ValueError where none is left to train on."""
        assert run.stream is not None
        prompts = run.stream.prompts
        self.rates = run.pass_rates(prompts, self.pass_rate_samples, self.correct_above, self.smooth)
        weights = self.weights(list(self.rates))
        if not any(weights):
            raise ValueError(
                f"none of {len(prompts)} prompts is solved sometimes but not always in {self.pass_rate_samples} answers, "
                "so all weights are 0; use easier or harder prompts, more method.pass_rate_samples, or method.smooth true"
            )
        rates = torch.tensor(list(self.rates.values()))
        run.metrics["pass_rate"] = float(rates.mean())
        run.metrics["prompts_kept"] = sum(w > 0 for w in weights) / len(prompts)

    def weights(self, ids: list[str]) -> list[float]:
        """The prompts' weights, whose mean over all prompts above 0 is 1; 0 for a prompt nobody could judge."""
        kernel = beta_kernel(
            torch.tensor(list(self.rates.values()), dtype=torch.float64), self.alpha, self.beta
        )
        positive = kernel[kernel > 0]
        scale = float(positive.mean()) if len(positive) else 1.0
        known = dict(zip(self.rates, (kernel / scale).tolist(), strict=True))
        return [known.get(i, 0.0) for i in ids]

    def forward(self, run: Run) -> bool:
        """Whether this step reads given text."""
        return run.step < self.share_forward * run.steps

    def collect(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        if self.weighed:
            if self.refresh is not None and run.step > 0 and run.step % self.refresh == 0:
                self.estimate(run)
            prompts = self.at_the_frontier(run, prompts)
        rollouts = self.answers(run, prompts)
        if self.weighed:
            weight = torch.tensor(self.weights([p.id for p in rollouts.prompts]), dtype=torch.float32)
            rollouts = rollouts.with_(sequence={"weight": weight})
        return run.score(rollouts, "teacher", Want(logp=False, hidden=True))

    def at_the_frontier(self, run: Run, prompts: list[Prompt]) -> list[Prompt]:
        """The prompts of weight above 0, and fresh ones from the stream in the others' place."""
        assert run.stream is not None
        kept: list[Prompt] = []
        drawn = prompts
        while drawn:
            kept += [p for p, w in zip(drawn, self.weights([p.id for p in drawn]), strict=True) if w > 0]
            drawn = run.stream.next(len(prompts) - len(kept))
        return kept

    def answers(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        if not self.forward(run):
            return run.generate(prompts, self.samples)
        return run.from_data(prompts) if self.text == "data" else run.write_by_teacher(prompts, self.samples)

    def loss(self, run: Run, batch: Rollouts) -> Loss:
        forward = self.forward(run)
        stream, kind = (self.text, FORWARD_KL) if forward else ("student", REVERSE_KL)
        foreseen = self.loss_weight(batch, stream)
        weight = batch.sequence.get("weight")
        if weight is not None:
            weight = batch.response.expand(weight)
            foreseen = foreseen * weight
        hidden = run.student_hidden(batch)
        found = run.divergence(batch, hidden, {"teacher": 1.0}, kind, loss_weight=foreseen)
        values = found.value if weight is None else found.value * weight.to(found.value.device)
        metrics = {kind.kind: found.value.detach(), **divergence_metrics(found)}
        return Loss((self.term(kind.kind, values, stream),), metrics)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.rates)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rates = dict(state)
