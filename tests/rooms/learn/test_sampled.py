"""Which estimator has which gradient, checked by enumeration instead of sampling."""

from itertools import product

import pytest
import torch
from rooms_learn import STUDENT, TEACHER, close, gradient, logits, random_logp, row

from surpass.learn.divergence import Divergence, forward_kl, reverse_kl
from surpass.learn.sampled import (
    forward_kl_k3,
    k1_value,
    k3_value,
    log_ratio_advantage,
    reverse_kl_k2,
    token_signal,
)
from surpass.learn.support import choose_support, support_policy_gradient, top_k_divergence
from surpass.learn.surrogate import ppo_clip, reinforce

EXACT = {"rtol": 0.0, "atol": 1e-13}


def expected_gradient(estimator):
    """Expectation over the student's own sample of the gradient of `estimator(logp, target_logp)`."""
    leaf = logits()
    return gradient(STUDENT * estimator(leaf.log_softmax(-1)[0], row(TEACHER)[0]), leaf)


def full_gradient(divergence):
    leaf = logits()
    return gradient(divergence(leaf.log_softmax(-1), row(TEACHER)), leaf)


def test_estimators_are_named_by_their_gradient():
    close(expected_gradient(reverse_kl_k2), full_gradient(reverse_kl), **EXACT)
    close(expected_gradient(forward_kl_k3), full_gradient(forward_kl), **EXACT)
    # k1 written out by hand and differentiated: nothing, whatever the teacher.
    close(expected_gradient(lambda s, t: s - t), torch.zeros(3), **EXACT)
    surrogate = expected_gradient(lambda s, t: reinforce(s, log_ratio_advantage(t, s)))
    close(surrogate, full_gradient(reverse_kl), **EXACT)


def test_values_are_unbiased_and_cannot_be_differentiated():
    leaf = logits()
    student, target = leaf.log_softmax(-1)[0], row(TEACHER)[0]
    for value in (k1_value, k3_value):
        found = value(student, target)
        assert not found.requires_grad
        close((STUDENT * found).sum(), reverse_kl(row(STUDENT), row(TEACHER))[0], **EXACT)
    assert (k3_value(student, target) >= 0).all()


def test_a_loss_is_refused_as_an_advantage():
    leaf = logits()
    student = leaf.log_softmax(-1)
    divergence = reverse_kl(student, row(TEACHER))
    for surrogate in (reinforce, lambda logp, a: ppo_clip(logp, logp, a).loss, lambda _, a: token_signal(a)):
        with pytest.raises(ValueError, match="expected gradient is zero"):
            surrogate(student[:, 0], divergence)
    assert not log_ratio_advantage(row(TEACHER)[0], student[0]).requires_grad
    # And the reason: detached and used as one, a divergence trains nothing.
    close(
        gradient(STUDENT * reinforce(student[0], divergence.detach().expand(3)), leaf),
        torch.zeros(3),
        **EXACT,
    )


@pytest.mark.parametrize("length", [1, 2, 3])
def test_all_estimators_agree_over_every_sequence(length):
    """Reverse KL with immediate credit: sampled, top-k with all of V and full vocabulary, over all V^L
    sequences.
    """
    vocabulary = 3
    states = sum(vocabulary**t for t in range(length))
    leaf = random_logp(states, vocabulary).requires_grad_()
    target = random_logp(states, vocabulary, seed=1)
    student = leaf.log_softmax(-1)
    sampled, top_k, half, full = (torch.zeros((), dtype=torch.float64) for _ in range(4))
    for sequence in product(range(vocabulary), repeat=length):
        state, path = 0, []
        for token in sequence:
            path.append((state, token))
            state = state * vocabulary + token + 1
        at = torch.tensor([s for s, _ in path])
        tokens = torch.tensor([[v] for _, v in path])
        logp, target_logp = student[at].gather(-1, tokens)[:, 0], target[at].gather(-1, tokens)[:, 0]
        probability = logp.sum().exp().detach()
        sampled = sampled + probability * reinforce(logp, log_ratio_advantage(target_logp, logp)).sum()
        ids, valid = choose_support(student[at], target[at], vocabulary, "union")
        on = student[at].gather(-1, ids), target[at].gather(-1, ids)
        top_k = (
            top_k + probability * top_k_divergence(Divergence("reverse_kl"), *on, valid, "bucket").value.sum()
        )
        half = half + probability * support_policy_gradient(*on, valid).sum()
        full = full + probability * reverse_kl(student[at], target[at]).sum()
    expected = torch.autograd.grad(full, leaf, retain_graph=True)[0]
    for estimate in (sampled, top_k, half):
        close(torch.autograd.grad(estimate, leaf, retain_graph=True)[0], expected, rtol=0, atol=1e-12)
    other = reverse_kl(student, random_logp(states, vocabulary, seed=2)).sum()
    assert (torch.autograd.grad(other, leaf)[0] - expected).abs().max() > 1e-2
