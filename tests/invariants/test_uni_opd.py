"""Invariants of Uni-OPD: margins that are met exactly, classes in balance, and nothing unknown in a statistic."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from world import CLOSE, PROMPT, gradient, policy, prompts, rollouts, step_gradient, world

from surpass.methods.exopd import ExOPD
from surpass.methods.opd import OPD
from surpass.methods.run import Run
from surpass.methods.uni_opd import UniOPD
from surpass.records import Rollouts, Scores
from surpass.rollout.engine import Sampling

OFF: dict[str, Any] = {"calibration": "none", "balance_ratio": None, "outlier": None}
ANSWERS = [[0, 1, 3], [2], [1, 3], [1, 1, 0], [3], [2, 0]]
STATISTICS = ["mean", "minmax"]
each_statistic = pytest.mark.parametrize("statistic", STATISTICS)


def right(text: str) -> float:
    """Answers with a `b` are correct: the first, third and fourth of `ANSWERS`."""
    return float("b" in text)


def a_run(**changes: Any) -> Run:
    return world(ANSWERS, reward=right, **changes)


def calibrated(run: Run, method: UniOPD, rewards: list[float] | None = None, **changes: Any) -> Rollouts:
    """`ANSWERS` to one prompt, judged and calibrated."""
    batch = rollouts(run, ANSWERS, **changes)
    batch = run.reward(batch) if rewards is None else batch.with_(reward=torch.tensor(rewards))
    return method.calibrate(run, method.score(run, batch))


def advantages(run: Run, method: OPD, batch: Rollouts) -> torch.Tensor:
    return method.loss(run, batch).metrics["advantage"]


def gap(run: Run, method: UniOPD, batch: Rollouts, statistic: str = "mean") -> float:
    """Between the classes of one group, of the advantages that are trained."""
    returns = batch.ragged(advantages(run, method, batch)).mean()
    assert batch.reward is not None
    good, bad = returns[batch.reward == 1], returns[batch.reward == 0]
    return float(good.mean() - bad.mean() if statistic == "mean" else good.min() - bad.max())


# -- everything off ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("off_policy", [False, True])
def test_without_its_parts_it_is_its_base_bit_for_bit(scale, off_policy):
    shared: dict[str, Any] = {
        "reduction": "sequence_mean",
        "clip_high": 0.28,
        "reward_scale": scale,
        "samples": 6,
    }
    found = []
    for method in (UniOPD(**shared, **OFF), ExOPD(**shared)):
        run = a_run(off_policy=off_policy)
        assert not method.needs().reward
        found.append(step_gradient(run, method, method.collect(run, [PROMPT])))
    assert torch.equal(*found)
    assert bool(found[0].any())


@pytest.mark.parametrize("calibration", ["shift", "mask"])
def test_a_margin_of_minus_infinity_is_plain_distillation_bit_for_bit(calibration):
    run = a_run()
    plain = UniOPD(**OFF)
    method = UniOPD(calibration=calibration, margin=-math.inf, balance_ratio=None, outlier=math.inf)
    batch = calibrated(run, method)
    # The old log-probs the margin was measured with are no reason to make ratios that round to something else.
    assert "old" not in batch.scores
    expected = step_gradient(run, plain, calibrated(run, plain))
    assert torch.equal(step_gradient(run, method, batch), expected)


# -- the shift --------------------------------------------------------------------------------------------------------


@each_statistic
@pytest.mark.parametrize("direction", ["correct_up", "incorrect_down", "both"])
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_the_new_gap_is_the_margin_and_answers_move_as_a_whole(statistic, direction, scale):
    run = a_run()
    plain = UniOPD(**OFF, reward_scale=scale)
    before = advantages(run, plain, calibrated(run, plain))
    margin = gap(run, plain, calibrated(run, plain), statistic) + 0.5
    method = dataclasses.replace(
        plain, calibration="shift", margin=margin, statistic=statistic, direction=direction
    )
    batch = calibrated(run, method)
    assert gap(run, method, batch, statistic) == pytest.approx(margin, abs=2e-6)
    moved = batch.ragged(advantages(run, method, batch) - before)
    expected = {"correct_up": (0.5, 0.0), "incorrect_down": (0.0, -0.5), "both": (0.25, -0.25)}[direction]
    assert batch.reward is not None
    wanted = torch.where(batch.reward == 1, *(torch.tensor(e) for e in expected))
    torch.testing.assert_close(moved.values, batch.response.expand(wanted), rtol=0, atol=2e-6)
    if direction == "both":
        both = [
            batch.ragged(a).mean()[batch.reward == c].mean()
            for a in (before, before + moved.values)
            for c in (0, 1)
        ]
        assert float(both[0] + both[1]) == pytest.approx(float(both[2] + both[3]), abs=2e-6)


@each_statistic
def test_a_margin_that_is_met_changes_nothing(statistic):
    run = a_run()
    plain = UniOPD(**OFF)
    reached = gap(run, plain, calibrated(run, plain), statistic)
    method = dataclasses.replace(plain, calibration="shift", margin=reached - 1e-4, statistic=statistic)
    batch = calibrated(run, method)
    assert not bool(batch.sequence["shift"].any())
    assert torch.equal(advantages(run, method, batch), advantages(run, plain, calibrated(run, plain)))


@pytest.mark.parametrize("rewards", [[1.0] * 6, [0.0] * 6, [math.nan] * 6, [1.0, math.nan] * 3])
def test_a_group_with_one_class_is_left_as_it_is(rewards):
    run = a_run()
    method = UniOPD(margin=50.0)
    batch = calibrated(run, method, rewards)
    assert not bool(batch.sequence["shift"].any())
    assert bool(batch.mask("trained").all())


def test_scopes_compare_within_groups_or_over_the_batch():
    run = a_run()
    rewards, group = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0], [0, 0, 1, 1, 2, 2]
    method = UniOPD(margin=50.0, balance_ratio=None)
    within = calibrated(run, method, rewards, group=group).sequence["shift"]
    assert within[:4].tolist() == [0.0] * 4 and within[4] == -within[5] != 0
    over = calibrated(run, dataclasses.replace(method, margin_scope="batch"), rewards, group=group)
    assert len(over.sequence["shift"].abs().unique()) == 1


# -- what is not known ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibration", ["shift", "mask"])
def test_what_the_teacher_did_not_score_is_not_trained_and_enters_nothing(calibration):
    """Rows 2 and 5 failed: the update is that of the other four alone."""
    run = a_run()
    method = UniOPD(calibration=calibration, margin=3.0, samples=6)
    alone = rollouts(run, [a for i, a in enumerate(ANSWERS) if i not in (2, 5)])
    alone = run.reward(alone)
    expected = step_gradient(run, method, method.calibrate(run, method.score(run, alone)))
    batch = method.score(run, run.reward(rollouts(run, ANSWERS)))
    logp = batch.scores["teacher"].logp
    assert logp is not None
    broken = logp.clone()
    for row in (2, 5):  # one token is enough
        broken[int(batch.response.offsets[row])] = torch.nan
    batch = method.calibrate(run, batch.with_(scores={"teacher": Scores(logp=broken)}))
    own = batch.ragged(batch.mask("trained")).sum() > 0
    assert own.tolist()[2] is own.tolist()[5] is False
    torch.testing.assert_close(step_gradient(run, method, batch), expected, **CLOSE)
    assert float(expected.norm()) > 1e-3


def test_an_answer_nobody_judged_is_plainly_distilled():
    run = a_run()
    method, plain = UniOPD(margin=3.0), UniOPD(**OFF)
    rewards = [1.0, math.nan, 1.0, 0.0, 0.0, math.nan]
    batch = calibrated(run, method, rewards)
    before, after = (
        batch.ragged(advantages(run, m, b)) for m, b in ((plain, calibrated(run, plain)), (method, batch))
    )
    for row in (1, 5):
        assert bool(batch.ragged(batch.mask("trained"))[row].all())
        assert torch.equal(after[row], before[row])
    without = calibrated(run, method, [1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    assert not torch.equal(without.sequence["shift"], batch.sequence["shift"])


def test_an_unscored_token_that_would_be_trained_is_an_error():
    run = a_run()
    method = UniOPD()
    batch = calibrated(run, method)
    broken = torch.full_like(batch.sampler_logp, torch.nan)
    with pytest.raises(ValueError, match="gave no score"):
        method.loss(run, batch.with_(scores={"teacher": Scores(logp=broken)}))


# -- mask, balance, outliers ------------------------------------------------------------------------------------------


def test_masked_answers_get_no_advantage_but_keep_their_place():
    run = a_run()
    method = UniOPD(calibration="mask", margin=50.0, balance_ratio=None)
    batch = calibrated(run, method)
    kept = batch.sequence["kept"]
    # Two of six are left: dropping one more would leave a class empty.
    assert int(kept.sum()) == 2
    found = batch.ragged(advantages(run, method, batch))
    plain = UniOPD(**OFF)
    before = batch.ragged(advantages(run, plain, calibrated(run, plain)))
    for row in range(len(batch)):
        assert torch.equal(found[row], before[row] if kept[row] else torch.zeros_like(found[row]))
    assert bool(batch.mask("trained").all())


def test_balance_takes_the_excess_out_of_the_stream_and_depends_on_seed_and_step_alone():
    rewards = [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    seen = set()
    for step in range(12):
        run = a_run(step=step)
        method = UniOPD(calibration="none")
        batch, again = (calibrated(run, method, rewards) for _ in range(2))
        assert torch.equal(batch.mask("trained"), again.mask("trained"))
        rows = batch.ragged(batch.mask("trained")).sum() > 0
        assert int(rows.sum()) == 2 and bool(rows[5])
        whole = batch.ragged(batch.mask("trained")).sum()
        assert torch.equal(whole[rows], batch.lengths[rows])
        seen.add(tuple(rows.tolist()))
    assert len(seen) > 2
    # Thinned answers have entered the margin all the same.
    shifted = calibrated(a_run(), UniOPD(margin=50.0), rewards).sequence["shift"]
    unthinned = calibrated(a_run(), UniOPD(margin=50.0, balance_ratio=None), rewards).sequence["shift"]
    assert torch.equal(shifted, unthinned) and bool(shifted.any())


def test_outliers_get_no_gradient_and_are_judged_by_the_present_student():
    run = a_run()
    method = UniOPD(calibration="none", balance_ratio=None)
    batch = calibrated(run, method)
    apart = method.apart(batch, run.student_logp(batch)[0].detach())
    limit = float(apart.median())
    limited = dataclasses.replace(method, outlier=limit)
    expected = torch.where(
        apart >= limit, 0.0, advantages(run, dataclasses.replace(method, outlier=None), batch)
    )
    assert torch.equal(advantages(run, limited, batch), expected)
    assert bool((expected == 0).any()) and bool((expected != 0).any())
    with torch.no_grad():
        run.student.head.weight.mul_(3.0)
    now = method.apart(batch, run.student_logp(batch)[0].detach())
    assert torch.equal(advantages(run, limited, batch) == 0, now >= limit)
    assert not torch.equal(now >= limit, apart >= limit)


def test_a_token_the_teacher_excludes_is_an_outlier_not_an_infinite_loss():
    run = a_run()
    method = UniOPD(margin=3.0)
    batch = method.score(run, run.reward(rollouts(run, ANSWERS)))
    logp = batch.scores["teacher"].logp
    assert logp is not None
    logp[0] = -torch.inf
    found = step_gradient(run, method, method.calibrate(run, batch))
    assert bool(found.isfinite().all()) and bool(found.any())


# -- a whole batch ----------------------------------------------------------------------------------------------------


def test_collect_reports_how_well_the_teacher_orders_the_answers():
    run = a_run(sampling=Sampling(max_new_tokens=3))
    batch = UniOPD(samples=6).collect(run, prompts(2))
    assert {"margin/gap", "margin/order", "margin/shifted", "balance/kept"} <= set(run.metrics)
    assert 0 <= run.metrics["margin/order"] <= 1
    assert len(batch) == 12 and batch.reward is not None
    perfect = a_run(teacher=policy(1))
    method = UniOPD(samples=6)
    returns = method.returns(perfect, calibrated(perfect, method))
    cut = float(returns.median())
    calibrated(perfect, method, [float(r > cut) for r in returns])
    assert perfect.metrics["margin/order"] == 1.0


def test_another_teacher_another_gradient():
    method = UniOPD()
    first, second = (
        step_gradient(run, method, calibrated(run, method)) for run in (a_run(), a_run(teacher=policy(5)))
    )
    assert float((first - second).norm()) > 0.05 * float(first.norm())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "full"}, "set estimator sampled"),
        ({"balance_ratio": -1.0}, "at least 0"),
        ({"least_kept": 0.0}, "a share in"),
        ({"outlier": 0.0}, "above 0 nats"),
        ({"samples": 1}, "a group of one answer"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        UniOPD(**changes)


def test_a_group_of_one_is_fine_where_no_group_is_compared():
    UniOPD(samples=1, margin_scope="batch", balance_scope="batch")
    UniOPD(samples=1, **OFF)


def test_only_the_student_has_a_gradient():
    run = a_run()
    loss = UniOPD(reward_scale=1.5).loss(run, calibrated(run, UniOPD(reward_scale=1.5)))
    assert bool(gradient(run.student, loss.terms[0].values.sum()).any())
    for reader in (run.teachers["default"].policy, run.reference.policy):  # type: ignore[union-attr]
        assert not bool(gradient(reader, loss.terms[0].values.sum()).any())
