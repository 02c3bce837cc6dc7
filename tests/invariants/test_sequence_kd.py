"""Invariants of sequence-level distillation: cross-entropy on what the teacher writes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import world

from surpass.methods.sequence_kd import SequenceKD
from surpass.methods.sft import SFT
from surpass.models.policy import Policy
from surpass.records import Author
from surpass.roles.role import Role


def likeliest(writer: Policy) -> list[int]:
    """The writer's most likely answer to the prompt of the world."""
    answers = world.every_answer(2)
    batch = world.rollouts(world.world(), answers)
    return answers[int(world.probability(writer, batch).argmax())]


def test_expected_gradient_is_that_of_forward_kl_between_answers():
    run = world.world()
    batch = world.rollouts(run, world.every_answer(2), author=Author.TEACHER)
    share = world.probability(run.teachers["default"].policy, batch)
    found = world.expected_gradient(run, SequenceKD(), batch, share)
    kl = (share * (share.log() - world.sequence_logp(run.student, batch))).sum()
    torch.testing.assert_close(found, world.gradient(run.student, kl), **world.CLOSE)


def test_the_teacher_writes_after_the_students_own_prompt():
    run = world.world(teacher_answers=[[0, 1], [2, world.EOS]])
    batch = SequenceKD(samples=2).collect(run, world.prompts(2))
    assert batch.response.tolist() == [[0, 1], [2, world.EOS]] * 2
    assert batch.group.tolist() == [0, 0, 1, 1]
    assert bool(batch.by(Author.TEACHER).all())
    assert batch.prompt_ids.tolist() == [[0], [0], [1], [1]]


def test_each_domain_has_its_own_writer():
    roles = {d: Role(d, world.policy(seed)) for d, seed in (("math", 1), ("code", 2))}
    answers = {"seed-1": [[0, world.EOS]], "seed-2": [[1, world.EOS]]}
    run = world.world(teachers=roles, engine_for=lambda w: world.Scripted(w, answers[w.name]))
    prompts = [replace(p, domain=d) for p, d in zip(world.prompts(3), ("code", "math", "code"), strict=True)]
    batch = SequenceKD().collect(run, prompts)
    assert [ids[0] for ids in batch.response.tolist()] == [1, 0, 1]
    assert batch.prompts == tuple(prompts)


def test_stored_text_is_sft_on_it():
    run = world.world(teachers={})
    prompts = world.prompts(2, response="ab")
    method = SequenceKD(text="stored")
    stored = world.step_gradient(run, method, method.collect(run, prompts))
    assert torch.equal(stored, world.step_gradient(run, SFT(), SFT().collect(run, prompts)))
    assert method.needs().response and not method.needs().teacher
    with pytest.raises(ValueError, match=r"method\.text written"):
        SequenceKD(text="stored", samples=2)


def test_another_teacher_gives_another_gradient():
    gradients = []
    for seed in (1, 4):
        run = world.world(
            teacher=world.policy(seed), engine_for=lambda writer: world.Scripted(writer, [likeliest(writer)])
        )
        gradients.append(world.step_gradient(run, SequenceKD(), SequenceKD().collect(run, [world.PROMPT])))
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()


def test_without_a_teacher_it_says_so():
    with pytest.raises(ValueError, match="--teacher"):
        SequenceKD().collect(world.world(teachers={}), world.prompts(1))
