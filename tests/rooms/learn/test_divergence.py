import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rooms_learn import STUDENT, TEACHER, close, gradient, logits, random_logp, row

from surpass.learn.divergence import (
    Divergence,
    entropy,
    forward_kl,
    jsd,
    mixed_kl,
    rescaled_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
)

ALL = [
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    Divergence("jsd", 0.3),
    Divergence("rescaled_jsd", 0.3),
    Divergence("skew_forward_kl", 0.1),
    Divergence("skew_reverse_kl", 0.1),
    Divergence("mixed_kl", 0.25),
]


@pytest.mark.parametrize(
    ("divergence", "value", "at_logits"),
    [
        (Divergence("reverse_kl"), 0.092033, (-0.214253, 0.094030, 0.120223)),
        (Divergence("forward_kl"), 0.085123, (-0.2, 0.1, 0.1)),
        (Divergence("jsd", 0.1), 0.007695, None),
        (Divergence("jsd", 0.5), 0.021901, (-0.050848, 0.024187, 0.026661)),
        (Divergence("jsd", 0.9), 0.008185, None),
        (Divergence("mixed_kl", 0.5), None, (-0.207127, 0.097015, 0.110112)),
    ],
)
def test_fixture(divergence, value, at_logits):
    leaf = logits()
    found = divergence(leaf.log_softmax(-1), row(TEACHER))
    if value is not None:
        close(found[0].detach(), value)
    if at_logits is not None:
        close(gradient(found, leaf), at_logits)


def test_fixture_entropies_and_scaled_jsd():
    close(entropy(row(STUDENT))[0] / math.log(3), 0.937231)
    close(entropy(row(TEACHER))[0] / math.log(3), 0.729847)
    close(jsd(row(STUDENT), row(TEACHER), 0.1)[0] / 0.1, 0.076947)
    close(jsd(row(STUDENT), row(TEACHER), 0.9)[0] / 0.1, 0.081848)


@pytest.mark.parametrize("divergence", ALL, ids=lambda d: d.kind)
def test_gradients_by_finite_differences(divergence):
    leaf = random_logp(3, 5).requires_grad_()
    target = random_logp(3, 5, seed=1)
    assert torch.autograd.gradcheck(lambda z: divergence(z.log_softmax(-1), target), leaf)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 9), st.floats(0.0, 30.0))
def test_zero_iff_equal_and_never_negative(seed, tokens, vocabulary, scale):
    student = random_logp(tokens, vocabulary, seed=seed, scale=scale)
    target = random_logp(tokens, vocabulary, seed=seed + 1, scale=scale)
    for divergence in ALL:
        # Rounding of sums of V terms of size at most `scale`.
        assert (divergence(student, target) >= -1e-12 * (1 + scale)).all()
        assert divergence(student, student).abs().max() < 1e-13 * (1 + scale)
    assert (jsd(student, target, 0.5) <= math.log(2) + 1e-12).all()
    close(jsd(student, target, 0.3), jsd(target, student, 0.7), rtol=1e-9, atol=1e-12)


def test_ends_are_continuous_or_refused():
    student, target = random_logp(4, 6), random_logp(4, 6, seed=1)
    # The next order is beta times a second moment of the ratio (about 130 here); rounding adds 1e-16 / beta.
    close(rescaled_jsd(student, target, 1e-9), forward_kl(student, target), rtol=0, atol=1e-6)
    close(rescaled_jsd(student, target, 1 - 1e-9), reverse_kl(student, target), rtol=0, atol=1e-6)
    assert torch.equal(rescaled_jsd(student, target, 0), forward_kl(student, target))
    assert torch.equal(rescaled_jsd(student, target, 1), reverse_kl(student, target))
    assert torch.equal(skew_forward_kl(student, target, 0), forward_kl(student, target))
    assert torch.equal(skew_reverse_kl(student, target, 0), reverse_kl(student, target))
    assert torch.equal(mixed_kl(student, target, 0), forward_kl(student, target))
    assert torch.equal(mixed_kl(student, target, 1), reverse_kl(student, target))
    for beta in (0, 1):
        with pytest.raises(ValueError, match="forward_kl"):
            jsd(student, target, beta)


@pytest.mark.parametrize(
    ("kind", "parameter"),
    [
        ("jsd", 0.0),
        ("jsd", 1.0),
        ("jsd", None),
        ("skew_forward_kl", 1.0),
        ("mixed_kl", 1.1),
        ("reverse_kl", 0.5),
        ("kl", None),
        ("rescaled_jsd", float("nan")),
    ],
)
def test_bad_divergence_is_refused_when_built(kind, parameter):
    with pytest.raises(ValueError, match=kind):
        Divergence(kind, parameter)


def test_impossible_tokens():
    student = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    target = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64).log()
    assert reverse_kl(student, target).item() == math.inf
    close(forward_kl(student, target)[0], math.log(2), rtol=0, atol=1e-15)
    leaf = student.clone().requires_grad_()
    for divergence in ALL:
        if divergence.kind in ("reverse_kl", "mixed_kl"):
            continue  # infinite, as checked above
        value = divergence(leaf, target)
        assert value.isfinite().all()
        assert gradient(value, leaf).isfinite().all()
    # A probability that underflows to 0 beside a target of exactly 0 is 0 * log 0, not NaN.
    tiny = torch.tensor([[0.0, -1e4]], dtype=torch.float64)
    assert reverse_kl(tiny, torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)).item() == 0
