import math

import pytest
import torch
from rooms_learn import TEACHER, close, gradient, logits, random_logp, row

from surpass.learn.divergence import Divergence, reverse_kl
from surpass.learn.support import (
    choose_support,
    combine_support,
    overlap,
    restrict,
    support_policy_gradient,
    top_k_divergence,
    top_k_log_linear_divergence,
)
from surpass.learn.targets import log_linear, log_normaliser

REVERSE = Divergence("reverse_kl")
TAILS = ("drop", "renormalise", "bucket")
KINDS = [REVERSE, Divergence("forward_kl"), Divergence("jsd", 0.5), Divergence("mixed_kl", 0.3)]


def fixture_support():
    leaf = logits()
    student, target = leaf.log_softmax(-1), row(TEACHER)
    ids, valid = choose_support(student, target, 2, "student")
    assert ids.tolist() == [[0, 1]]
    return leaf, student.gather(-1, ids), target.gather(-1, ids), valid


@pytest.mark.parametrize(
    ("log_ratio", "expected"),
    [("raw", (-0.181172, 0.169523, 0.011649)), ("renormalised", (-0.166449, 0.178357, -0.011907))],
)
def test_fixture_policy_gradients_on_a_support(log_ratio, expected):
    leaf, student, target, valid = fixture_support()
    close(gradient(support_policy_gradient(student, target, valid, log_ratio=log_ratio), leaf), expected)


def test_fixture_exact_gradient_and_mass():
    leaf, student, target, valid = fixture_support()
    found = top_k_divergence(REVERSE, student, target, valid, "renormalise")
    close(found.value[0].detach(), 0.059537)
    close(found.student_mass[0], 0.8, rtol=0, atol=1e-15)
    close(found.target_mass[0], 0.9, rtol=0, atol=1e-15)
    close(gradient(found.value, leaf), (-0.173892, 0.173892, 0.0))
    leaf, student, _, _ = fixture_support()
    close(gradient(torch.logsumexp(student, -1), leaf), (0.125, 0.075, -0.2))


def test_owners():
    student = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    teacher = torch.tensor([[0.1, 0.3, 0.2, 0.4]]).log()
    union = choose_support(student, teacher, 2, "union")
    assert union.ids.tolist() == [[0, 1, 3, 1]]
    assert union.valid.tolist() == [[True, True, True, False]]
    both = choose_support(student, teacher, 2, "intersection")
    assert both.ids[both.valid].tolist() == [1]
    assert choose_support(student, teacher, 2, "teacher").ids.tolist() == [[3, 1]]
    assert overlap(union.ids[:, :2], union.ids[:, 2:]).tolist() == [0.5]
    with pytest.raises(ValueError, match="between 1 and the vocabulary of 4"):
        choose_support(student, teacher, 5, "student")
    with pytest.raises(ValueError, match="unknown support owner"):
        combine_support(union.ids, union.ids, "nobody")  # type: ignore[arg-type]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("owner", ["student", "teacher", "union", "intersection"])
@pytest.mark.parametrize("divergence", KINDS, ids=lambda d: d.kind)
def test_all_of_the_vocabulary_is_the_full_divergence(tail, owner, divergence):
    leaf = random_logp(4, 5).requires_grad_()
    student, target = leaf.log_softmax(-1), random_logp(4, 5, seed=1)
    ids, valid = choose_support(student, target, 5, owner)
    found = top_k_divergence(divergence, student.gather(-1, ids), target.gather(-1, ids), valid, tail)
    full = divergence(student, target)
    # The empty bucket counts as epsilon (2e-16) on either side, times log-ratios below 40.
    close(found.value, full, rtol=0, atol=1e-12)
    close(gradient(found.value, leaf), gradient(full, leaf), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
def test_full_support_of_a_sharp_model_in_float32(tail):
    leaf = (1e4 * random_logp(6, 9).float()).requires_grad_()
    student, target = leaf.log_softmax(-1), (1e4 * random_logp(6, 9, seed=1).float()).log_softmax(-1)
    ids, valid = choose_support(student, target, 9, "student")
    found = top_k_divergence(REVERSE, student.gather(-1, ids), target.gather(-1, ids), valid, tail).value
    close(found, reverse_kl(student, target), rtol=1e-5, atol=1e-4)
    assert gradient(found, leaf).isfinite().all()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", KINDS, ids=lambda d: d.kind)
def test_gradients_by_finite_differences(tail, divergence):
    leaf, target = random_logp(3, 7).requires_grad_(), random_logp(3, 7, seed=1)
    ids, valid = choose_support(leaf, target, 3, "union")

    def value(z):
        student = z.log_softmax(-1)
        return top_k_divergence(
            divergence, student.gather(-1, ids), target.gather(-1, ids), valid, tail
        ).value

    assert torch.autograd.gradcheck(value, leaf)


def test_a_repeated_or_invalid_slot_adds_nothing():
    student, target = random_logp(3, 6), random_logp(3, 6, seed=1)
    ids, valid = choose_support(student, target, 3, "student")
    padded_ids = torch.cat([ids, ids[:, :2]], -1)
    padded_valid = torch.cat([valid, torch.zeros(3, 2, dtype=torch.bool)], -1)
    for tail in TAILS:
        found = top_k_divergence(REVERSE, student.gather(-1, ids), target.gather(-1, ids), valid, tail)
        padded = top_k_divergence(
            REVERSE, student.gather(-1, padded_ids), target.gather(-1, padded_ids), padded_valid, tail
        )
        for left, right in zip(found, padded):
            close(left, right, rtol=0, atol=1e-14)
    order = torch.tensor([2, 0, 1])
    close(
        support_policy_gradient(student.gather(-1, ids)[:, order], target.gather(-1, ids)[:, order], valid),
        support_policy_gradient(student.gather(-1, ids), target.gather(-1, ids), valid),
        rtol=0,
        atol=1e-14,
    )


@pytest.mark.parametrize("tail", TAILS)
def test_an_empty_intersection_teaches_nothing(tail):
    leaf = random_logp(2, 4).requires_grad_()
    valid = torch.tensor([[False, False], [True, False]])
    student, target = leaf.log_softmax(-1)[:, :2], random_logp(2, 4, seed=1)[:, :2]
    for divergence in KINDS:
        value = top_k_divergence(divergence, student, target, valid, tail).value
        assert value[0].abs() < 1e-15
        at_logits = torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0]
        assert torch.equal(at_logits[0], torch.zeros(4, dtype=torch.float64))
        assert at_logits.isfinite().all()


def test_truncation_is_never_clamped():
    student, target = row(torch.tensor([0.9, 0.1])), row(torch.tensor([0.5, 0.5]))
    valid = torch.tensor([[False, True]])
    dropped = top_k_divergence(REVERSE, student, target, valid, "drop").value
    close(dropped[0], 0.1 * math.log(0.1 / 0.5), rtol=1e-6, atol=0)
    assert dropped[0] < 0
    # With two tokens the bucket is the other token: nothing is lost.
    bucket = top_k_divergence(REVERSE, student, target, valid, "bucket").value
    close(bucket, reverse_kl(student, target), rtol=1e-5, atol=0)


def test_bucket_never_exceeds_the_full_divergence():
    student, target = random_logp(50, 20), random_logp(50, 20, seed=1)
    ids, valid = choose_support(student, target, 4, "student")
    value = top_k_divergence(REVERSE, student.gather(-1, ids), target.gather(-1, ids), valid, "bucket").value
    full = reverse_kl(student, target)
    assert (value >= 0).all()
    assert (value <= full + 1e-12).all()
    assert (value < full).any()


def test_log_linear_targets_on_a_support():
    student, teacher, reference = (random_logp(4, 8, seed=s) for s in range(3))
    weights = [1.25, -0.25]
    full = log_linear([teacher, reference], weights)
    ids, valid = choose_support(student, teacher, 3, "union")
    on = [x.gather(-1, ids) for x in (student, teacher, reference, full)]
    for tail in ("drop", "renormalise"):
        direct = top_k_divergence(REVERSE, on[0], on[3], valid, tail)
        log_z = log_normaliser([teacher, reference], weights) if tail == "drop" else None
        roles = top_k_log_linear_divergence(REVERSE, on[0], on[1:3], weights, valid, tail, log_z)
        close(roles.value, direct.value, rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="log_normaliser"):
        top_k_log_linear_divergence(REVERSE, on[0], on[1:3], weights, valid, "drop")
    # A role of weight 0 is not read under any tail, and the teacher alone is the plain form bit for bit.
    poison = torch.full_like(on[1], torch.nan)
    for tail in TAILS:
        alone = top_k_log_linear_divergence(REVERSE, on[0], [on[1], poison], [1.0, 0.0], valid, tail)
        plain = top_k_divergence(REVERSE, on[0], on[1], valid, tail)
        assert all(torch.equal(a, b) for a, b in zip(alone, plain))
    ids, valid = choose_support(student, teacher, 8, "student")
    on = [x.gather(-1, ids) for x in (student, teacher, reference)]
    bucket = top_k_log_linear_divergence(REVERSE, on[0], on[1:], weights, valid, "bucket")
    close(bucket.value, reverse_kl(student, full), rtol=0, atol=1e-12)


def test_restrict_gives_distributions():
    logp = random_logp(5, 9)
    valid = torch.tensor([True, False, True, True, False, True, True, True, False]).expand(5, -1)
    for tail in ("renormalise", "bucket"):
        close(restrict(logp, valid, tail).exp().sum(-1), torch.ones(5), rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="unknown tail policy"):
        restrict(logp, valid, "clamp")  # type: ignore[arg-type]
