"""Estimators against brute force over all subsets, and the interval against its own promise."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surpass.evaluate.passk import average, bootstrap, majority_at_k, pass_at_k

verdicts = st.lists(st.booleans(), min_size=1, max_size=9)


@given(verdicts, st.integers(1, 9))
def test_pass_at_k_is_the_mean_over_all_subsets(found: list[bool], k: int) -> None:
    (value,) = pass_at_k([len(found)], [sum(found)], k)
    if k > len(found):
        assert math.isnan(value)
        return
    subsets = list(combinations(found, k))
    # Both sides are a handful of float64 operations on numbers up to 1.
    assert value == pytest.approx(sum(any(s) for s in subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_of_many_samples_neither_overflows_nor_loses_small_values() -> None:
    (value,) = pass_at_k([100_000], [1], 1000)
    assert value == pytest.approx(0.01, rel=1e-9)  # one correct answer: k / n exactly; 1,000 rounded factors
    assert pass_at_k([4096, 4096], [0, 4096], 2048).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("samples", "correct", "k"), [([3], [4], 1), ([3], [-1], 1), ([3], [1], 0), ([3, 3], [1], 1)]
)
def test_pass_at_k_refuses_impossible_counts(samples: list[int], correct: list[int], k: int) -> None:
    with pytest.raises(ValueError, match=r"correct|at least 1|one length"):
        pass_at_k(samples, correct, k)


def test_average_is_pass_at_1_and_unknown_without_answers() -> None:
    samples, correct = [4, 8, 0], [1, 8, 0]
    np.testing.assert_allclose(average(samples, correct), pass_at_k(samples, correct, 1), atol=1e-15)


def _vote(subset: tuple[tuple[str | None, bool], ...], share: dict[str | None, float]) -> float:
    votes = Counter(answer for answer, _ in subset if answer is not None)
    if not votes:
        return 0.0
    elected = [answer for answer, count in votes.items() if count == max(votes.values())]
    return sum(share[answer] for answer in elected) / len(elected)


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "c", "d", None]), st.booleans()), min_size=1, max_size=8),
    st.integers(1, 8),
)
def test_majority_is_the_mean_over_all_subsets_and_ties(drawn: list[tuple[str | None, bool]], k: int) -> None:
    answers, correct = [a for a, _ in drawn], [c for _, c in drawn]
    value = majority_at_k(answers, correct, [k])[k]
    if k > len(drawn):
        assert math.isnan(value)
        return
    share = {a: float(np.mean([c for b, c in drawn if b == a])) for a in set(answers)}
    subsets = list(combinations(drawn, k))
    expected = sum(_vote(subset, share) for subset in subsets) / len(subsets)
    assert value == pytest.approx(expected, abs=1e-12)


def test_majority_of_many_samples_stays_exact() -> None:
    # 600 right, 400 wrong, two answers: the vote of three is a hypergeometric tail, written out by hand.
    value = majority_at_k(["x"] * 600 + ["y"] * 400, [True] * 600 + [False] * 400, [3])[3]
    expected = (math.comb(600, 3) + math.comb(600, 2) * 400) / math.comb(1000, 3)
    assert value == pytest.approx(expected, rel=1e-12)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        estimate = bootstrap(random.binomial(1, 0.4, size=100), resamples=500, seed=trial)
        assert estimate.low <= estimate.value <= estimate.high
        hits += estimate.low <= 0.4 <= estimate.high
    # 95% of 300 is 285 with a standard deviation of 3.8; at P = 100 the interval is slightly too narrow.
    assert 264 <= hits <= 299


def test_bootstrap_is_seeded_skips_unmeasured_prompts_and_narrows_with_the_level() -> None:
    values = [0.0, 1.0, 0.5, 1.0, float("nan"), 0.25]
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3).value == pytest.approx(0.55)
    wide, narrow = bootstrap(values, level=0.95), bootstrap(values, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert math.isnan(bootstrap([float("nan")]).value)
    with pytest.raises(ValueError, match="between 0 and 1"):
        bootstrap(values, level=95)
