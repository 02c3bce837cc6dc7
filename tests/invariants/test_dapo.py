"""DAPO (arXiv 2503.14476): dynamic sampling, overlong answers, clip-higher."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from grouped import judged, off_policy, token_gradients
from world import CLOSE, Scripted, prompts, step_gradient, world

from surpass.methods.dapo import DAPO
from surpass.methods.grpo import GRPO
from surpass.records import Prompt
from surpass.rollout.engine import Sampling

RIGHT, WRONG = [1, 3], [2]


class Stream:
    """Prompts without end, each with an id of its own."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def next(self, count: int) -> list[Prompt]:
        self.asked.append(count)
        return [dataclasses.replace(p, id=f"fresh-{len(self.asked)}-{p.id}") for p in prompts(count)]


def dapo(groups: list[str], *, stream: bool = True, **settings: Any):
    """A run whose groups of two come out as told (`rw`: one right, one wrong), again and again."""
    answers = [{"r": RIGHT, "w": WRONG}[c] for group in groups for c in group]
    fresh: Any = Stream() if stream else None
    run = world(
        answers,
        reward=lambda text: float(text.startswith("b")),
        stream=fresh,
        sampling=Sampling(max_new_tokens=10),
    )
    return run, DAPO(samples=2, **settings)


def test_groups_without_signal_are_replaced_until_there_are_enough():
    run, method = dapo(["rr", "rw"])
    batch = method.collect(run, prompts(2))
    assert [p.id for p in batch.prompts] == ["p1", "p1", "fresh-1-p1", "fresh-1-p1"]
    assert len(batch.group.unique()) == 2
    assert run.metrics["dynamic_sampling/prompts_drawn"] == 4
    assert run.metrics["dynamic_sampling/groups_kept"] == 2
    assert bool((batch.sequence["advantage"] != 0).all())


def test_surplus_groups_are_discarded():
    run, method = dapo(["rw", "ww", "wr"])
    batch = method.collect(run, prompts(3))
    assert list(dict.fromkeys(p.id for p in batch.prompts)) == ["p0", "p2", "fresh-1-p0"]
    assert len(batch) == 6
    assert run.metrics["dynamic_sampling/groups_kept"] == 3


def test_a_full_batch_draws_nothing_more():
    run, method = dapo(["rw", "wr"])
    assert len(method.collect(run, prompts(2))) == 4
    stream: Any = run.stream
    assert stream.asked == []


def test_drawing_ends_after_the_allowed_rounds_with_what_there_is():
    run, method = dapo(["rr", "ww", "rw"], refill=1)
    batch = method.collect(run, prompts(3))
    stream: Any = run.stream
    assert stream.asked == [3]
    assert len(batch.group.unique()) == 2


def test_nothing_to_learn_from_is_an_error_in_words():
    run, method = dapo(["rr", "ww"], refill=2)
    with pytest.raises(ValueError, match="no group out of 6 had both right and wrong answers"):
        method.collect(run, prompts(2))


def test_no_stream_to_draw_from_is_an_error_in_words():
    run, method = dapo(["rr", "rw"], stream=False)
    with pytest.raises(ValueError, match=r"no prompt stream; set method\.refill 0"):
        method.collect(run, prompts(2))


def test_refill_zero_keeps_every_group():
    run, method = dapo(["rr", "rw"], refill=0, overlong="none")
    batch = method.collect(run, prompts(2))
    assert len(batch) == 4
    assert batch.sequence["advantage"].tolist()[:2] == [0.0, 0.0]


def test_the_length_penalty_alone_does_not_keep_a_group():
    run, method = dapo(["rw"], refill=2)
    run.engine = Scripted(run.student, [[1] * 9, [1] * 10])  # both right, with different penalties
    with pytest.raises(ValueError, match="no group out of 3"):
        method.collect(run, prompts(1))


def penalised(length: int, **settings: Any) -> tuple[float, float]:
    run, method = dapo(["rw"], refill=0, **settings)
    run.engine = Scripted(run.student, [[1] * length, WRONG])
    batch = method.collect(run, prompts(1))
    assert batch.reward is not None
    return float(batch.reward[0]), float(
        batch.components["overlong"][0]
    ) if "overlong" in batch.components else 0.0


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0.0), (5, 0.0), (6, 0.0), (7, -0.25), (8, -0.5), (9, -0.75), (10, -1.0)]
)
def test_soft_overlong_penalty(length, penalty):
    assert penalised(length, overlong_buffer=0.4) == pytest.approx((1.0 + penalty, penalty))


@pytest.mark.parametrize("overlong", ["none", "filter"])
def test_no_penalty_unless_asked_for(overlong):
    assert penalised(10, overlong=overlong) == (1.0, 0.0)


def test_filter_leaves_truncated_answers_out_of_the_loss_but_in_the_statistics():
    run = world()
    answers, rewards = [[0, 3], [1, 1], [2, 3], [0, 0]], [1.0, 0.0, 0.0, 1.0]
    method = DAPO(overlong="filter")
    batch = judged(run, method, answers, rewards)  # answers without EOS (3) were cut off
    assert batch.ragged(batch.mask("trained")).sum().tolist() == [2, 0, 2, 0]
    everything = judged(run, DAPO(), answers, rewards)
    assert torch.equal(batch.sequence["advantage"], everything.sequence["advantage"])
    expected = step_gradient(run, DAPO(), everything.select(torch.tensor([0, 2])))
    torch.testing.assert_close(step_gradient(run, method, batch), expected, **CLOSE)


def test_clip_higher_lets_ratios_rise_further_than_fall():
    run, method = world(), DAPO(sampler_cap=None)
    ratios = [1.25, 1.3, 0.75, 0.85, 9.9, 10.1]
    rewards = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    batch = judged(run, method, [[0]] * 6, rewards)
    batch = off_policy(run, batch, torch.tensor(ratios).log())
    assert (token_gradients(run, method, batch) == 0).tolist() == [False, True, True, False, False, True]


def test_with_its_own_parts_off_it_is_grpo_with_token_mean():
    run = world()
    shared: dict[str, Any] = {"clip_high": 0.2, "dual_clip": 3.0}
    method = DAPO(**shared, overlong="none", refill=0)
    grpo = GRPO(**shared, reduction="token_mean")
    answers, rewards = [[0, 1], [1], [2, 3]], [1.0, 0.0, 0.0]
    found = step_gradient(run, method, judged(run, method, answers, rewards))
    assert torch.equal(found, step_gradient(run, grpo, judged(run, grpo, answers, rewards)))


def test_an_unjudged_answer_does_not_decide_about_its_group():
    stream: Any = Stream()
    run = world(
        [RIGHT, WRONG, RIGHT, [3]],
        reward=lambda text: math.nan if not text else float(text.startswith("b")),
        stream=stream,
    )
    batch = DAPO(samples=2, refill=1).collect(run, prompts(2))
    assert [p.id for p in batch.prompts] == ["p0", "p0", "fresh-1-p0", "fresh-1-p0"]
