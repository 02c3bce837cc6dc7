import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rooms_learn import close, gradient

from surpass.learn.aggregate import denominator, reduce
from surpass.learn.surrogate import (
    gspo,
    importance_sampling,
    ppo_clip,
    reinforce,
    truncated_importance_weight,
)
from surpass.records import Ragged

EXACT = {"rtol": 0.0, "atol": 1e-12}


def batch(lengths=(3, 1, 4), seed=0, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    old = -torch.rand(total, generator=generator, dtype=torch.float64) - 0.1
    logp = (old + spread * torch.randn(total, generator=generator, dtype=torch.float64)).requires_grad_()
    advantage = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    return Ragged.from_lengths(logp, torch.tensor(lengths)), old, advantage


def test_on_policy_all_surrogates_share_value_and_gradient():
    logp, _, advantage = batch()
    per_token, old = logp.expand(advantage), logp.values.detach()
    everything = torch.ones(8, dtype=torch.bool)
    expected = gradient(reinforce(logp.values, per_token), logp.values)
    assert torch.equal(expected, -per_token)
    clipped = ppo_clip(logp.values, old, per_token, dual=3.0)
    sequence = gspo(logp, old, advantage, everything)
    for loss in (importance_sampling(logp.values, old, per_token), clipped.loss, sequence.loss):
        close(loss.detach(), -per_token, **EXACT)
        close(gradient(loss, logp.values), expected, **EXACT)
    assert not clipped.clipped.any()
    assert not sequence.clipped.any()


@settings(max_examples=200, deadline=None)
@given(
    st.floats(-2.0, 2.0),
    st.floats(-3.0, 3.0),
    st.sampled_from([None, 2.0, 3.0]),
    st.sampled_from([(0.2, 0.2), (0.2, 0.28), (3e-4, 4e-4)]),
)
def test_gradient_is_zero_exactly_where_the_clip_says(log_ratio, advantage, dual, clip):
    low, high = clip
    logp = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    old, signal = torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    found = ppo_clip(logp, old, signal, low, high, dual)
    ratio = logp.detach().exp()
    expected = (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low)
    expected = expected or (advantage < 0 and dual is not None and ratio > dual)
    assert bool(found.clipped) == bool(expected)
    at_logp = torch.autograd.grad(found.loss.sum(), logp)[0]
    if expected:
        assert at_logp.item() == 0
    else:
        close(at_logp, -signal * ratio, rtol=1e-12, atol=1e-300)


def test_ratio_is_bounded():
    logp = torch.tensor([1000.0, -1000.0], requires_grad=True)
    loss = importance_sampling(logp, torch.zeros(2), torch.ones(2))
    assert loss.isfinite().all()
    assert gradient(loss, logp).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="above 1"):
        ppo_clip(logp, logp, torch.ones(2), dual=1.0)


def test_gspo_token_form_is_the_sequence_form():
    low, high = 0.01, 0.02
    logp, old, advantage = batch((3, 1, 4, 2, 5, 0), seed=3)
    mask = torch.ones(15, dtype=torch.bool)
    mask[[2, 5, 8, 9]] = False  # a hole, another, and the whole of row 3
    with torch.no_grad():  # make row 0 rise and row 2 fall, so that row 0 is clipped and row 2 is not
        logp.values[:2], logp.values[4:8] = old[:2] + 0.1, old[4:8] - 0.1
    advantage[0], advantage[2] = 1.0, 1.0
    rows = logp.like(mask)
    found = gspo(logp, old, advantage, mask, low, high)
    token_form = reduce(found.loss, rows, "sequence_mean", denominator(rows, "sequence_mean"))
    count = rows.sum()
    difference = torch.where(mask, logp.values - old, torch.zeros_like(old))
    ratio = (logp.like(difference).sum() / count.clamp(min=1)).exp()
    per_row = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
    sequence_form = per_row[count > 0].sum() / (count > 0).sum()
    close(token_form.detach(), sequence_form.detach(), **EXACT)
    close(gradient(token_form, logp.values), gradient(sequence_form, logp.values), **EXACT)
    assert found.clipped[:3].tolist() == [True, True, False]
    assert not found.clipped[4:8].any()


@pytest.mark.parametrize("poisoned", ["old_logp", "advantage"])
def test_tokens_nobody_drew_give_no_gradient_and_are_loud_inside_the_mask(poisoned):
    logp, old, advantage = batch()
    per_token = logp.expand(advantage).clone()
    (old if poisoned == "old_logp" else per_token)[2] = torch.nan
    mask = torch.ones(8, dtype=torch.bool)
    mask[2] = False
    rows = logp.like(mask)
    losses = [importance_sampling(logp.values, old, per_token), ppo_clip(logp.values, old, per_token).loss]
    if poisoned == "old_logp":
        losses.append(gspo(logp, old, advantage, torch.ones_like(mask)).loss)
    else:
        losses.append(reinforce(logp.values, per_token))
    for loss in losses:
        total = reduce(loss, rows, "token_mean", denominator(rows, "token_mean"))
        at_logp = gradient(total, logp.values)
        assert at_logp.isfinite().all()
        assert at_logp[2] == 0
        assert loss[2].isnan()


def test_truncated_importance_weight():
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    sampler = torch.tensor([-1.0, -9.0, -0.5, torch.nan])
    found = truncated_importance_weight(old, sampler, 5.0)
    assert not found.requires_grad
    close(found, [1.0, 5.0, torch.tensor(-0.5).exp(), 0.0], rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="above 0"):
        truncated_importance_weight(old, sampler, 0.0)


def test_sequence_ratio_is_bounded():
    logp = Ragged.from_lengths(torch.zeros(2, requires_grad=True), torch.tensor([2]))
    mask, advantage = torch.ones(2, dtype=torch.bool), -torch.ones(1)
    loss = gspo(logp, torch.full((2,), -1000.0), advantage, mask).loss
    close(loss.detach(), torch.full((2,), 10.0).exp(), rtol=1e-6, atol=0)
