"""GSPO (arXiv 2507.18071): one ratio per answer."""

import pytest
import torch
from grouped import judged, off_policy
from world import CLOSE, gradient, step_gradient, token_logp, world

from surpass.methods.grpo import GRPO
from surpass.methods.gspo import GSPO

ANSWERS = [[0, 1], [1], [2, 0], [0, 3], [3], [1, 2]]
REWARDS = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
LOG_RATIO = torch.tensor([0.3, -0.1, 0.2, 0.05, -0.4, 0.25, 0.15, 0.02, -0.3, 0.1])


@pytest.mark.parametrize("clip", [3e-4, 0.15, 10.0])
def test_token_form_is_the_sequence_form(clip):
    run = world()
    method = GSPO(clip_low=min(clip, 0.99), clip_high=clip, sampler_cap=None)
    batch = off_policy(run, judged(run, method, ANSWERS, REWARDS), LOG_RATIO)
    old, advantage = batch.scores["old"].logp, batch.sequence["advantage"]
    assert old is not None
    ratio = batch.ragged(token_logp(run.student, batch) - old).mean().exp()
    bounded = ratio.clamp(1 - min(clip, 0.99), 1 + clip)
    values = torch.maximum(-advantage * ratio, -advantage * bounded)
    torch.testing.assert_close(
        step_gradient(run, method, batch), gradient(run.student, values.mean()), **CLOSE
    )
    per_answer = batch.ragged(method.loss(run, batch).terms[0].values).mean()
    torch.testing.assert_close(per_answer, values, rtol=1e-5, atol=1e-6)


def test_an_answer_is_clipped_as_a_whole():
    run, method = world(), GSPO(clip_low=0.1, clip_high=0.1, sampler_cap=None)
    batch = off_policy(run, judged(run, method, ANSWERS, REWARDS), LOG_RATIO)
    ratio = batch.ragged(LOG_RATIO).mean().exp()
    advantage = batch.sequence["advantage"]
    expected = ((advantage > 0) & (ratio > 1.1)) | ((advantage < 0) & (ratio < 0.9))
    assert 0 < int(expected.sum()) < len(expected)
    clipped = method.loss(run, batch).metrics["clip_ratio"].bool()
    assert torch.equal(clipped, batch.response.expand(expected))


def test_differs_from_grpo_off_policy():
    run = world()
    gspo, grpo = GSPO(clip_low=0.9, clip_high=9.0), GRPO(clip_low=0.9, clip_high=9.0, dual_clip=None)
    batch = off_policy(run, judged(run, gspo, ANSWERS, REWARDS), LOG_RATIO)
    first, second = step_gradient(run, gspo, batch), step_gradient(run, grpo, batch)
    assert float((first - second).norm()) > 0.02 * float(first.norm())


def test_the_ratio_is_averaged_over_trained_tokens_alone():
    run, method = world(), GSPO(clip_low=0.9, clip_high=9.0, sampler_cap=None)
    batch = off_policy(run, judged(run, method, ANSWERS, REWARDS), LOG_RATIO)
    trained = batch.mask("trained").clone()
    trained[0] = False
    values = method.loss(run, batch.with_(masks={"trained": trained})).terms[0].values
    expected = -batch.sequence["advantage"][0] * LOG_RATIO[1].exp()
    torch.testing.assert_close(values[1].detach(), expected, rtol=1e-5, atol=1e-6)


def test_a_dual_clip_is_refused():
    with pytest.raises(ValueError, match="no dual clip"):
        GSPO(dual_clip=3.0)
