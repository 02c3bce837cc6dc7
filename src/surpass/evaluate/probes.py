"""What tells a run of distillation that works from one that does not, beside its score (arXiv 2604.13016).

Agreement of student and teacher on the tokens the student writes, how much of the gap to the teacher was closed, whether
the teacher's signal tells right answers from wrong ones, and how many tokens leave nothing to learn.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from surpass.learn.overlap import top_k_overlap
from surpass.records import Rollouts
from surpass.roles.role import Role
from surpass.roles.scoring import Want, score


@dataclass(frozen=True)
class Agreement:
    """Means over response tokens.

    overlap_ratio: share of the student's top-k that is in the teacher's. student_mass, teacher_mass: probability either
    gives to the shared tokens. overlap_advantage: over tokens with a shared one, `-KL(student || teacher) / |shared|` on
    the shared tokens; 0 where there is none (`overlap_tokens` 0). entropy_gap: nats, `|H(teacher) - H(student)|`.
    deterministic_share: tokens on which the teacher is nearly certain. signal_auc: see `rank_auc`, of the summed
    log-ratio of each answer; NaN where the answers are not judged.
    """

    overlap_ratio: float
    student_mass: float
    teacher_mass: float
    overlap_advantage: float
    overlap_tokens: int
    entropy_gap: float
    deterministic_share: float
    signal_auc: float

    def row(self) -> dict[str, float]:
        """By name, for a table or a line of JSON."""
        return {name: float(value) for name, value in asdict(self).items()}


def agreement(
    student: Role,
    teacher: Role,
    rollouts: Rollouts,
    *,
    k: int = 16,
    certain_from: float = 0.9,
    temperature: float = 1.0,
    token_budget: int = 16384,
) -> Agreement:
    """Measure a student against a teacher on answers, the student's own as a rule.

    k: size of the compared sets, cut to the smaller vocabulary. certain_from: see `near_deterministic`. Raises
    ValueError where there is no token at all.
    """
    if not len(rollouts.response.values):
        raise ValueError(
            "there is no response token to compare student and teacher on; give answers that are not empty"
        )
    want = Want(entropy=True, top_k=min(k, student.policy.vocabulary, teacher.policy.vocabulary))
    own, other = (
        score(role, rollouts, want, temperature=temperature, token_budget=token_budget)
        for role in (student, teacher)
    )
    found = top_k_overlap(
        *(_known(v) for v in (own.support, own.support_logp, other.support, other.support_logp))
    )
    shared = found.count > 0
    signal = rollouts.ragged(_known(other.logp) - _known(own.logp)).sum()
    return Agreement(
        overlap_ratio=float(found.ratio.mean()),
        student_mass=float(found.student_mass.mean()),
        teacher_mass=float(found.teacher_mass.mean()),
        overlap_advantage=float(found.advantage[shared].mean()) if bool(shared.any()) else 0.0,
        overlap_tokens=int(shared.sum()),
        entropy_gap=float((_known(other.entropy) - _known(own.entropy)).abs().mean()),
        deterministic_share=near_deterministic(_known(other.top1), certain_from),
        signal_auc=float("nan") if rollouts.reward is None else rank_auc(signal, rollouts.reward),
    )


def gap_recovery(before: float, after: float, teacher: float) -> float:
    """Share of the gap to the teacher that was closed: `(after - before) / (teacher - before)`, above 1 beyond it.

    NaN where there was no gap. Negative where the student fell, or where the teacher was the weaker one and it rose.
    """
    return (after - before) / (teacher - before) if teacher != before else float("nan")


def rank_auc(signal: Tensor, reward: Tensor, right_from: float = 1.0) -> float:
    """Probability that a right answer has a larger signal than a wrong one, ties counting half (area under the ROC).

    signal, reward: `[N]`; right: a reward of at least `right_from`; answers with a NaN are left out. NaN unless there are
    both right and wrong answers. 0.5 says nothing about the answer.
    """
    if signal.shape != reward.shape or signal.ndim != 1:
        raise ValueError(
            f"expected a signal and a reward per answer, found shapes {tuple(signal.shape)} and {tuple(reward.shape)}"
        )
    known = ~(signal.isnan() | reward.isnan())
    right = signal[known & (reward >= right_from)].double()
    wrong = signal[known & (reward < right_from)].double()
    if not len(right) or not len(wrong):
        return float("nan")
    ordered = wrong.sort().values
    below = torch.searchsorted(ordered, right, right=False)
    not_above = torch.searchsorted(ordered, right, right=True)
    return float((below + not_above).double().mean() / (2 * len(wrong)))


def near_deterministic(top1: Tensor, certain_from: float = 0.9) -> float:
    """Share of tokens on which the largest probability `[T]` is at least `certain_from`; NaN where there is no token."""
    known = top1[~top1.isnan()]
    return float((known >= certain_from).double().mean())


def _known(values: Tensor | None) -> Tensor:
    assert values is not None
    return values
