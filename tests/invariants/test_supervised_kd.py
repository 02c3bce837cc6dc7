"""Invariants of supervised distillation: forward KL to the teacher on given text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import world

from surpass.methods.sft import SFT
from surpass.methods.supervised_kd import SupervisedKD
from surpass.models.policy import Policy
from surpass.records import Author, Prompt
from surpass.rollout.engine import Sampling


def texts() -> list[Prompt]:
    return [replace(p, response=r) for p, r in zip(world.prompts(3), ("ab", "c", "cab"), strict=True)]


def gradient(teacher: Policy | None = None, **settings: Any) -> torch.Tensor:
    run = world.world(teacher=teacher, sampling=Sampling(max_new_tokens=8))
    method = SupervisedKD(**settings)
    return world.step_gradient(run, method, method.collect(run, texts()))


def test_loss_is_forward_kl_averaged_per_answer():
    run = world.world(sampling=Sampling(max_new_tokens=8))
    batch = SupervisedKD().collect(run, texts())
    student = world.distributions(run.student, batch)
    teacher = world.distributions(run.teachers["default"].policy, batch).detach()
    kl = (teacher.exp() * (teacher - student)).sum(-1)
    by_hand = world.gradient(run.student, batch.ragged(kl).mean().mean())
    torch.testing.assert_close(gradient(), by_hand, **world.CLOSE)


def test_a_one_hot_teacher_on_its_own_text_is_sft():
    run = world.world(sampling=Sampling(max_new_tokens=8))
    teacher = world.sharpened(world.policy(1))
    batch = world.rollouts(run, [[0, 0, 0]], author=Author.DATA)
    for t in range(3):
        best = int(world.distributions(teacher, batch)[t].argmax())
        ids = batch.response.values.clone()
        ids[t] = best
        batch = batch.with_(response=batch.response.like(ids))
    run = world.world(teacher=teacher, sampling=Sampling(max_new_tokens=8))
    method = SupervisedKD(reduction="token_mean")
    distilled = world.step_gradient(run, method, method.ask_teacher(run, batch))
    torch.testing.assert_close(distilled, world.step_gradient(run, SFT(), batch), **world.CLOSE)


def test_a_teacher_equal_to_the_student_teaches_nothing():
    found = gradient(world.policy(0))
    # Forward KL has the logit gradient S - T, two equal float32 softmaxes.
    assert found.abs().max() < 1e-6


@pytest.mark.parametrize("tail", ["drop", "renormalise", "bucket"])
def test_top_k_of_the_whole_vocabulary_is_the_full_divergence(tail: str):
    found = gradient(estimator="top_k", top_k=world.V, tail=tail)
    torch.testing.assert_close(found, gradient(), **world.CLOSE)


def test_a_smaller_support_is_another_loss():
    assert (gradient(estimator="top_k", top_k=2) - gradient()).norm() > 1e-3


def test_cross_entropy_is_added_with_its_weight():
    run = world.world(sampling=Sampling(max_new_tokens=8))
    sft = SFT(reduction="sequence_mean")
    hard = world.step_gradient(run, sft, sft.collect(run, texts()))
    torch.testing.assert_close(gradient(cross_entropy=0.5), gradient() + 0.5 * hard, **world.CLOSE)


@pytest.mark.parametrize("estimator", ["full", "top_k"])
def test_another_teacher_gives_another_gradient(estimator: str):
    one, other = (gradient(world.policy(seed), estimator=estimator, top_k=3) for seed in (1, 4))
    assert (one - other).norm() > 0.1 * one.norm()


def test_text_of_the_teacher_needs_no_response():
    run = world.world(teacher_answers=[[0, world.EOS]])
    method = SupervisedKD(text="teacher", samples=2)
    batch = method.collect(run, world.prompts(2))
    assert bool(batch.by(Author.TEACHER).all()) and len(batch) == 4
    assert not method.needs().response
    assert world.step_gradient(run, method, batch).norm() > 0
    with pytest.raises(ValueError, match=r"method\.text teacher"):
        SupervisedKD(samples=2)
