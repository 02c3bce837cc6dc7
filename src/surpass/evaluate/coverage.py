"""Which prompts a student solves that its teacher does not, and the other way round."""

from __future__ import annotations

from dataclasses import dataclass

from surpass.evaluate.passk import pass_at_k
from surpass.evaluate.summary import Evaluation


@dataclass(frozen=True)
class Coverage:
    """Prompt ids by who solves them: both, the student alone, the teacher alone, neither."""

    both: frozenset[str]
    student_only: frozenset[str]
    teacher_only: frozenset[str]
    neither: frozenset[str]

    @property
    def gained(self) -> float:
        """Share of all prompts that only the student solves: what it did not get from the teacher."""
        return len(self.student_only) / self._total

    @property
    def lost(self) -> float:
        """Share of all prompts that only the teacher solves."""
        return len(self.teacher_only) / self._total

    @property
    def _total(self) -> int:
        return len(self.both) + len(self.student_only) + len(self.teacher_only) + len(self.neither)


def solved(evaluation: Evaluation, k: int = 1, threshold: float = 0.5) -> frozenset[str]:
    """Ids of the prompts whose pass@`k` is at least `threshold`.

    Raises ValueError where a prompt has fewer than `k` judged answers, since its pass@k is unknown.
    """
    counts = evaluation.counts()
    ids = list(counts)
    values = pass_at_k([counts[i].judged for i in ids], [counts[i].correct for i in ids], k)
    unknown = [i for i, value in zip(ids, values, strict=True) if value != value]
    if unknown:
        raise ValueError(
            f"{len(unknown)} prompts have fewer than {k} judged answers (first: {unknown[0]!r}); "
            "evaluate with more samples or ask for a smaller k"
        )
    # Products of float ratios may miss an exact threshold such as 0.5 by a rounding error.
    return frozenset(i for i, value in zip(ids, values, strict=True) if value >= threshold - 1e-9)


def coverage(student: Evaluation, teacher: Evaluation, k: int = 1, threshold: float = 0.5) -> Coverage:
    """Compare what two models solve on the same prompts; raises ValueError where the prompts differ."""
    everyone, others = set(student.counts()), set(teacher.counts())
    if everyone != others or not everyone:
        raise ValueError(
            f"both evaluations must hold the same prompts: {len(everyone - others)} are only in the "
            f"student's, {len(others - everyone)} only in the teacher's, {len(everyone & others)} in both"
        )
    mine, theirs = solved(student, k, threshold), solved(teacher, k, threshold)
    return Coverage(mine & theirs, mine - theirs, theirs - mine, frozenset(everyone) - mine - theirs)
