"""BRTS: on-policy distillation beside one good answer of the teacher to every prompt, the one nearest to the student.

    L = L_student + lambda L_teacher
    L_student = reverse KL on the student's likeliest tokens, on its own answers            (rethinking_opd)
    L_teacher = sum_t sum_{v in top-K of teacher} T(v) log( T(v) / S(v) )                   on one answer y' of the teacher

y' is chosen among `candidates` answers of the teacher by their overlap with the student, the share of positions t at which
y'_t is among the student's K likeliest tokens at position t of its own answer:

    tier 1  a correct candidate of greatest overlap;
    tier 2  all are wrong: the teacher writes once more, knowing the answer it must not mention; taken if correct;
    tier 3  else the candidate of greatest overlap.

Positions are compared as long as both answers last, and averaged over the student's answers to the prompt.

Source: arXiv 2605.09725 and its code. Where they disagree the paper is followed. In the code the second branch is off; its
default weights give `sum_k w_k grad log S_k` on the student's own top-K, which no teacher enters, and another setting has
the wrong sign; the launchers instead compare the teacher's distributions on its answer with the student's tokens at the
same index, and cut the teacher's answer at the student's length. Here the teacher's answer is scored after its own prefix,
whole, and the gradient of a token at K = V is `S - T`. The code's one correct setting divides that gradient by the teacher's
mass in the support; so does not the paper's formula (`teacher_tail: drop`). Under which prompt an answer of tier 2 is
graded is not published: the plain one, or `rescue_context: silent_key`. Not included: the rewording of one candidate's
prompt, whose wording is not published.

Each loss is averaged over its own tokens (streams `student` and `teacher`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from surpass.learn.aggregate import Loss
from surpass.learn.divergence import Divergence
from surpass.learn.support import top_k_divergence
from surpass.learn.vocabulary import support_logp
from surpass.methods.base import Needs
from surpass.methods.opd import role_column
from surpass.methods.rethinking_opd import RethinkingOPD
from surpass.methods.run import Run
from surpass.prompts.views import View
from surpass.records import Prompt, Ragged, Rollouts
from surpass.roles.scoring import Want, join

SILENT_KEY = View("silent_key")


class Choice(NamedTuple):
    """Of each group, in ascending order: row: `[P]` the best candidate; tier: `[P]` 1, 2 or 3."""

    row: Tensor
    tier: Tensor


def choose(correct: Tensor, overlap: Tensor, group: Tensor, rescued: Tensor | None = None) -> Choice:
    """The tiers, from candidates alone: correct `[M]` bool, overlap `[M]` in [0, 1], group `[M]` ids.

    rescued: `[P]` bool, groups whose rewritten answer is correct; None: none. In tier 2 `row` is what tier 3 would take.
    Equal overlaps: the first candidate.
    """
    rows, tiers = [], []
    for g, value in enumerate(group.unique()):
        mine = torch.nonzero(group == value).squeeze(1)
        right = mine[correct[mine]]
        pool = right if len(right) else mine
        rows.append(pool[overlap[pool].argmax()])
        tiers.append(1 if len(right) else 2 if rescued is not None and bool(rescued[g]) else 3)
    return Choice(torch.stack(rows), torch.tensor(tiers))


def position_overlap(candidate: Tensor, support: Tensor) -> float:
    """Share of positions at which a candidate's token `[L]` is in the student's support `[L', K]` there; 0 for none."""
    both = min(len(candidate), len(support))
    if both == 0:
        return 0.0
    return float((candidate[:both].unsqueeze(-1) == support[:both]).any(-1).float().mean())


@dataclass(kw_only=True)
class BRTS(RethinkingOPD):
    """On-policy distillation with best-of-N teacher rollout selection (arXiv 2605.09725)."""

    samples: int = 1
    """Answers of the student to each prompt."""
    teacher_weight: float = 10.0
    """lambda: weight of the forward KL on the teacher's answer; at 0 the teacher writes nothing."""
    candidates: int = 2
    """Answers of the teacher to each prompt, of which one is learnt from (paper: 1 to 4)."""
    teacher_temperature: float = 0.7
    """Sampling temperature of the teacher's answers."""
    teacher_top_p: float = 0.95
    """Nucleus of the teacher's answers."""
    teacher_tail: Literal["drop", "renormalise", "bucket"] = "drop"
    """What happens to the mass outside the teacher's top-K in the forward KL; K is `top_k`."""
    correct_from: float = 1.0
    """An answer is correct if its reward is at least this."""
    rescue: bool = True
    """Tier 2: where all candidates are wrong the teacher writes once more, knowing the prompt's answer."""
    rescue_context: Literal["plain", "silent_key"] = "plain"
    """What the teacher reads while it grades an answer of tier 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates < 1:
            raise ValueError(f"method.candidates must be at least 1, found {self.candidates}")
        if self.teacher_weight < 0:
            raise ValueError(f"method.teacher_weight must not be negative, found {self.teacher_weight}")

    def needs(self) -> Needs:
        needs = super().needs()
        return replace(needs, reward=True) if self.teacher_weight else needs

    def collect(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        student = super().collect(run, prompts)
        if not self.teacher_weight:
            return student
        selected = self.select(run, prompts, student)
        # Nobody's sampling law draws the best of several, and the reward of a batch is the student's.
        unknown = torch.full_like(selected.sampler_logp, torch.nan)
        reward = None if student.reward is None else torch.full((len(selected),), torch.nan)
        selected = replace(
            selected, sampler_logp=unknown, temperature=student.temperature, reward=reward, components={}
        )
        parts = [student, selected]
        return join([p.with_(sequence={"selected": torch.full((len(p),), p is selected)}) for p in parts])

    def select(self, run: Run, prompts: list[Prompt], student: Rollouts) -> Rollouts:
        """One answer of the teacher to each prompt, with its own likeliest tokens there as scores `guide`."""
        law = replace(run.sampling, temperature=self.teacher_temperature, top_p=self.teacher_top_p)
        candidates = run.reward(run.write_by_teacher(prompts, self.candidates, sampling=law))
        overlap = self.overlaps(run, student, candidates)
        correct = self.correct(candidates)
        choice = choose(correct, overlap, candidates.group)
        failed = torch.nonzero(choice.tier == 3).squeeze(1)
        written = None
        if self.rescue and len(failed):
            again = [prompts[i] for i in failed.tolist()]
            written = run.reward(run.write_by_teacher(again, view=SILENT_KEY, sampling=law))
            rescued = torch.zeros(len(prompts), dtype=torch.bool)
            rescued[failed] = self.correct(written)
            choice = choose(correct, overlap, candidates.group, rescued)
        for tier in (1, 2, 3):
            run.metrics[f"brts/tier_{tier}"] = float((choice.tier == tier).float().mean())
        run.metrics["brts/overlap"] = float(overlap[choice.row].mean())
        parts = [self.guided(run, candidates.select(choice.row[choice.tier != 2]), None)]
        if written is not None:
            view = SILENT_KEY if self.rescue_context == "silent_key" else None
            parts.append(
                self.guided(run, written.select(torch.nonzero(self.correct(written)).squeeze(1)), view)
            )
        return join([part for part in parts if len(part)])

    def correct(self, answers: Rollouts) -> Tensor:
        """`[N]` bool; an answer the judge left out is not correct."""
        assert answers.reward is not None
        return answers.reward >= self.correct_from

    def overlaps(self, run: Run, student: Rollouts, candidates: Rollouts) -> Tensor:
        """`[M]`: each candidate's overlap with the student's answers to the same prompt, their mean."""
        want = Want(logp=False, top_k=self.support_size(run))
        support = run.score(student, "old", want).scores["old"].support
        assert support is not None
        likely: Ragged = student.ragged(support)
        found = []
        for i, group in enumerate(candidates.group.tolist()):
            own = torch.nonzero(student.group == group).squeeze(1).tolist()
            found.append(sum(position_overlap(candidates.response[i], likely[j]) for j in own) / len(own))
        return torch.tensor(found)

    def guided(self, run: Run, answers: Rollouts, view: View | None) -> Rollouts:
        """The teacher's likeliest tokens along its own answers."""
        if not len(answers):
            return answers
        scored = run.score(answers, "teacher", Want(logp=False, top_k=self.support_size(run)), view=view)
        return replace(answers, scores={"guide": scored.scores["teacher"]})

    def loss(self, run: Run, batch: Rollouts) -> Loss:
        if "selected" not in batch.sequence:
            return super().loss(run, batch)
        hidden, total = run.student_hidden(batch), len(batch.response.values)
        selected = batch.sequence["selected"]
        own = torch.nonzero(~selected).squeeze(1)
        tokens = batch.response.tokens_of(own)
        base = self.distillation(run, batch.select(own), hidden[tokens])
        # A small update may hold answers of one side alone: the other term is then 0.
        terms = [replace(t, values=_placed(t.values, tokens, total, 0.0), optional=True) for t in base.terms]
        metrics = {name: _placed(value, tokens, total, torch.nan) for name, value in base.metrics.items()}

        tokens = torch.nonzero(batch.response.expand(selected)).squeeze(1)
        guide = batch.scores["guide"]
        assert guide.support is not None and guide.support_logp is not None
        ids = guide.support[tokens].to(hidden.device)
        target = role_column(guide.support_logp[tokens], "teacher").to(hidden.device)
        student = support_logp(hidden[tokens], run.student.head, ids, run.temperature)
        everything = torch.ones_like(ids, dtype=torch.bool)
        found = top_k_divergence(Divergence("forward_kl"), student, target, everything, self.teacher_tail)
        guided = self.term(
            "teacher_forward_kl", _placed(found.value, tokens, total, 0.0), "teacher", self.teacher_weight
        )
        metrics["guide/student_mass"], metrics["guide/teacher_mass"] = found.student_mass, found.target_mass
        return Loss((*terms, replace(guided, optional=True)), metrics)


def _placed(values: Tensor, tokens: Tensor, total: int, fill: float) -> Tensor:
    """`values` `[t]` at flat `tokens` of `total`, `fill` elsewhere."""
    empty = torch.full((total,), fill, dtype=torch.float32, device=values.device)
    return empty.index_copy(0, tokens.to(values.device), values.float())
