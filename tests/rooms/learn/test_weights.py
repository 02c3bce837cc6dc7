"""Weights, shifts and selections: exact counts, exact gaps, and nothing inapplicable in any statistic."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surpass.learn.weights import (
    balanced,
    beta_kernel,
    curvature_gate,
    drawn_share,
    kept_count,
    margin_mask,
    margin_shift,
    min_max,
    soft_or,
    softmax_weights,
    top_share,
)

NAN = math.nan
finite = st.floats(-5, 5, width=32)
unit = st.floats(0, 1, width=32)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- tokens ---------------------------------------------------------------------------------------------------------


@given(st.lists(finite, min_size=1, max_size=30))
def test_min_max_lies_in_the_unit_interval_and_constants_are_zero(values: list[float]):
    found = min_max(torch.tensor(values))
    assert bool(((found >= 0) & (found <= 1)).all())
    if len(set(values)) == 1:
        assert not bool(found.any())
    else:
        assert float(found.max()) == 1 and float(found.min()) == 0


def test_min_max_cuts_the_top_at_the_percentile():
    values = torch.cat([torch.arange(99.0), tensor(1e6)])
    found = min_max(values, 0.98)
    # The 98th of 100 values is 97: it and the two above it are the greatest.
    torch.testing.assert_close(found[:98], torch.arange(98.0) / 97)
    assert found[97:].tolist() == [1.0, 1.0, 1.0]
    assert len(min_max(torch.zeros(0), 0.98)) == 0


@given(unit, unit)
def test_soft_or_is_a_symmetric_or(a: float, b: float):
    found = float(soft_or(torch.tensor(a), torch.tensor(b)))
    assert found == float(soft_or(torch.tensor(b), torch.tensor(a)))
    # One rounding of a sum of size 2.
    assert max(a, b) - 3e-7 <= found <= 1 + 3e-7
    assert float(soft_or(torch.tensor(0.0), torch.tensor(b))) == b


@given(st.lists(finite, min_size=1, max_size=40), st.floats(0.01, 1))
def test_top_share_keeps_the_highest_and_exactly_so_many(values: list[float], share: float):
    scores = torch.tensor(values)
    kept = top_share(scores, share)
    assert int(kept.sum()) == kept_count(len(values), share)
    if not bool(kept.all()):
        assert float(scores[kept].min()) >= float(scores[~kept].max())


@pytest.mark.parametrize(
    ("total", "share", "count"),
    [(100, 0.29, 29), (10, 0.3, 3), (9, 0.5, 4), (3, 0.1, 1), (0, 0.5, 0), (7, 1.0, 7)],
)
def test_kept_count(total: int, share: float, count: int):
    assert kept_count(total, share) == count


def test_of_equal_scores_the_earlier_token_is_kept():
    assert top_share(torch.zeros(4), 0.5).tolist() == [True, True, False, False]


def test_drawn_share_follows_the_weights_and_takes_zeros_last():
    weights = tensor(0.0, 1.0, 3.0, 0.0)
    counts = torch.zeros(4)
    for seed in range(2000):
        counts += drawn_share(weights, 0.25, generator(seed))
    # Three standard deviations of 2000 draws with chance 3/4.
    assert counts[0] == counts[3] == 0 and counts[2] / 2000 == pytest.approx(0.75, abs=0.03)
    assert drawn_share(weights, 0.5, generator()).tolist() == [False, True, True, False]
    assert int(drawn_share(weights, 0.75, generator()).sum()) == 3
    assert int(drawn_share(torch.zeros(4), 0.5, generator()).sum()) == 2


def test_curvature_gate_is_one_at_agreement_and_fades_on_both_sides():
    x = tensor(-math.inf, -100.0, -0.1, 0.0, 0.1, 1.0, 100.0)
    found = curvature_gate(x, 0.007)
    expected = [
        0.0,
        0.0,
        math.exp(-(math.exp(-0.1) - 0.9) / 0.007),
        1.0,
        math.exp(-(math.exp(0.1) - 1.1) / 0.007),
    ]
    # expm1 of 0.1 is exact to 1e-8, divided by 0.007.
    torch.testing.assert_close(found[:5], torch.tensor(expected), rtol=1e-5, atol=0)
    assert float(found[5]) < 1e-40 and float(found[6]) == 0


# -- answers --------------------------------------------------------------------------------------------------------


def gap(returns: Tensor, correct: Tensor, statistic: str) -> float:
    right, wrong = returns[correct == 1], returns[correct == 0]
    if statistic == "mean":
        return float(right.mean() - wrong.mean())
    return float(right.min() - wrong.max())


groups = st.lists(st.tuples(finite, st.sampled_from([0.0, 1.0, NAN])), min_size=2, max_size=12)
each_statistic = pytest.mark.parametrize("statistic", ["mean", "minmax"])
each_direction = pytest.mark.parametrize("direction", ["correct_up", "incorrect_down", "both"])


@each_statistic
@each_direction
@settings(max_examples=30)
@given(group=groups, margin=st.integers(-16, 16).map(lambda k: k / 8))
def test_after_the_shift_the_gap_is_the_margin(statistic, direction, group, margin):
    returns, correct = (torch.tensor(column) for column in zip(*group, strict=True))
    shift = margin_shift(returns, correct, torch.zeros(len(returns)), margin, statistic, direction)
    assert not bool(shift[correct.isnan()].any())
    if not (correct == 1).any() or not (correct == 0).any() or gap(returns, correct, statistic) >= margin:
        assert not bool(shift.any())
        return
    # Float32 returns of size up to 20 after the shift.
    assert gap(returns + shift, correct, statistic) == pytest.approx(margin, abs=2e-5)
    right, wrong = shift[correct == 1], shift[correct == 0]
    assert len(right.unique()) == len(wrong.unique()) == 1
    up, down = float(right[0]), float(wrong[0])
    assert {"correct_up": down == 0, "incorrect_down": up == 0, "both": up == -down}[direction]
    lack = margin - gap(returns, correct, statistic)
    assert up - down == pytest.approx(lack, rel=1e-5, abs=1e-6)


@each_statistic
def test_the_shift_ignores_a_constant_and_is_taken_group_by_group(statistic):
    returns, correct = tensor(0.25, -0.5, 0.5, 0.0, 1.0, 2.0), tensor(1, 0, 0, 1, 0, 1)
    group = torch.tensor([7, 7, 7, 3, 3, 9])
    shift = margin_shift(returns, correct, group, 0.5, statistic)
    # Powers of two: no rounding.
    assert torch.equal(margin_shift(returns + 4, correct, group, 0.5, statistic), shift)
    lack = 0.5 - {"mean": 0.25, "minmax": -0.25}[statistic]
    assert shift.tolist() == [lack / 2, -lack / 2, -lack / 2, 0.75, -0.75, 0.0]
    assert not bool(margin_shift(returns, correct, group, -math.inf, statistic).any())


def test_returns_that_are_not_finite_enter_no_statistic():
    returns, correct = tensor(0.25, -math.inf, NAN, 0.5, 0.0), tensor(1, 1, 1, 0, NAN)
    shift = margin_shift(returns, correct, torch.zeros(5), 0.5)
    assert shift.tolist() == [0.375, 0.0, 0.0, -0.375, 0.0]
    assert margin_mask(returns, correct, torch.zeros(5), 0.5).all()


@pytest.mark.parametrize(
    ("statistic", "margin", "least_kept", "kept"),
    [
        # correct 4 1.5 -2.5, incorrect -3 0 3: the means are 1 apart, the extremes -5.5.
        ("mean", 1.0, 0.25, [1, 1, 1, 1, 1, 1]),
        ("mean", 1.5, 0.25, [1, 1, 0, 1, 1, 1]),
        ("mean", 3.0, 0.25, [1, 1, 0, 1, 1, 0]),
        ("minmax", 0.0, 0.25, [1, 1, 0, 1, 1, 0]),
        ("minmax", 100.0, 0.25, [1, 0, 0, 1, 0, 0]),
        ("minmax", 100.0, 0.75, [1, 1, 0, 1, 1, 1]),
        ("minmax", 100.0, 1.0, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_the_greedy_mask_drops_what_narrows_the_gap_most(statistic, margin, least_kept, kept):
    returns, correct = tensor(4.0, 1.5, -2.5, -3.0, 0.0, 3.0), tensor(1, 1, 1, 0, 0, 0)
    found = margin_mask(returns, correct, torch.zeros(6), margin, statistic, least_kept)
    assert found.tolist() == [bool(k) for k in kept]


@settings(max_examples=50)
@given(group=groups, margin=st.floats(0, 3), least_kept=st.floats(0.05, 1))
def test_the_mask_never_narrows_a_gap_nor_empties_a_class(group, margin, least_kept):
    returns, correct = (torch.tensor(column) for column in zip(*group, strict=True))
    kept = margin_mask(returns, correct, torch.zeros(len(returns)), margin, "minmax", least_kept)
    assert bool(kept[correct.isnan()].all())
    if not (correct == 1).any() or not (correct == 0).any():
        assert bool(kept.all())
        return
    known = ~correct.isnan()
    assert int((kept & known).sum()) >= least_kept * int(known.sum())
    before, after = (gap(returns[k], correct[k], "minmax") for k in (known, known & kept))
    assert after >= before
    if bool(kept.all()) and before < margin:
        assert int(known.sum()) - 1 < least_kept * int(known.sum()) or int(known.sum()) == 2


@pytest.mark.parametrize(
    ("ratio", "right", "wrong"),
    [(1.0, 2, 2), (0.5, 2, 4), (0.0, 0, 5), (math.inf, 2, 0), (4.0, 2, 1), (0.1, 1, 5), (100.0, 2, 1)],
)
def test_balance_thins_the_excess_alone(ratio, right, wrong):
    correct = tensor(1, 0, NAN, 0, 0, 1, 0, 0)
    for seed in range(5):
        kept = balanced(correct, torch.zeros(8), ratio, generator(seed))
        assert (int(kept[correct == 1].sum()), int(kept[correct == 0].sum())) == (right, wrong)
        assert bool(kept[2])


def test_balance_is_random_by_its_generator_and_leaves_one_class_alone():
    correct, group = tensor(1, 1, 1, 1, 1, 0, 1, 1), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    draws = [balanced(correct, group, 1.0, generator(seed)) for seed in range(20)]
    assert torch.equal(draws[3], balanced(correct, group, 1.0, generator(3)))
    assert len({tuple(d.tolist()) for d in draws}) > 2
    assert all(bool(d[5:].all()) and int(d[:5].sum()) == 1 for d in draws)
    assert int(balanced(correct, torch.zeros(8), 1.0, generator()).sum()) == 2


def test_softmax_weights_have_mean_one_over_judged_answers():
    found = softmax_weights(tensor(1.0, NAN, 0.0, 1.0), 0.5)
    assert float(found.sum()) == pytest.approx(3) and float(found[1]) == 0
    assert float(found[0] / found[2]) == pytest.approx(math.exp(2), rel=1e-6)
    torch.testing.assert_close(softmax_weights(tensor(1.0, 0.0), 1e9), tensor(1.0, 1.0))
    assert softmax_weights(tensor(NAN, NAN), 1.0).tolist() == [0.0, 0.0]


# -- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (2.0, 1.0), (1.0, 3.0), (0.5, 0.5)])
def test_beta_kernel_vanishes_at_the_ends_and_peaks_where_it_says(alpha, beta):
    p = torch.linspace(0, 1, 1001, dtype=torch.float64)
    found = beta_kernel(p, alpha, beta)
    assert float(found[0]) == float(found[-1]) == 0
    assert float(p[found.argmax()]) == pytest.approx(alpha / (alpha + beta), abs=1e-3)
    torch.testing.assert_close(beta_kernel(1 - p, beta, alpha), found)


def test_beta_kernel_without_exponents_is_one_and_with_both_is_the_variance_of_the_outcome():
    p = torch.arange(9, dtype=torch.float64) / 8
    assert beta_kernel(p, 0.0, 0.0).tolist() == [1.0] * 9
    outcomes = [torch.tensor([1.0] * k + [0.0] * (8 - k), dtype=torch.float64) for k in range(9)]
    variance = torch.stack([o.var(correction=0) for o in outcomes])
    torch.testing.assert_close(beta_kernel(p, 1.0, 1.0), variance)
