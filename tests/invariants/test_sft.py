"""Invariants of SFT: cross-entropy on the data set's responses, and on nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import world

from surpass.methods.sft import SFT
from surpass.records import Author


def test_loss_is_the_mean_cross_entropy_of_response_and_eos():
    run = world.world(sampling=world.Sampling(max_new_tokens=8))
    prompts = world.prompts(2, response="ab")
    batch = SFT().collect(run, [prompts[0], replace(prompts[1], response="c")])
    assert batch.response.tolist() == [[0, 1, world.EOS], [2, world.EOS]]
    assert bool(batch.by(Author.DATA).all())
    by_hand = -world.token_logp(run.student, batch).mean()
    found = world.step_gradient(run, SFT(), batch)
    torch.testing.assert_close(found, world.gradient(run.student, by_hand), **world.CLOSE)


def test_gradient_does_not_depend_on_micro_batches():
    run = world.world(sampling=world.Sampling(max_new_tokens=8))
    batch = SFT().collect(
        run, [replace(p, response="abc"[: 1 + i % 3]) for i, p in enumerate(world.prompts(5))]
    )
    whole = world.step_gradient(run, SFT(), batch)
    for micro in (1, 2):
        torch.testing.assert_close(world.step_gradient(run, SFT(), batch, micro), whole, **world.CLOSE)


def test_expected_gradient_is_that_of_forward_kl_to_the_data():
    run = world.world()
    data = world.policy(5)
    batch = world.rollouts(run, world.every_answer(2), author=Author.DATA)
    share = world.probability(data, batch)
    found = world.expected_gradient(run, SFT(), batch, share)
    kl = (share * (share.log() - world.sequence_logp(run.student, batch))).sum()
    torch.testing.assert_close(found, world.gradient(run.student, kl), **world.CLOSE)


def test_answers_and_privileged_texts_are_never_read():
    run = world.world(sampling=world.Sampling(max_new_tokens=8))
    plain = world.prompts(1, response="ab")
    other = [replace(plain[0], answer="other", privileged={"solution": "cc"}, columns={"label": 1})]
    gradients = [world.step_gradient(run, SFT(), SFT().collect(run, p)) for p in (plain, other)]
    assert torch.equal(*gradients)


def test_needs_a_response_and_nothing_else():
    needs = SFT().needs()
    assert needs.response and not needs.rollouts and not needs.teacher and not needs.reward
    with pytest.raises(ValueError, match="'p0' has no response"):
        SFT().collect(world.world(), world.prompts(1))
    with pytest.raises(ValueError, match="one response"):
        SFT(samples=2)
