"""On-policy distillation: every estimator has the gradient of reverse KL, and only the right teacher matters."""

import dataclasses

import pytest
import torch
from tabular import PRINTED, STUDENT, TEACHER, at_root, tabular
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
    prompts,
    rollouts,
    sequence_logp,
    step_gradient,
    token_logp,
    world,
)

from surpass.learn.divergence import reverse_kl
from surpass.methods.exopd import ExOPD
from surpass.methods.opd import OPD
from surpass.records import Scores
from surpass.roles.role import Role

ANSWERS = every_answer(2)
# With the whole vocabulary as support the owner and the tail say nothing any more.
WHOLE = [
    OPD(estimator="top_k", top_k=V, support=support, tail=tail)
    for support in ("student", "teacher", "union", "intersection")
    for tail in ("drop", "renormalise", "bucket")
]
ESTIMATORS = [OPD(), OPD(estimator="top_k", top_k=V), OPD(estimator="full")]


def name(method: OPD) -> str:
    return "-".join(
        [method.estimator, *([method.support, method.tail] if method.estimator == "top_k" else [])]
    )


def analytic(run, batch, temperature: float = 1.0) -> torch.Tensor:
    """Gradient of `E_y sum_t KL(student || teacher)` at the visited states, written out."""
    student = distributions(run.student, batch, temperature)
    teacher = distributions(run.teachers["default"].policy, batch, temperature).detach()
    values = batch.ragged(reverse_kl(student, teacher)).sum()
    return gradient(run.student, (values * probability(run.student, batch)).sum())


@pytest.mark.parametrize("method", [OPD(), OPD(estimator="full"), *WHOLE], ids=name)
def test_expected_gradient_is_that_of_reverse_kl(method):
    run = world()
    batch = method.score(run, rollouts(run, ANSWERS))
    torch.testing.assert_close(expected_gradient(run, method, batch), analytic(run, batch), **CLOSE)


@pytest.mark.parametrize("estimator", ["full", "top_k"])
def test_the_loss_temperature_divides_the_logits_of_both(estimator):
    method = OPD(estimator=estimator, top_k=V)
    run = world(temperature=2.0)
    batch = method.score(run, rollouts(run, ANSWERS))
    found = expected_gradient(run, method, batch)
    torch.testing.assert_close(found, analytic(run, batch, 2.0), **CLOSE)
    assert not torch.allclose(found, analytic(run, batch), **CLOSE)


@pytest.mark.parametrize("method", [OPD(), OPD(estimator="full"), *WHOLE], ids=name)
def test_hand_checked_gradient(method):
    method = dataclasses.replace(method, top_k=3)
    run = world([[0]], student=tabular(STUDENT), teacher=tabular(TEACHER))
    batch = method.score(run, rollouts(run, [[0], [1], [2]]))
    found = at_root(expected_gradient(run, method, batch))
    torch.testing.assert_close(found, torch.tensor([-0.214253, 0.094030, 0.120223]), **PRINTED)


def test_hand_checked_gradient_on_a_renormalised_support():
    method = OPD(estimator="top_k", top_k=2, tail="renormalise")
    run = world([[0]], student=tabular(STUDENT), teacher=tabular(TEACHER))
    batch = method.score(run, rollouts(run, [[2]]))
    loss = method.loss(run, batch)
    torch.testing.assert_close(loss.terms[0].values.detach(), torch.tensor([0.059537]), **PRINTED)
    found = at_root(gradient(run.student, loss.terms[0].values.sum()))
    torch.testing.assert_close(found, torch.tensor([-0.173892, 0.173892, 0.0]), **PRINTED)
    torch.testing.assert_close(loss.metrics["support/student_mass"], torch.tensor([0.8]))
    torch.testing.assert_close(loss.metrics["support/target_mass"], torch.tensor([0.9]))


def test_the_sampled_advantage_is_the_log_ratio_and_the_loss_its_negative_on_policy():
    run, method = world(), OPD()
    batch = method.collect(run, [PROMPT] * len(ANSWERS))
    loss = method.loss(run, batch)
    expected = token_logp(run.teachers["default"].policy, batch) - token_logp(run.student, batch)
    torch.testing.assert_close(loss.metrics["advantage"], expected.detach())
    torch.testing.assert_close(loss.terms[0].values.detach(), -expected.detach())
    assert not bool(loss.metrics["clip_ratio"].any())


@pytest.mark.parametrize("method", ESTIMATORS, ids=name)
def test_another_teacher_another_gradient_and_none_from_oneself(method):
    found = []
    for teacher in (policy(1), policy(2), policy(0)):
        run = world(teacher=teacher)
        batch = method.score(run, rollouts(run, ANSWERS))
        found.append(step_gradient(run, method, batch))
    assert float((found[0] - found[1]).norm()) > 0.1 * float(found[0].norm())
    assert float(found[2].norm()) < 1e-4 * float(found[0].norm())


def test_discount_zero_credits_no_later_token():
    run, method = world(), OPD()
    batch = method.score(run, rollouts(run, [[0, 0], [0, 1]]))
    advantage = batch.ragged(method.loss(run, batch).metrics["advantage"])
    torch.testing.assert_close(advantage[0][0], advantage[1][0])
    assert not torch.allclose(advantage[0][1], advantage[1][1])


def test_discount_one_is_the_gradient_of_the_sequence_divergence():
    run, method = world(), OPD(discount=1.0)
    batch = method.score(run, rollouts(run, ANSWERS))
    student = sequence_logp(run.student, batch)
    teacher = sequence_logp(run.teachers["default"].policy, batch).detach()
    exact = gradient(run.student, (student.exp() * (student - teacher)).sum())
    torch.testing.assert_close(expected_gradient(run, method, batch), exact, **CLOSE)
    assert not torch.allclose(expected_gradient(run, OPD(), batch), exact, **CLOSE)


@pytest.mark.parametrize("support", ["student", "teacher", "union", "intersection"])
@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_a_support_never_holds_a_token_that_only_one_side_has(support, padded):
    method = OPD(estimator="top_k", top_k=V + 2, support=support)
    sizes = {"student": V + 2, "teacher": V + 2, padded: V + 5}
    run = world(ANSWERS, student=policy(0, sizes["student"]), teacher=policy(1, sizes["teacher"]))
    run = dataclasses.replace(run, reference=None)
    batch = method.score(run, rollouts(run, ANSWERS))
    ids, valid = batch.token["support"], batch.token["support_valid"]
    assert int(ids.max()) < V + 2
    assert bool(valid.any(-1).all())
    values = method.loss(run, batch).terms[0].values
    assert bool(values.isfinite().all())
    assert bool(gradient(run.student, values.sum()).isfinite().all())


# -- the sampler's law ------------------------------------------------------------------------------------------


def test_importance_weight_is_one_where_sampler_and_trainer_agree():
    run, method = world(), OPD()
    batch = method.score(run, rollouts(run, ANSWERS))
    loss = method.loss(run, batch)
    weight = loss.metrics["sampling/importance_weight"]
    torch.testing.assert_close(weight, torch.ones_like(weight), rtol=0, atol=1e-5)
    without = OPD(sampler_cap=None).loss(run, batch)
    assert "sampling/importance_weight" not in without.metrics
    torch.testing.assert_close(loss.terms[0].values, without.terms[0].values, rtol=1e-5, atol=1e-6)


def test_importance_weight_is_capped_and_carries_no_gradient():
    run, method = world(), OPD(sampler_cap=2.0)
    batch = method.score(run, rollouts(run, ANSWERS))
    shift = torch.linspace(-2.0, 2.0, len(batch.response.values))
    shifted = dataclasses.replace(batch, sampler_logp=batch.sampler_logp - shift)
    loss = method.loss(run, shifted)
    expected = shift.exp().clamp(max=2.0)
    weight = loss.metrics["sampling/importance_weight"]
    assert not weight.requires_grad
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)
    assert float(weight.max()) == 2.0
    plain = OPD(sampler_cap=None).loss(run, batch)
    torch.testing.assert_close(
        gradient(run.student, loss.terms[0].values.sum()),
        gradient(run.student, (plain.terms[0].values * expected).sum()),
        **CLOSE,
    )


def test_second_update_on_a_batch_takes_its_ratio_from_the_first_weights():
    method, student = OPD(dual_clip=None), policy(0)
    run = world(student=student, off_policy=True)
    batch = method.collect(run, [PROMPT] * len(ANSWERS))
    assert batch.scores["old"].logp is not None
    with torch.no_grad():
        student.head.weight.mul_(1.01)
    loss = method.loss(run, batch)
    now = token_logp(student, batch).detach()
    ratio = (now - batch.scores["old"].logp).exp()
    assert float((ratio - 1).abs().max()) > 1e-3
    teacher = token_logp(run.teachers["default"].policy, batch).detach()
    torch.testing.assert_close(loss.terms[0].values.detach(), -(teacher - now) * ratio, **CLOSE)


# -- several teachers -------------------------------------------------------------------------------------------

ROUTED = [
    *ESTIMATORS,
    ExOPD(reward_scale=1.5),
    ExOPD(reward_scale=1.5, estimator="top_k", top_k=V),
    ExOPD(reward_scale=1.5, estimator="full"),
    ExOPD(reward_scale=1.5, baseline="log_normaliser"),
]
MIXED = ["math", "code", "code", "math", "code"]
TEXTS = [[0, 1], [2], [1, 3], [0, 0], [3]]


def routed(swap: bool = False):
    first, second = (policy(4), policy(1)) if swap else (policy(1), policy(4))
    return world(TEXTS, teachers={"math": Role("teacher/math", first), "code": Role("teacher/code", second)})


def asked(domains: list[str]):
    return [dataclasses.replace(p, domain=d) for p, d in zip(prompts(len(domains)), domains)]


def named(method: OPD) -> str:
    return f"{type(method).__name__}-{method.estimator}-{getattr(method, 'baseline', '')}"


def found(run, method, domains, rows=None):
    batch = method.score(run, rollouts(run, TEXTS[: len(domains)], asked(domains)))
    return step_gradient(run, method, batch if rows is None else batch.select(torch.tensor(rows)))


@pytest.mark.parametrize("method", ROUTED, ids=named)
def test_one_domain_is_training_with_its_teacher_alone(method):
    for domain, seed in (("math", 1), ("code", 4)):
        alone = world(TEXTS, teacher=policy(seed))
        torch.testing.assert_close(
            found(routed(), method, [domain] * 5), found(alone, method, [domain] * 5), **CLOSE
        )


@pytest.mark.parametrize("method", ROUTED, ids=named)
def test_swapping_the_tags_swaps_the_teachers(method):
    swapped = [{"math": "code", "code": "math"}[d] for d in MIXED]
    straight = found(routed(), method, MIXED)
    torch.testing.assert_close(found(routed(swap=True), method, swapped), straight, **CLOSE)
    assert float((found(routed(), method, swapped) - straight).norm()) > 0.05 * float(straight.norm())


@pytest.mark.parametrize("method", ROUTED, ids=named)
def test_a_mixed_batch_is_the_weighted_sum_of_its_domains(method):
    run = routed()
    tokens = [len(t) for t in TEXTS]
    expected = torch.zeros(())
    for domain in ("math", "code"):
        rows = [i for i, d in enumerate(MIXED) if d == domain]
        share = sum(tokens[i] for i in rows) / sum(tokens)
        expected = expected + share * found(run, method, MIXED, rows)
    torch.testing.assert_close(found(run, method, MIXED), expected, **CLOSE)


@pytest.mark.parametrize("method", ROUTED, ids=named)
def test_two_names_for_one_teacher_are_one_teacher(method):
    shared = policy(1)
    both = world(TEXTS, teachers={"math": Role("teacher/math", shared), "code": Role("teacher/code", shared)})
    one = world(TEXTS, teacher=shared)
    torch.testing.assert_close(found(both, method, MIXED), found(one, method, MIXED), **CLOSE)


@pytest.mark.parametrize("method", ESTIMATORS, ids=name)
def test_an_unknown_tag_is_an_error_that_lists_the_known_ones(method):
    with pytest.raises(ValueError, match=r"domain 'law'.*\['code', 'math'\]"):
        found(routed(), method, ["math", "law"])


# -- errors in words --------------------------------------------------------------------------------------------


def test_no_teacher_is_an_error():
    run = world(teachers={})
    with pytest.raises(ValueError, match="needs a teacher"):
        OPD().score(run, rollouts(run, ANSWERS))


@pytest.mark.parametrize("method", ESTIMATORS[:2], ids=name)
def test_a_teacher_without_an_answer_is_an_error_not_a_zero(method):
    run = world()
    batch = method.score(run, rollouts(run, ANSWERS))
    scores = batch.scores["teacher"]
    logp = scores.logp.clone() if scores.logp is not None else None
    assert logp is not None
    logp[1] = torch.nan
    support = (
        None
        if scores.support_logp is None
        else scores.support_logp.index_fill(0, torch.tensor([1]), torch.nan)
    )
    broken = dataclasses.replace(scores, logp=logp, support_logp=support)
    with pytest.raises(ValueError, match="'teacher' gave no score"):
        method.loss(run, batch.with_(scores={"teacher": broken}))


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        ("sampled", "not asked for the log-probs"),
        ("top_k", "not asked for the log-probs"),
        ("full", "no hidden states"),
    ],
)
def test_scores_that_were_not_asked_for_are_an_error(estimator, message):
    run, method = world(), OPD(estimator=estimator, top_k=V)
    batch = method.score(run, rollouts(run, ANSWERS))
    with pytest.raises(ValueError, match=message):
        method.loss(run, batch.with_(scores={"teacher": Scores()}))
