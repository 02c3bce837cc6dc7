"""Decoupling: whose text, and which direction of KL, are two choices; and how long the text is, a third.

    min_theta  E_{s ~ prefix} [ lambda KL( student(. | s) || teacher(. | s) ) + (1 - lambda) KL( teacher || student ) ]

                       forward (lambda = 0)              reverse (lambda = 1)
    teacher or data    SFT with soft labels              like offline reinforcement learning
    student            like DAgger                       on-policy distillation

The KL of whole answers ties the two: KL(teacher || student) is forward KL on the teacher's text, KL(student || teacher)
reverse KL on the student's. `mixed` takes both directions at the same states; a small lambda is advised for long answers,
where reverse KL drives the entropy to 0 and answers grow.

The length curriculum `caps` limits answers to L_0 tokens, then L_1, ...: after `stage_steps` steps at a cap the student's
mean token entropy H is measured on that step's batch, before it is trained on, and

    the next cap if H >= entropy_floor, else the present cap for good.

Source: arXiv 2605.16826; no code was released. The values of lambda, of the caps and of the floor are not published:
lambda is 0.25 here; caps and floor must be chosen (doubling from 128 tokens, and half the entropy at the start, are
sensible). The paper measures H on held-out prompts; the fresh prompts of a step are that during the first epoch. Tokens
are averaged over the batch; the paper does not say how.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from surpass.learn.aggregate import Loss
from surpass.learn.divergence import Divergence
from surpass.methods.base import Method, Needs, divergence_metrics
from surpass.methods.run import Run
from surpass.records import Prompt, Rollouts
from surpass.roles.scoring import Want


@dataclass(kw_only=True)
class Decoupling(Method):
    """Any prefix source with any direction of KL, and an entropy-gated length curriculum (arXiv 2605.16826)."""

    prefix: Literal["student", "teacher", "data"] = "student"
    """Who writes the text."""
    divergence: Literal["forward", "reverse", "mixed"] = "mixed"
    """Direction of the KL to the teacher, over the whole vocabulary."""
    reverse_share: float | None = None
    """lambda of `mixed`, in [0, 1]; null: 0.25. Null for the other two."""
    caps: list[int] = field(default_factory=list)
    """Longest answer of each stage in tokens, rising, at most `rollout.max_new_tokens`; empty: no curriculum."""
    stage_steps: int | None = None
    """Steps at a cap before its gate."""
    entropy_floor: float | None = None
    """Nats: the student's mean token entropy from which the next cap is tried."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence != "mixed" and self.reverse_share is not None:
            raise ValueError(
                f"method.reverse_share mixes the directions; divergence {self.divergence!r} has one: leave it null"
            )
        self.kind()  # raises for a share outside [0, 1]
        if self.prefix == "data" and self.samples != 1:
            raise ValueError(
                f"each prompt of a data set has one response, found method.samples {self.samples}"
            )
        given = [self.stage_steps is not None, self.entropy_floor is not None]
        if given != [bool(self.caps)] * 2:
            raise ValueError(
                "a length curriculum needs method.caps, method.stage_steps and method.entropy_floor together, found "
                f"{self.caps}, {self.stage_steps}, {self.entropy_floor}"
            )
        if self.caps and (
            self.caps[0] < 1 or any(a >= b for a, b in zip(self.caps, self.caps[1:], strict=False))
        ):
            raise ValueError(f"method.caps must rise from at least 1 token, found {self.caps}")
        if self.stage_steps is not None and self.stage_steps < 1:
            raise ValueError(f"method.stage_steps must be at least 1, found {self.stage_steps}")
        self.stage, self.done, self.stopped = 0, 0, False

    def kind(self) -> Divergence:
        """What is minimised."""
        if self.divergence == "mixed":
            return Divergence("mixed_kl", 0.25 if self.reverse_share is None else self.reverse_share)
        return Divergence("forward_kl" if self.divergence == "forward" else "reverse_kl")

    def needs(self) -> Needs:
        given = self.prefix == "data"
        return Needs(teacher=True, response=given, rollouts=not given)

    def collect(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        rollouts = self.write(run, prompts)
        if self.caps:
            self.gate(run, rollouts)
        return run.score(rollouts, "teacher", Want(logp=False, hidden=True))

    def write(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        """The text of whoever writes it, no longer than the present cap."""
        cap = self.cap(run)
        if self.prefix == "data":
            return run.from_data(prompts, cap)
        sampling = replace(run.sampling, max_new_tokens=cap)
        if self.prefix == "teacher":
            return run.write_by_teacher(prompts, self.samples, sampling=sampling)
        return run.generate(prompts, self.samples, sampling=sampling)

    def cap(self, run: Run) -> int:
        """Longest answer now, in tokens."""
        longest = run.sampling.max_new_tokens
        if self.caps and self.caps[-1] > longest:
            raise ValueError(
                f"the last of method.caps is {self.caps[-1]} tokens, but rollout.max_new_tokens is {longest}; raise it, so "
                "that every prompt leaves room for the longest answer"
            )
        return self.caps[self.stage] if self.caps else longest

    def gate(self, run: Run, rollouts: Rollouts) -> None:
        """Count the step; at the end of a stage measure the entropy and advance, or stay for good."""
        assert self.stage_steps is not None and self.entropy_floor is not None
        run.metrics["curriculum/cap"] = float(self.caps[self.stage])
        self.done += 1
        if self.stopped or self.done < self.stage_steps or self.stage + 1 == len(self.caps):
            return
        measured = run.score(rollouts, "old", Want(logp=False, entropy=True)).scores["old"].entropy
        assert measured is not None
        entropy = float(measured.mean()) if len(measured) else 0.0
        run.metrics["curriculum/entropy"] = entropy
        if entropy >= self.entropy_floor:
            self.stage, self.done = self.stage + 1, 0
        else:
            self.stopped = True

    def loss(self, run: Run, batch: Rollouts) -> Loss:
        kind = self.kind()
        found = run.divergence(
            batch,
            run.student_hidden(batch),
            {"teacher": 1.0},
            kind,
            loss_weight=self.loss_weight(batch, self.prefix),
        )
        metrics = {kind.kind: found.value.detach(), **divergence_metrics(found)}
        return Loss((self.term(kind.kind, found.value, self.prefix),), metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "done": self.done, "stopped": self.stopped} if self.caps else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self.caps:
            return super().load_state_dict(state)
        self.stage, self.done, self.stopped = state["stage"], state["done"], state["stopped"]
