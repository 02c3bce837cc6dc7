"""Rethinking OPD: three gradients that share a name, supports, weights, outcomes, and what the monitor sees."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tabular import PRINTED, STUDENT, TEACHER, at_root, tabular
from world import (
    CLOSE,
    V,
    distributions,
    every_answer,
    expected_gradient,
    gradient,
    policy,
    probability,
    prompts,
    rollouts,
    step_gradient,
    token_logp,
    world,
)

from surpass.learn.divergence import entropy, reverse_kl
from surpass.learn.overlap import top_k_overlap
from surpass.learn.support import combine_support
from surpass.methods.opd import OPD
from surpass.methods.rethinking_opd import RethinkingOPD

ANSWERS = every_answer(2)
GRADIENTS = {
    "raw": [-0.181172, 0.169523, 0.011649],
    "half": [-0.166449, 0.178357, -0.011907],
    "exact": [-0.173892, 0.173892, 0.0],
}
REVERSE_KL = [-0.214253, 0.094030, 0.120223]


def at_fixture(
    student: list[float] = STUDENT, teacher: list[float] = TEACHER, **settings: Any
) -> torch.Tensor:
    """The logit gradient of one written token at the hand-checked distributions."""
    method = RethinkingOPD(**settings)
    run = world([[0]], student=tabular(student), teacher=tabular(teacher))
    batch = method.score(run, rollouts(run, [[2]]))
    return at_root(gradient(run.student, method.loss(run, batch).terms[0].values.sum()))


@pytest.mark.parametrize("name", GRADIENTS)
def test_three_gradients_on_the_students_top_two(name: str):
    torch.testing.assert_close(at_fixture(top_k=2, gradient=name), torch.tensor(GRADIENTS[name]), **PRINTED)


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("support", ["student", "teacher", "union", "intersection"])
def test_over_the_whole_vocabulary_all_are_reverse_kl(name: str, support: Any):
    # k = 16 is cut to the three tokens there are.
    torch.testing.assert_close(
        at_fixture(gradient=name, support=support), torch.tensor(REVERSE_KL), **PRINTED
    )


@pytest.mark.parametrize("name", GRADIENTS)
def test_expected_gradient_over_the_whole_vocabulary(name: Any):
    run, method = world(), RethinkingOPD(gradient=name)
    batch = method.score(run, rollouts(run, ANSWERS))
    kl = reverse_kl(
        distributions(run.student, batch), distributions(run.teachers["default"].policy, batch).detach()
    )
    exact = gradient(run.student, (batch.ragged(kl).sum() * probability(run.student, batch)).sum())
    torch.testing.assert_close(expected_gradient(run, method, batch), exact, **CLOSE)


def written_out(ids: list[int], weights: list[float]) -> torch.Tensor:
    """`sum_k w_k (log S_k - log T_k) (onehot_k - S)`, the logit gradient of `raw`."""
    s, t = torch.tensor(STUDENT), torch.tensor(TEACHER)
    total = torch.zeros(3)
    for k, w in zip(ids, weights, strict=True):
        total += w * (s[k] / t[k]).log() * (torch.eye(3)[k] - s)
    return total


@pytest.mark.parametrize(
    ("weighting", "weights"),
    [("student_p", [0.5 / 0.8, 0.3 / 0.8]), ("teacher_p", [0.7 / 0.9, 0.2 / 0.9]), ("uniform", [1.0, 1.0])],
)
def test_weights_of_the_support(weighting: Any, weights: list[float]):
    found = at_fixture(top_k=2, weighting=weighting)
    torch.testing.assert_close(found, written_out([0, 1], weights), **PRINTED)


def test_one_token_of_the_student_has_weight_one():
    torch.testing.assert_close(at_fixture(top_k=1), written_out([0], [1.0]), **PRINTED)
    torch.testing.assert_close(at_fixture(top_k=1), at_fixture(top_k=1, weighting="uniform"))


def test_a_union_counts_a_shared_token_once_and_a_difference_not_at_all():
    ids, valid = combine_support(torch.tensor([[0, 1]]), torch.tensor([[2, 0]]), "union")
    assert ids[valid].tolist() == [0, 1, 2]
    ids, valid = combine_support(torch.tensor([[0, 1]]), torch.tensor([[2, 0]]), "difference")
    assert ids[valid].tolist() == [1, 2]
    student, teacher = [0.5, 0.3, 0.2], [0.5, 0.2, 0.3]
    union = at_fixture(student, teacher, top_k=2, support="union")
    torch.testing.assert_close(union, at_fixture(student, teacher, top_k=3), **PRINTED)
    # Tokens 1 and 2 remain; their weights are the student's probabilities as they are.
    s, t = torch.tensor(student), torch.tensor(teacher)
    expected = sum(s[k] * (s[k] / t[k]).log() * (torch.eye(3)[k] - s) for k in (1, 2))
    found = at_fixture(student, teacher, top_k=2, support="difference")
    torch.testing.assert_close(found, torch.as_tensor(expected), **PRINTED)
    assert not bool(at_fixture(student, student, top_k=2, support="difference").any())


def test_the_order_of_the_support_does_not_matter():
    run, method = world(), RethinkingOPD(top_k=3)
    batch = method.score(run, rollouts(run, ANSWERS))
    order = torch.tensor([2, 0, 1])
    scores = batch.scores["teacher"]
    assert scores.support_logp is not None
    shuffled = batch.with_(
        token={name: batch.token[name][:, order] for name in ("support", "support_valid")},
        scores={"teacher": dataclasses.replace(scores, support_logp=scores.support_logp[:, order])},
    )
    torch.testing.assert_close(
        step_gradient(run, method, shuffled), step_gradient(run, method, batch), **CLOSE
    )


SETTINGS: list[dict[str, Any]] = [
    *({"gradient": g, "support": s} for g in GRADIENTS for s in ("student", "teacher", "union")),
    {"support": "difference"},
    {"weighting": "teacher_p"},
    {"weighting": "uniform"},
    {"estimator": "sampled"},
    {"estimator": "full"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_another_teacher_another_gradient_and_none_from_oneself(settings: dict[str, Any]):
    method, found = RethinkingOPD(top_k=2, **settings), []
    for teacher in (policy(1), policy(2), policy(0)):
        run = world(teacher=teacher)
        found.append(step_gradient(run, method, method.score(run, rollouts(run, ANSWERS))))
    assert float((found[0] - found[1]).norm()) > 0.1 * float(found[0].norm())
    assert float(found[2].norm()) < 1e-4 * float(found[0].norm())


@pytest.mark.parametrize("estimator", ["sampled", "top_k", "full"])
def test_the_exact_gradient_is_that_of_opd_bit_for_bit(estimator: Any):
    plain = OPD(estimator=estimator, top_k=2, tail="bucket")
    method = RethinkingOPD(estimator=estimator, top_k=2, gradient="exact", tail="bucket", monitor=4)
    run = world()
    one, other = (step_gradient(run, m, m.score(run, rollouts(run, ANSWERS))) for m in (plain, method))
    assert torch.equal(one, other)


# -- outcomes ---------------------------------------------------------------------------------------------------


def length(text: str) -> float:
    return 1.0 + len(text)


@pytest.mark.parametrize("estimator", ["sampled", "top_k", "full"])
def test_direct_grpo_adds_the_gradient_of_grpo(estimator: Any):
    """Linear in the weight, and its part is -A grad log p of the written tokens."""
    found = {}
    for weight in (0.0, 1.0, 2.0):
        run = world([[2, 1, 3], [2, 3], [1], [0]], reward=length)
        method = RethinkingOPD(
            samples=4, estimator=estimator, outcome="direct_grpo", outcome_weight=weight, sampler_cap=None
        )
        assert method.needs().reward == (weight != 0)
        batch = method.collect(run, prompts(1))
        found[weight] = step_gradient(run, method, batch)
    torch.testing.assert_close(found[2.0] - found[1.0], found[1.0] - found[0.0], **CLOSE)
    reward = batch.reward
    assert reward is not None and float(reward.std()) > 0
    advantage = (reward - reward.mean()) / reward.std()
    values = -batch.response.expand(advantage) * token_logp(run.student, batch)
    torch.testing.assert_close(
        found[1.0] - found[0.0], gradient(run.student, values.mean()), rtol=2e-3, atol=2e-5
    )


def test_direct_grpo_of_weight_zero_is_the_base_bit_for_bit():
    run = world(ANSWERS)
    one, other = (
        step_gradient(run, m, m.score(run, rollouts(run, ANSWERS)))
        for m in (RethinkingOPD(), RethinkingOPD(outcome="direct_grpo", outcome_weight=0.0))
    )
    assert torch.equal(one, other)


def test_token_grpo_standardises_the_tokens_of_a_group_and_sums_them_up():
    run = world([[1, 2, 3], [2, 3]], reward=length)
    method = RethinkingOPD(samples=2, estimator="sampled", outcome="token_grpo", outcome_weight=0.5)
    batch = method.collect(run, prompts(1))
    signal = (token_logp(run.teachers["default"].policy, batch) - token_logp(run.student, batch)).detach()
    assert batch.reward is not None and float(batch.reward.std()) > 0
    signal[torch.tensor([2, 4])] += 0.5 * batch.reward
    z = (signal - signal.mean()) / signal.std()
    expected = torch.stack([z[0] + z[1] + z[2], z[1] + z[2], z[2], z[3] + z[4], z[4]])
    torch.testing.assert_close(method.loss(run, batch).metrics["advantage"], expected, **CLOSE)


# -- the monitor ------------------------------------------------------------------------------------------------


def test_identical_models_overlap_wholly():
    run = world(teacher=policy(0))
    method = RethinkingOPD(monitor=2)
    metrics = method.loss(run, method.score(run, rollouts(run, ANSWERS))).metrics
    assert bool((metrics["overlap/ratio"] == 1).all())
    assert float(metrics["overlap/advantage"].abs().max()) < 1e-6
    assert float(metrics["entropy_gap"].max()) < 1e-6
    torch.testing.assert_close(metrics["overlap/student_mass"], metrics["overlap/teacher_mass"])


def test_the_monitor_by_hand_and_disjoint_supports():
    s, t = torch.tensor([[0.5, 0.3]]).log(), torch.tensor([[0.6, 0.2]]).log()
    found = top_k_overlap(torch.tensor([[0, 1]]), s, torch.tensor([[1, 2]]), t)
    values = [float(found.ratio), float(found.student_mass), float(found.teacher_mass)]
    assert values == pytest.approx([0.5, 0.3, 0.6])
    assert float(found.advantage) == pytest.approx(0.0)  # one shared token: both are 1 on it
    both = top_k_overlap(torch.tensor([[0, 1]]), s, torch.tensor([[1, 0]]), t)
    p, q = torch.tensor([0.625, 0.375]), torch.tensor([0.25, 0.75])
    assert float(both.advantage) == pytest.approx(float((p * (q / p).log()).mean()), rel=1e-5)
    none = top_k_overlap(torch.tensor([[0, 1]]), s, torch.tensor([[2, 3]]), t)
    assert [float(v) for v in none] == [0.0, 0.0, 0.0, 0.0, 0.0]


def test_the_monitor_reads_the_students_own_states():
    run, method = world(), RethinkingOPD(monitor=2)
    batch = method.score(run, rollouts(run, ANSWERS))
    student = distributions(run.student, batch).detach()
    teacher = distributions(run.teachers["default"].policy, batch).detach()
    tops = [[set(row.topk(2).indices.tolist()) for row in side] for side in (student, teacher)]
    ratio = torch.tensor([len(a & b) / 2 for a, b in zip(*tops, strict=True)])
    assert torch.equal(batch.token["overlap/ratio"], ratio)
    gap = (entropy(teacher) - entropy(student)).abs()
    torch.testing.assert_close(batch.token["entropy_gap"], gap, **CLOSE)
    assert not any(name.startswith("overlap") for name in method_without().token)


def method_without():
    run = world()
    return RethinkingOPD(monitor=0).score(run, rollouts(run, ANSWERS))


@pytest.mark.parametrize("settings", [{}, {"support": "union"}, {"gradient": "half"}], ids=str)
@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_do_not_change_the_gradient(settings: dict[str, Any], micro: int):
    run = world([[0, 1, 3], [2, 3], [1], []], reward=length)
    method = RethinkingOPD(top_k=2, outcome="direct_grpo", **settings)
    batch = method.collect(run, prompts(2))
    whole = step_gradient(run, method, batch)
    torch.testing.assert_close(step_gradient(run, method, batch, micro), whole, **CLOSE)


def test_settings_without_an_effect_are_refused():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tail": "bucket"}, "gradient exact"),
        ({"gradient": "exact", "weighting": "uniform"}, "raw or half"),
        ({"outcome": "token_grpo"}, "estimator sampled"),
        ({"outcome": "direct_grpo", "samples": 1}, "at least 2"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            RethinkingOPD(**settings)
    assert RethinkingOPD().top_k > V, "these worlds cut k to their vocabulary"
