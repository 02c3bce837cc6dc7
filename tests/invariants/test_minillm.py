"""Invariants of MiniLLM: the gradient is that of reverse KL between answers, the mixture is what it says."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import world

from surpass.learn.targets import mixture
from surpass.methods.minillm import MiniLLM
from surpass.methods.run import Run
from surpass.methods.sft import SFT
from surpass.records import Author, Finish, Ragged, Rollouts, Scores
from surpass.roles.scoring import Want
from surpass.rollout.engine import Sampling


def plain(**settings: Any) -> MiniLLM:
    """No mixture, no clip, no length normalisation: the bare gradient."""
    return MiniLLM(**{"teacher_share": 0.0, "clip": None, "length_normalised": False, **settings})


def scored(run: Run, answers: list[list[int]]) -> Rollouts:
    return run.score(world.rollouts(run, answers), "teacher", Want(hidden=True))


def teacher_of(run: Run):
    return run.teachers["default"].policy


@pytest.mark.parametrize("length", [1, 2, 3])
def test_expected_gradient_is_that_of_reverse_kl_between_answers(length: int):
    run = world.world()
    batch = scored(run, world.every_answer(length))
    found = world.expected_gradient(run, plain(), batch)
    student = world.sequence_logp(run.student, batch)
    teacher = world.sequence_logp(teacher_of(run), batch).detach()
    kl = (student.exp() * (student - teacher)).sum()
    torch.testing.assert_close(found, world.gradient(run.student, kl), **world.CLOSE)


def test_expected_gradient_is_that_of_reinforce():
    run = world.world()
    batch = scored(run, world.every_answer(2))
    found = world.expected_gradient(run, plain(), batch)
    logp = world.token_logp(run.student, batch)
    ratio = (world.token_logp(teacher_of(run), batch) - logp).detach()
    returns = batch.ragged(ratio).suffix_sum() - 1
    p = world.probability(run.student, batch)
    reinforce = -(p * batch.ragged(returns * logp).sum()).sum()
    torch.testing.assert_close(found, world.gradient(run.student, reinforce), **world.CLOSE)


def test_one_token_answers_have_no_long_part():
    run = world.world()
    batch = scored(run, world.every_answer(1))
    single, long = plain().loss(run, batch).terms
    assert torch.equal(long.values.detach(), torch.zeros(world.V))
    student = world.distributions(run.student, batch)
    teacher = world.distributions(teacher_of(run), batch).detach()
    analytic = (student.exp() * (student - teacher)).sum(-1)
    torch.testing.assert_close(single.values, analytic, **world.CLOSE)


def test_single_steps_have_less_variance_than_sampling_them():
    """What the decomposition is for: at one state the exact part has no variance, the sampled one has."""
    run = world.world()
    batch = scored(run, world.every_answer(1))
    p = world.probability(run.student, batch)
    logp = world.token_logp(run.student, batch)
    ratio = (logp - world.token_logp(teacher_of(run), batch)).detach()
    kl = plain().loss(run, batch).terms[0].values

    def variance(values: torch.Tensor) -> float:
        rows = torch.stack([_keep(run, value) for value in values])
        mean = (p.unsqueeze(1) * rows).sum(0)
        return float((p.unsqueeze(1) * (rows - mean).square()).sum())

    assert variance(kl) < 1e-6 < 1e-2 < variance(ratio * logp)


def _keep(run: Run, value: torch.Tensor) -> torch.Tensor:
    parameters = list(run.student.model.parameters())
    parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


def mixed(run: Run, samples: int, share: float) -> Rollouts:
    return run.generate_mixed([world.PROMPT], samples, share)


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_the_sampler_records_the_law_of_the_mixture(share: float):
    run = world.world(sampling=Sampling(max_new_tokens=3))
    batch = mixed(run, 64, share)
    parts = [world.token_logp(p, batch).detach() for p in (teacher_of(run), run.student)]
    law = (share * parts[0].exp() + (1 - share) * parts[1].exp()).log()
    torch.testing.assert_close(batch.sampler_logp, law, **world.CLOSE)
    assert bool(batch.by(Author.STUDENT).all())


def test_the_sampler_draws_from_the_mixture():
    run = world.world(sampling=Sampling(max_new_tokens=2))
    count = 4000
    drawn = mixed(run, count, 0.5).response.tolist()
    answers = world.every_answer(2)
    space = world.rollouts(run, answers)
    parts = [world.distributions(p, space).detach() for p in (teacher_of(run), run.student)]
    law = mixture(parts, [0.5, 0.5]).gather(-1, space.response.values.unsqueeze(-1)).squeeze(-1)
    expected = space.ragged(law).sum().exp()
    assert float(expected.sum()) == pytest.approx(1.0, abs=1e-5)
    found = torch.tensor([drawn.count(answer) / count for answer in answers])
    # Five standard deviations of each frequency.
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all()


def test_mixed_answers_end_and_depend_on_their_seed_alone():
    run = world.world(sampling=Sampling(max_new_tokens=4))
    prompts = world.prompts(3)
    batch = run.generate_mixed(prompts, 2, 0.3)
    alone = world.world(sampling=Sampling(max_new_tokens=4)).generate_mixed(prompts[2:], 2, 0.3)
    assert batch.response.tolist()[4:] == alone.response.tolist()
    assert batch.group.tolist() == [0, 0, 1, 1, 2, 2]
    for ids, reason in zip(batch.response.tolist(), batch.finish.tolist(), strict=True):
        assert (reason == Finish.EOS) == (ids[-1] == world.EOS)
        assert world.EOS not in ids[:-1] and (reason == Finish.EOS or len(ids) == 4)
    stopped = replace(run, sampling=Sampling(max_new_tokens=4, stop=("a",)))
    for ids in stopped.generate_mixed(prompts, 4, 0.3).response.tolist():
        assert 0 not in ids[:-1]
    late = replace(run, sampling=Sampling(max_new_tokens=4, min_new_tokens=4))
    assert set(late.generate_mixed(prompts, 8, 0.3).lengths.tolist()) == {4}


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_weights_are_bounded_and_correct_a_single_step(share: float):
    run = world.world(sampling=Sampling(max_new_tokens=1))
    own = scored(run, world.every_answer(1))
    p = world.probability(run.student, own)
    law = share * world.probability(teacher_of(run), own) + (1 - share) * p
    batch = own.with_(sampler_logp=law.log())
    method = plain(teacher_share=share)
    weight = method.mixture_weight(batch, world.token_logp(run.student, batch).detach())
    torch.testing.assert_close(weight, p / law, **world.CLOSE)
    assert weight.max() <= 1 / (1 - share)
    # One token: the weight is exact, so the expectation under the mixture is that under the student.
    corrected = world.expected_gradient(run, method, batch, law)
    torch.testing.assert_close(corrected, world.expected_gradient(run, plain(), own, p), **world.CLOSE)


def test_both_parts_are_weighed():
    run = world.world()
    batch = scored(run, world.every_answer(2))
    law = batch.with_(sampler_logp=batch.sampler_logp + torch.linspace(-0.5, 0.5, len(batch.response.values)))
    method = plain(teacher_share=0.5)
    weight = (batch.sampler_logp - law.sampler_logp).exp()
    for bare, weighed in zip(method.loss(run, batch).terms, method.loss(run, law).terms, strict=True):
        torch.testing.assert_close(weighed.values, weight * bare.values, **world.CLOSE)


def test_return_is_that_of_the_later_tokens_per_token():
    ratio = Ragged.from_list([torch.tensor([1.0, 2.0, 6.0]), torch.tensor([5.0])])
    assert plain().later_return(ratio).tolist() == [8.0, 6.0, 0.0, 0.0]
    assert plain(length_normalised=True).later_return(ratio).tolist() == [4.0, 6.0, 0.0, 0.0]


def test_clip_ends_the_gradient_of_the_long_part_alone():
    run = world.world()
    batch = scored(run, [[0, 1]])
    logp = world.token_logp(run.student, batch).detach()
    method = plain(clip=0.2)
    # The present student is 1.5 times as likely to write this as the one that did, and the return is positive.
    teacher = batch.scores["teacher"]
    assert teacher.logp is not None
    liked = replace(teacher, logp=logp + 1.0)
    old = Scores(logp=logp - math.log(1.5))
    batch = batch.with_(scores={"old": old, "teacher": liked}, sampler_logp=logp - math.log(1.5))
    single, long = method.loss(run, batch).terms
    assert world.gradient(run.student, long.values.sum()).abs().max() == 0
    assert world.gradient(run.student, method.loss(run, batch).terms[0].values.sum()).norm() > 0
    free = plain().loss(run, batch).terms[1]
    assert world.gradient(run.student, free.values.sum()).norm() > 0
    assert single.name == "single_step"


def test_data_adds_cross_entropy_on_the_responses():
    run = world.world([[0, 1], [2]], sampling=Sampling(max_new_tokens=4))
    prompts = world.prompts(2, response="ab")
    bare, both = plain(), plain(data_coefficient=0.5)
    sft = world.step_gradient(run, SFT(), SFT().collect(run, prompts))
    found = world.step_gradient(run, both, both.collect(run, prompts))
    expected = world.step_gradient(run, bare, bare.collect(run, prompts)) + 0.5 * sft
    torch.testing.assert_close(found, expected, **world.CLOSE)
    assert both.needs().response and not bare.needs().response


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_another_teacher_gives_another_gradient(share: float):
    gradients = []
    for seed in (1, 4):
        run = world.world(teacher=world.policy(seed), sampling=Sampling(max_new_tokens=2))
        method = MiniLLM(teacher_share=share, samples=4)
        gradients.append(world.step_gradient(run, method, method.collect(run, world.prompts(2))))
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()


def test_settings_without_a_meaning_are_refused():
    with pytest.raises(ValueError, match="sequence_kd"):
        MiniLLM(teacher_share=1.0)
    run = world.world(sampling=Sampling(top_p=0.9))
    with pytest.raises(ValueError, match=r"top_p"):
        mixed(run, 1, 0.2)
    with pytest.raises(ValueError, match="reads at most 32"):
        mixed(world.world(sampling=Sampling(max_new_tokens=40)), 1, 0.2)
