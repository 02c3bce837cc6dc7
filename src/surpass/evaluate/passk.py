"""pass@k, avg@k, maj@k per prompt, and bootstrap intervals over prompts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean and the two ends of its interval; all NaN where nothing could be measured."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def pass_at_k(samples: Sequence[int] | NDArray, correct: Sequence[int] | NDArray, k: int) -> Floats:
    """Unbiased probability that at least one of `k` answers is correct, `[P]` (arXiv:2107.03374).

    samples, correct: `[P]` answers judged, and correct ones among them. The estimator
    `1 - C(n - c, k) / C(n, k)` is taken as a product, so that no binomial overflows.
    NaN for prompts with fewer than `k` answers: nothing unbiased can be said of them.
    """
    n, c = np.asarray(samples, dtype=np.int64), np.asarray(correct, dtype=np.int64)
    if n.shape != c.shape or n.ndim != 1:
        raise ValueError(
            f"samples and correct must be two lists of one length, found shapes {n.shape} and {c.shape}"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, found {k}")
    if ((c < 0) | (c > n)).any():
        worst = int(np.argmax((c < 0) | (c > n)))
        raise ValueError(f"prompt {worst} has {c[worst]} correct answers out of {n[worst]}")
    # C(n - c, k) / C(n, k) = prod over j < k of (n - c - j) / (n - j): the chance that no draw is correct.
    missed = np.ones(n.shape)
    for j in range(k):
        missed *= np.clip(n - c - j, 0, None) / np.maximum(n - j, 1)
    return np.where(n >= k, 1.0 - missed, np.nan)


def average(samples: Sequence[int] | NDArray, correct: Sequence[int] | NDArray) -> Floats:
    """Share of correct answers per prompt, `[P]` (avg@n); NaN for a prompt without judged answers."""
    n, c = np.asarray(samples, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    return np.where(n > 0, c / np.maximum(n, 1), np.nan)


def majority_at_k(
    answers: Sequence[Hashable | None], correct: Sequence[bool] | NDArray, ks: Sequence[int]
) -> dict[int, float]:
    """Expected accuracy of the majority vote of `k` answers drawn without replacement, for one prompt.

    answers: `n` extracted answers, None where nothing was found (such an answer is drawn but does not vote).
    correct: `n` verdicts. The expectation is exact, over all subsets of size `k` and over ties, which are
    broken uniformly; a vote without votes is wrong. An elected answer counts by the share of its samples that
    were judged correct (0 or 1 unless a verifier reads more than the answer). NaN where `k > n`.
    """
    n = len(answers)
    if len(correct) != n:
        raise ValueError(f"{n} answers but {len(correct)} verdicts")
    groups: dict[Hashable, list[bool]] = {}
    for answer, verdict in zip(answers, correct, strict=True):
        if answer is not None:
            groups.setdefault(answer, []).append(bool(verdict))
    silent = n - sum(len(verdicts) for verdicts in groups.values())
    counts = {answer: len(verdicts) for answer, verdicts in groups.items()}

    feasible = [k for k in ks if 1 <= k <= n]
    won = dict.fromkeys(feasible, 0.0)
    largest = max(feasible, default=0)
    for answer, verdicts in groups.items():
        if not any(verdicts) or not feasible:
            continue
        others = [count for other, count in counts.items() if other != answer]
        for votes in range(1, min(len(verdicts), largest) + 1):
            ways = _ways(others, silent, votes, largest - votes)
            share = comb(len(verdicts), votes) * sum(verdicts) / len(verdicts)
            for k in feasible:
                if k >= votes:
                    won[k] += (
                        share * sum(w / (1 + ties) for ties, w in enumerate(ways[:, k - votes])) / comb(n, k)
                    )
    return {k: won.get(k, float("nan")) for k in ks}


def _ways(others: Sequence[int], silent: int, votes: int, room: int) -> NDArray[np.object_]:
    """`[ties + 1, room + 1]` ways to draw `room'` further answers so that no other one tops `votes`.

    Python integers, because binomials of many samples do not fit a float.
    """
    ties = min(sum(count >= votes for count in others), room // votes)
    table = np.zeros((ties + 1, room + 1), dtype=object)
    table[0, : silent + 1] = [comb(silent, drawn) for drawn in range(min(silent, room) + 1)]
    for count in others:
        grown = np.zeros_like(table)
        for drawn in range(min(count, votes - 1, room) + 1):
            grown[:, drawn:] += comb(count, drawn) * table[:, : room + 1 - drawn]
        if count >= votes and ties:
            grown[1:, votes:] += comb(count, votes) * table[:-1, : room + 1 - votes]
        table = grown
    return table


def bootstrap(
    per_prompt: Sequence[float] | NDArray, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Mean over prompts and its percentile interval when prompts are drawn again with replacement.

    per_prompt: `[P]`; NaN entries (prompts that could not be measured) are left out.
    level: of the interval, two-sided. The same seed gives the same interval.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, found {level}")
    values = np.asarray(per_prompt, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return Estimate(float("nan"), float("nan"), float("nan"))
    random = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // len(values))  # bounds the index table to 32 MB however many prompts there are
    means = [
        values[random.integers(len(values), size=(min(chunk, resamples - start), len(values)))].mean(axis=1)
        for start in range(0, resamples, chunk)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values.mean()), float(low), float(high))
