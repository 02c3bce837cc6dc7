"""MAD-OPD: several teachers debate each question, and the student learns from all of them, each as far as it is sure.

    H = debate of K teachers over R rounds on s;   c_k in [0, 100]: confidence that teacher k claims in the last round
    w = softmax( c / (100 tau) )
    min_theta  1/|y| sum_t sum_k w_k D( teacher_k(. | s, H, y_<t), student(. | s, y_<t) ),   y ~ student(. | s)

Teachers read the debate before the student's own tokens; the student never does. D is the Jensen-Shannon divergence
for agents (at most ln 2, bounded gradient) and reverse KL for code, over the whole vocabulary. `opad` is the same at every
action of an episode: s is the question and all turns before.

Source: arXiv 2605.01347 and its code. All of the run's teachers take part in every prompt: their names (--teachers.NAME)
are no domains here. A missing confidence makes the weights uniform; a teacher that fails (says nothing, or cannot read
that much) leaves its weight to the others, and where all fail they grade the plain prompt. Where paper and code disagree:
`opad` of the paper acts in an environment, the code's default cuts recorded dialogues before every turn of the assistant,
which is `mad_opd` on such prompts; either counts each action as one answer of the batch, as done here, while the paper's
sum over an episode's actions differs by the scale. The code samples at temperature 0.7, top-p 0.8, top-k 20 and
repetition penalty 1.2 and takes the loss at temperature 1; set `rollout` so (there is no such penalty) or leave it. It
skips answers without any loss, which changes nothing, and repetitive ones (`most_repetition`), which here count as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from surpass.learn.aggregate import Loss
from surpass.learn.divergence import Divergence, Kind
from surpass.methods.base import Method, Needs, Reduction
from surpass.methods.debate import PLAIN, Debate, confidence_weights, hold_debates, length_for
from surpass.methods.run import Run
from surpass.methods.turns import generate_turns
from surpass.prompts.views import Messages
from surpass.records import Prompt, Rollouts, Scores
from surpass.roles.role import Role
from surpass.roles.scoring import Want, merge
from surpass.rollout.episodes import by_action


def repetition(ids: Sequence[int], size: int = 3) -> float:
    """Share of `size`-grams that occurred before; 0 for a text with none."""
    grams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(kw_only=True)
class MADOPD(Method):
    """On-policy distillation from teachers that debate (arXiv 2605.01347)."""

    reduction: Reduction = "sequence_mean"
    """Mean over each answer's tokens, then over answers."""
    divergence: Kind = "jsd"
    """Which divergence from each teacher."""
    beta: float | None = 0.5
    """Parameter of `jsd` and its relatives; null for forward and reverse KL."""
    rounds: int = 2
    """R: rounds of the debate; 0: none, all teachers read the plain prompt and count alike."""
    confidence_temperature: float = 1.0
    """tau: above 1 the weights are more even, below 1 less."""
    debate_tokens: int = 4096
    """Longest statement of a teacher in one round, in tokens."""
    most_repetition: float | None = 0.6
    """Answers of which a larger share of 3-grams are repeats count as 0; null: all are learnt from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 0 or self.debate_tokens < 1 or self.confidence_temperature <= 0:
            raise ValueError(
                "method.rounds is at least 0, method.debate_tokens at least 1 and method.confidence_temperature above 0; "
                f"found {self.rounds}, {self.debate_tokens} and {self.confidence_temperature}"
            )
        self.divergence_kind()

    def divergence_kind(self) -> Divergence:
        return Divergence(self.divergence, self.beta)

    def needs(self) -> Needs:
        return Needs(teacher=True, routed=False)

    def collect(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        rollouts = self.write(run, prompts)
        teachers = list(run.teachers.values())
        contexts, weights = self.listen(run, rollouts, teachers)
        for k, teacher in enumerate(teachers):
            scores = _graded(run, rollouts, teacher.name, contexts[k])
            share = {f"weight/{teacher.name}": weights[:, k]}
            rollouts = rollouts.with_(scores={teacher.name: scores}, sequence=share)
        return rollouts.with_(sequence={"kept": self.kept(run, rollouts)})

    def write(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        """The student's answers."""
        return run.generate(prompts, self.samples)

    def listen(
        self, run: Run, rollouts: Rollouts, teachers: Sequence[Role]
    ) -> tuple[list[list[Messages | None]], Tensor]:
        """What each of `K` teachers reads before each of `N` answers (None: the plain prompt), and weights `[N, K]`."""
        debates: dict[str, Debate] = {}
        if self.rounds:
            asked = {prompt.id: prompt for prompt in rollouts.prompts}
            law = replace(run.sampling, max_new_tokens=self.debate_tokens, min_new_tokens=0)
            debates = hold_debates(run, list(asked.values()), teachers, self.rounds, law)
        contexts: list[list[Messages | None]] = [[] for _ in teachers]
        weights, silent = [], 0
        for prompt, length in zip(rollouts.prompts, rollouts.lengths.tolist(), strict=True):
            debate = debates.get(prompt.id)
            heard: list[Messages | None] = [None] * len(teachers)
            for k, teacher in enumerate(teachers):
                if debate is not None and debate.spoke[k]:
                    context = debate.context(k)
                    read = length_for(run, teacher, replace(prompt, messages=context)) + length
                    heard[k] = context if read <= teacher.policy.max_length else None
            spoke = [context is not None for context in heard]
            confidences = debate.confidences if debate is not None else [None] * len(teachers)
            weights.append(confidence_weights(confidences, spoke, self.confidence_temperature))
            silent += spoke.count(False)
            for k, context in enumerate(heard):
                contexts[k].append(context)
        if self.rounds:
            run.metrics["debate/failed"] = silent / max(len(rollouts) * len(teachers), 1)
        return contexts, torch.tensor(weights)

    def kept(self, run: Run, rollouts: Rollouts) -> Tensor:
        """`[N]` bool: answers that do not go round in circles."""
        if self.most_repetition is None:
            return torch.ones(len(rollouts), dtype=torch.bool)
        kept = [repetition(ids) <= self.most_repetition for ids in rollouts.response.tolist()]
        run.metrics["completions/kept"] = sum(kept) / max(len(kept), 1)
        return torch.tensor(kept)

    def loss(self, run: Run, batch: Rollouts) -> Loss:
        hidden, kind = run.student_hidden(batch), self.divergence_kind()
        metrics: dict[str, Tensor] = {}
        total: Tensor | None = None
        for teacher in run.teachers.values():
            found = run.divergence(batch, hidden, {teacher.name: 1.0}, kind)
            weight = batch.response.expand(batch.sequence[f"weight/{teacher.name}"]).to(hidden.device)
            part = weight * found.value
            total = part if total is None else total + part
            metrics |= {f"{kind.kind}/{teacher.name}": found.value.detach(), f"weight/{teacher.name}": weight}
            metrics["entropy"] = found.student_entropy
        assert total is not None
        kept = batch.response.expand(batch.sequence["kept"]).to(total.device)
        return Loss((self.term(kind.kind, torch.where(kept, total, torch.zeros_like(total))),), metrics)


@dataclass(kw_only=True)
class OPAD(MADOPD):
    """On-policy agentic distillation: teachers debate before every action in an environment (arXiv 2605.01347)."""

    environment: str | None = None
    """What the student acts upon: embedded:TASK, python, or your own; null: each prompt's own, if it has one."""
    max_turns: int = 16
    """Most actions of an episode."""
    turn_seconds: float = 10.0
    """An episode whose environment takes longer than this for one step is broken off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_turns < 1 or self.turn_seconds <= 0:
            raise ValueError(
                "method.max_turns is at least 1 and method.turn_seconds above 0; found "
                f"{self.max_turns} and {self.turn_seconds}"
            )

    def write(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        """One row per action, in the state it was written in."""
        return generate_turns(
            run,
            prompts,
            self.samples,
            self.max_turns,
            self.environment,
            self.turn_seconds,
            rows=by_action,
        )


def _graded(run: Run, rollouts: Rollouts, teacher: str, contexts: Sequence[Messages | None]) -> Scores:
    """The teacher's distributions along the student's answers, each in its own context (None: as the student reads it)."""
    parts = []
    for debated in (True, False):
        rows = torch.tensor([i for i, c in enumerate(contexts) if (c is not None) == debated])
        if not len(rows):
            continue
        part = rollouts.select(rows)
        if debated:
            heard = [c for c in contexts if c is not None]
            asked = tuple(replace(p, messages=c) for p, c in zip(part.prompts, heard, strict=True))
            part = replace(part, prompts=asked)
        want = Want(logp=False, hidden=True)
        scored = run.score(part, teacher, want, view=PLAIN if debated else None)
        parts.append((rollouts.response.tokens_of(rows), scored.scores[teacher]))
    return merge(parts, len(rollouts.response.values))
