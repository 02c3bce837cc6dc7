"""G-OPD / ExOPD (arXiv 2602.12125): the algebra of lambda, the target it aims at, and its safeguards."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tabular import PRINTED, REFERENCE, STUDENT, TEACHER, at_root, tabular
from world import (
    CLOSE,
    PROMPT,
    V,
    distributions,
    every_answer,
    expected_gradient,
    gradient,
    policy,
    probability,
    rollouts,
    step_gradient,
    token_logp,
    world,
)

from surpass.learn.divergence import reverse_kl
from surpass.learn.targets import log_linear
from surpass.methods.exopd import ExOPD
from surpass.methods.opd import OPD
from surpass.models.policy import Lora, add_lora
from surpass.records import Hidden, Rollouts, Scores
from surpass.roles.distribution import log_normaliser
from surpass.roles.role import Role

ANSWERS = every_answer(2)
ESTIMATORS: list[dict[str, Any]] = [{}, {"estimator": "top_k", "top_k": V}, {"estimator": "full"}]
SCALES = [0.0, 0.5, 1.0, 1.25, 2.0]
each_estimator = pytest.mark.parametrize("settings", ESTIMATORS, ids=lambda s: s.get("estimator", "sampled"))


def scored(run, method, answers=ANSWERS) -> Rollouts:
    return method.score(run, rollouts(run, answers))


def advantage(run, method, batch) -> torch.Tensor:
    return method.loss(run, batch).metrics["advantage"]


def logps(run, batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the sampled tokens under student, teacher and reference, `[T]` each."""
    readers = run.student, run.teachers["default"].policy, run.reference.policy
    student, teacher, reference = (token_logp(reader, batch).detach() for reader in readers)
    return student, teacher, reference


def fixture(student=STUDENT, teacher=TEACHER, reference=REFERENCE):
    """One state, three tokens."""
    return world([[0]], student=tabular(student), teacher=tabular(teacher), reference=tabular(reference))


# -- lambda = 1 and 0 ---------------------------------------------------------------------------------------------


def poisoned(batch: Rollouts, value: float) -> Rollouts:
    """The batch with a reference that says `value` wherever it could be asked."""
    total, support = len(batch.response.values), batch.token.get("support")
    scores = Scores(
        logp=torch.full((total,), value),
        support_logp=None if support is None else torch.full(support.shape, value),
        hidden=(Hidden(torch.arange(total), torch.full((total, 8), value), "reference"),),
    )
    return batch.with_(scores={"reference": scores})


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, -1.0])
@each_estimator
def test_lambda_one_is_opd_bit_for_bit_whatever_the_reference(settings, value):
    run = world()
    batch = scored(run, OPD(**settings))
    plain = OPD(**settings).loss(run, batch)
    loss = ExOPD(**settings, reward_scale=1.0).loss(run, poisoned(batch, value))
    assert torch.equal(loss.terms[0].values, plain.terms[0].values)
    found, expected = (gradient(run.student, part.terms[0].values.sum()) for part in (loss, plain))
    assert torch.equal(found, expected)
    assert bool(found.isfinite().all())
    assert bool(found.any())


@each_estimator
def test_lambda_one_needs_no_reference_and_asks_none(settings):
    method = ExOPD(**settings, reward_scale=1.0)
    assert not method.needs().reference
    run = dataclasses.replace(world(), reference=None)
    assert "reference" not in method.collect(run, [PROMPT]).scores


@each_estimator
def test_lambda_other_than_one_without_a_reference_is_an_error_in_words(settings):
    method = ExOPD(**settings, reward_scale=1.25)
    assert method.needs().reference
    with pytest.raises(ValueError, match=r"needs a reference.*--reference student"):
        method.collect(dataclasses.replace(world(), reference=None), [PROMPT])


@each_estimator
def test_lambda_zero_pulls_to_the_reference_and_ignores_the_teacher(settings):
    run, other = world(), world(teacher=policy(7))
    method = ExOPD(**settings, reward_scale=0.0)
    found = expected_gradient(run, method, scored(run, method))
    assert run.reference is not None
    to_reference = world(teacher=run.reference.policy)
    plain = OPD(**settings)
    torch.testing.assert_close(
        found, expected_gradient(to_reference, plain, scored(to_reference, plain)), **CLOSE
    )
    torch.testing.assert_close(found, expected_gradient(other, method, scored(other, method)), **CLOSE)


@each_estimator
@pytest.mark.parametrize("scale", [0.5, 1.25, 3.0])
def test_a_teacher_as_its_own_reference_is_opd_for_every_lambda(settings, scale):
    run = world(reference=policy(1))
    method, plain = ExOPD(**settings, reward_scale=scale), OPD(**settings)
    found = expected_gradient(run, method, scored(run, method))
    torch.testing.assert_close(found, expected_gradient(run, plain, scored(run, plain)), **CLOSE)


# -- the advantage ------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.floats(-1.0, 3.0))
def test_the_advantage_is_linear_in_lambda(scale):
    run = world()
    batch = scored(run, ExOPD(reward_scale=2.0))
    at = {x: advantage(run, ExOPD(reward_scale=x), batch) for x in (0.0, 1.0, scale)}
    torch.testing.assert_close(at[scale], (1 - scale) * at[0.0] + scale * at[1.0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
def test_both_printed_forms_of_the_cost(scale):
    run, method = world(), ExOPD(reward_scale=scale)
    batch = scored(run, method)
    student, teacher, reference = logps(run, batch)
    found = advantage(run, method, batch)
    cost = (student - teacher) + (scale - 1) * (reference - teacher)
    torch.testing.assert_close(found, -cost, rtol=1e-5, atol=1e-5)
    regularised_reward = scale * (teacher - reference) - (student - reference)
    torch.testing.assert_close(found, regularised_reward, rtol=1e-5, atol=1e-5)


def test_hand_checked_advantage_and_ascent_direction():
    run, method = fixture(), ExOPD(reward_scale=1.25)
    batch = scored(run, method, [[0], [1], [2]])
    expected = torch.tensor([0.476376, -0.578752, -0.866434])
    torch.testing.assert_close(advantage(run, method, batch), expected, **PRINTED)
    ascent = -at_root(expected_gradient(run, method, batch))
    torch.testing.assert_close(ascent, torch.tensor([0.292550, -0.141008, -0.151542]), **PRINTED)


@pytest.mark.parametrize(
    ("scale", "target", "log_z"),
    [
        (0.5, [0.555006, 0.296663, 0.148331], -0.047706),
        (1.0, TEACHER, 0.0),
        (1.25, [0.761421, 0.159052, 0.079526], 0.055797),
        (2.0, [0.890909, 0.072727, 0.036364], 0.318454),
    ],
)
def test_expected_advantage_is_log_z_less_the_divergence_to_the_target(scale, target, log_z):
    run, method = fixture(), ExOPD(reward_scale=scale, estimator="full")
    batch = scored(run, method, [[0], [1], [2]])
    found = log_normaliser(batch, method.weights(run, batch), lambda role: run.role(role).head, 1.0)
    torch.testing.assert_close(found, torch.full((3,), log_z), **PRINTED)
    student, target = torch.tensor(STUDENT), torch.tensor(target)
    distance = (student * (student / target).log()).sum()
    torch.testing.assert_close(method.loss(run, batch).terms[0].values, distance.expand(3), **PRINTED)
    sampled = ExOPD(reward_scale=scale)
    expected_advantage = (student * advantage(run, sampled, scored(run, sampled, [[0], [1], [2]]))).sum()
    torch.testing.assert_close(expected_advantage, log_z - distance, **PRINTED)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.25, 2.0])
def test_sign_of_log_z(scale):
    run, method = world(), ExOPD(reward_scale=scale, estimator="full")
    batch = scored(run, method)
    found = log_normaliser(batch, method.weights(run, batch), lambda role: run.role(role).head, 1.0)
    sign = torch.tensor(scale - 1).sign()
    assert bool((found.sign() == sign).all())


def test_reward_correction_changes_the_advantage_by_the_ratio_of_the_bases():
    scale, student_base, teacher_base = 1.5, policy(2), policy(3)
    default, corrected = world(reference=student_base), world(reference=teacher_base)
    method = ExOPD(reward_scale=scale)
    batch = rollouts(default, ANSWERS)
    difference = advantage(corrected, method, method.score(corrected, batch)) - advantage(
        default, method, method.score(default, batch)
    )
    ratio = (token_logp(teacher_base, batch) - token_logp(student_base, batch)).detach()
    torch.testing.assert_close(difference, (1 - scale) * ratio, **CLOSE)
    assert float(difference.abs().max()) > 0.01


# -- the gradient, by enumeration -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"estimator": "full"}]
    + [
        {"estimator": "top_k", "top_k": V, "support": support, "tail": tail}
        for support, tail in itertools.product(
            ["student", "teacher", "union", "intersection"], ["renormalise", "bucket"]
        )
    ],
    ids=lambda s: "-".join([s.get("estimator", "sampled"), s.get("support", ""), s.get("tail", "")]),
)
def test_every_estimator_has_the_gradient_of_reverse_kl_to_the_target(settings, scale):
    run, method = world(), ExOPD(**settings, reward_scale=scale)
    batch = scored(run, method)
    assert run.reference is not None
    teacher, reference = (
        distributions(p, batch).detach() for p in (run.teachers["default"].policy, run.reference.policy)
    )
    target = log_linear([teacher, reference], [scale, 1 - scale])
    values = batch.ragged(reverse_kl(distributions(run.student, batch), target)).sum()
    exact = gradient(run.student, (values * probability(run.student, batch)).sum())
    torch.testing.assert_close(expected_gradient(run, method, batch), exact, **CLOSE)


@each_estimator
def test_another_reference_another_gradient(settings):
    method = ExOPD(**settings, reward_scale=1.5)
    first, second = (
        expected_gradient(run, method, scored(run, method)) for run in (world(), world(reference=policy(5)))
    )
    assert float((first - second).norm()) > 0.05 * float(first.norm())


# -- baselines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_log_normaliser_baseline_leaves_the_expected_gradient_and_shifts_the_advantage(discount):
    run = world()
    plain = ExOPD(reward_scale=1.5, discount=discount)
    method = dataclasses.replace(plain, baseline="log_normaliser")
    batch = scored(run, method)
    torch.testing.assert_close(
        expected_gradient(run, method, batch), expected_gradient(run, plain, batch), **CLOSE
    )
    shift = advantage(run, plain, batch) - advantage(run, method, batch)
    expected = log_normaliser(batch, method.weights(run, batch), lambda role: run.role(role).head, 1.0)
    torch.testing.assert_close(shift, expected, **CLOSE)
    assert float(shift.abs().max()) > 0.05


def test_batch_mean_baseline_leaves_the_expected_gradient():
    """Over all pairs of answers: each is the other's baseline, so nothing of itself is in its own."""
    run = world(
        student=tabular([0.7, 0.3], [[0.4, 0.6], [0.5, 0.5]]),
        teacher=tabular([0.2, 0.8], [[0.9, 0.1], [0.5, 0.5]]),
        reference=tabular([0.5, 0.5], [[0.6, 0.4], [0.5, 0.5]]),
        answers=[[0]],
    )
    plain = ExOPD(reward_scale=2.0)
    method = dataclasses.replace(plain, baseline="batch_mean")
    answers = every_answer(2, vocabulary=2)
    chance = probability(run.student, rollouts(run, answers))
    found, smallest_shift = torch.zeros(()), torch.inf
    for i, j in itertools.product(range(len(answers)), repeat=2):
        batch = scored(run, method, [answers[i], answers[j]])
        found = found + expected_gradient(run, method, batch, chance[i] * chance[j] * torch.ones(2))
        shift = (advantage(run, plain, batch) - advantage(run, method, batch)).abs().max()
        smallest_shift = min(smallest_shift, float(shift))
    expected = 2 * expected_gradient(run, plain, scored(run, plain, answers))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert smallest_shift > 1e-3


def test_batch_mean_is_the_mean_over_the_other_answers():
    run, method = world(), ExOPD(reward_scale=1.5, baseline="batch_mean")
    batch = scored(run, method, [[0, 1], [2], [1, 0]])
    plain = batch.ragged(advantage(run, ExOPD(reward_scale=1.5), batch))
    found = batch.ragged(advantage(run, method, batch))
    torch.testing.assert_close(found[1], plain[1] - torch.cat([plain[0], plain[2]]).mean(), **CLOSE)


def test_at_the_fixed_point_the_advantage_is_log_z_and_nothing_with_its_baseline():
    student, teacher, reference = two_step()
    run = world([[0]], student=student, teacher=teacher, reference=reference)
    plain = ExOPD(reward_scale=2.0)
    method = dataclasses.replace(plain, baseline="log_normaliser")
    batch = scored(run, method, TWO_STEPS)
    zero = torch.zeros(len(batch.response.values))
    torch.testing.assert_close(advantage(run, method, batch), zero, rtol=0, atol=2e-6)
    after_first = batch.ragged(advantage(run, plain, batch))[0][1]
    torch.testing.assert_close(after_first, torch.tensor(1.64).log(), rtol=0, atol=2e-6)


# -- two steps, worked by hand ----------------------------------------------------------------------------------------

TWO_STEPS = every_answer(2, vocabulary=2, eos=-1)


def two_step(first: float = 0.98 / 1.16):
    """Student, teacher, reference; the student is the target of lambda = 2 in the states after the first token."""
    teacher = tabular([0.7, 0.3], [[0.9, 0.1], [0.5, 0.5]], "teacher")
    reference = tabular([0.5, 0.5], [[0.5, 0.5], [0.5, 0.5]], "reference")
    student = tabular([first, 1 - first], [[0.81 / 0.82, 0.01 / 0.82], [0.5, 0.5]], "student")
    return student, teacher, reference


def optimum(method: ExOPD) -> float:
    """P(first token = 0) after gradient descent on the exact expected gradient, from the reference."""
    _, teacher, reference = two_step()
    student = tabular([0.5, 0.5])
    run = world([[0]], student=student, teacher=teacher, reference=reference)
    # All answers, weighed by their present probability, are always on-policy: no sampler to correct for.
    method = dataclasses.replace(method, sampler_cap=None)
    batch = method.score(run, rollouts(run, TWO_STEPS))
    for _ in range(400):
        step = expected_gradient(run, method, batch)
        with torch.no_grad():
            student.model.weight.sub_(2.0 * step.view_as(student.model.weight))  # type: ignore[union-attr]
    return float(probability(student, rollouts(run, [[0]])))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"reward_scale": 2.0}, 0.844828),
        ({"reward_scale": 2.0, "estimator": "full"}, 0.844828),
        ({"reward_scale": 2.0, "discount": 1.0}, 0.899284),
        ({"reward_scale": 1.0}, 0.7),
        ({"reward_scale": 1.0, "discount": 1.0}, 0.7),
    ],
    ids=str,
)
def test_token_level_fixed_point_and_sequence_level_optimum(settings, expected):
    # Descent has converged to about 1e-5; the two optima are 0.05 apart.
    assert optimum(ExOPD(**settings)) == pytest.approx(expected, abs=1e-4)


# -- the guard and the schedule ---------------------------------------------------------------------------------------


def certainty(run, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's entropy and largest probability at each token."""
    logp = distributions(run.teachers["default"].policy, batch).detach()
    return -(logp.exp() * logp).sum(-1), logp.exp().amax(-1)


@pytest.mark.parametrize("settings", [*ESTIMATORS, {"estimator": "top_k", "top_k": 2}], ids=str)
@pytest.mark.parametrize("by", ["entropy", "top1", "either"])
def test_the_guard_holds_lambda_at_one_exactly_where_the_teacher_is_certain(settings, by):
    run = world()
    entropy, top1 = certainty(run, rollouts(run, ANSWERS))
    limits: dict[str, Any] = {
        "guard_entropy": float(entropy.quantile(0.3)),
        "guard_top1": float(top1.quantile(0.6)),
    }
    if by != "either":
        limits = {f"guard_{by}": limits[f"guard_{by}"]}
    held = torch.zeros(len(entropy), dtype=torch.bool)
    held |= entropy < limits.get("guard_entropy", -1.0)
    held |= top1 > limits.get("guard_top1", 2.0)
    assert 0 < int(held.sum()) < len(held)
    method = ExOPD(**settings, reward_scale=2.0, **limits)
    batch = scored(run, method)
    loss = method.loss(run, batch)
    assert torch.equal(loss.metrics["guard_share"], held.float())
    at_one = OPD(**settings).loss(run, batch).terms[0].values
    extrapolated = ExOPD(**settings, reward_scale=2.0).loss(run, batch).terms[0].values
    torch.testing.assert_close(
        loss.terms[0].values, torch.where(held, at_one, extrapolated), rtol=1e-5, atol=1e-6
    )
    # The test could not tell guard from no guard if the two losses were the same.
    assert float((at_one - extrapolated).detach().abs().max()) > 0.01


def test_what_the_reference_says_on_held_tokens_cannot_leak():
    run, method = world(), ExOPD(reward_scale=2.0, guard_top1=0.0)
    batch = scored(run, method)
    impossible = Scores(logp=torch.full((len(batch.response.values),), -torch.inf))
    loss = method.loss(run, batch.with_(scores={"reference": impossible}))
    expected = OPD().loss(run, batch)
    torch.testing.assert_close(loss.terms[0].values, expected.terms[0].values)
    assert bool(loss.terms[0].values.isfinite().all())


def test_lambda_rises_linearly_and_stays():
    method = ExOPD(reward_scale=2.0, reward_scale_start=1.0, reward_scale_steps=4)
    assert [method.scale(step) for step in range(7)] == [1.0, 1.25, 1.5, 1.75, 2.0, 2.0, 2.0]
    assert ExOPD(reward_scale=1.5).scale(0) == 1.5
    run = world()
    batch = scored(run, method)
    plain = OPD().loss(run, batch)
    assert torch.equal(method.loss(run, batch).terms[0].values, plain.terms[0].values)
    run.step = 2
    torch.testing.assert_close(
        advantage(run, method, batch), advantage(run, ExOPD(reward_scale=1.5), batch), rtol=0, atol=0
    )


def test_a_schedule_to_or_from_one_still_needs_the_reference():
    assert ExOPD(reward_scale=1.0, reward_scale_start=1.5, reward_scale_steps=2).needs().reference
    assert ExOPD(reward_scale=1.5, reward_scale_start=1.0, reward_scale_steps=2).needs().reference
    assert not ExOPD(reward_scale=1.0, reward_scale_start=1.0, reward_scale_steps=2).needs().reference


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward_scale_start": 1.0}, "both method.reward_scale_start and method.reward_scale_steps"),
        ({"reward_scale_steps": 10}, "both method.reward_scale_start and method.reward_scale_steps"),
        ({"estimator": "top_k", "tail": "drop"}, "bucket or renormalise"),
        ({"estimator": "full", "baseline": "batch_mean"}, "no sampled advantage"),
        ({"estimator": "top_k", "baseline": "log_normaliser"}, "no sampled advantage"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        ExOPD(**settings)


def test_dropping_the_tail_is_allowed_where_the_reference_is_not_read():
    assert ExOPD(reward_scale=1.0, estimator="top_k", tail="drop").tail == "drop"


# -- a reference that is the student without its adapter ----------------------------------------------------------------


@pytest.mark.parametrize("settings", [*ESTIMATORS, {"baseline": "log_normaliser"}], ids=str)
@pytest.mark.parametrize("targets", ["all-linear", ["lm_head", "q_proj"]], ids=str)
def test_adapter_off_reference_is_the_base_model(settings, targets):
    base = policy(0)
    student = add_lora(policy(0), Lora(rank=2, targets=targets))
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-1.0, 1.0, parameter.numel()).view_as(parameter))
    method = ExOPD(**settings, reward_scale=1.5)
    without = world(student=student, reference=base)
    within = dataclasses.replace(without, reference=Role("reference", student, adapter=False))
    found, expected = (step_gradient(run, method, scored(run, method)) for run in (within, without))
    torch.testing.assert_close(found, expected, **CLOSE)
