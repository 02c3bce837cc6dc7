"""Invariants of PACED: weights by pass rate, who is skipped, and which divergence when."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from world import Verdict, policy, prompts, step_gradient, world

from surpass.methods.gkd import GKD
from surpass.methods.paced import PACED
from surpass.methods.run import Run
from surpass.methods.supervised_kd import SupervisedKD
from surpass.prompts.stream import PromptStream
from surpass.records import Prompt
from surpass.rollout.engine import Sampling

UNWEIGHED: dict[str, Any] = {"alpha": 0.0, "beta": 0.0}
# Right answers out of 4 to each prompt of `a_run`: never, always, and three in between.
RIGHT = {"p0": 0, "p1": 4, "p2": 1, "p3": 2, "p4": 3}
RATES = {k: v / 4 for k, v in RIGHT.items()}


class Counting:
    """Judges the first so many answers to each prompt right, whatever they say."""

    def __init__(self, right: dict[str, int]) -> None:
        self.right, self.calls = dict(right), 0

    def __call__(self, prompts: Any, completions: Any, completion_ids: object = None) -> Verdict:
        del completions, completion_ids
        self.calls += 1
        seen: dict[str, int] = {}
        rewards = []
        for prompt in prompts:
            seen[prompt.id] = seen.get(prompt.id, 0) + 1
            rewards.append(float(seen[prompt.id] <= self.right[prompt.id]))
        return Verdict(torch.tensor(rewards), {}, {})


def a_run(right: dict[str, int] | None = None, **changes: Any) -> Run:
    pool = prompts(5, response="ab", privileged={"solution": "ba"})
    judge: Any = Counting(right or RIGHT)
    return world(
        [[0, 1, 3], [2, 3]],
        judge=judge,
        stream=PromptStream(pool, shuffle=False),
        sampling=Sampling(max_new_tokens=4),
        **{"steps": 4, **changes},
    )


def paced(**changes: Any) -> PACED:
    return PACED(**{"pass_rate_samples": 4, **changes})


def prepared(run: Run, method: PACED) -> PACED:
    method.prepare(run)
    return method


# -- weights ----------------------------------------------------------------------------------------------------------


def test_rates_are_counted_over_every_prompt_and_weights_have_mean_one():
    run = a_run()
    method = prepared(run, paced())
    assert method.rates == RATES
    weights = dict(zip(RATES, method.weights(list(RATES)), strict=True))
    assert weights["p0"] == weights["p1"] == 0.0
    positive = [w for w in weights.values() if w > 0]
    assert sum(positive) / len(positive) == pytest.approx(1.0)
    assert weights["p3"] / weights["p2"] == pytest.approx(0.25 / 0.1875)
    assert weights["p2"] == weights["p4"]
    assert run.metrics["pass_rate"] == pytest.approx(0.5) and run.metrics["prompts_kept"] == pytest.approx(
        0.6
    )
    assert run.tokens["generated"] == 4 * 3 * 2 + 4 * 2 * 2 + (3 + 3 + 2 + 2)


@pytest.mark.parametrize(("alpha", "beta", "best"), [(3.0, 1.0, "p4"), (1.0, 3.0, "p2"), (1.0, 1.0, "p3")])
def test_the_exponents_favour_easier_or_harder_prompts(alpha, beta, best):
    method = prepared(a_run(), paced(alpha=alpha, beta=beta))
    weights = dict(zip(RATES, method.weights(list(RATES)), strict=True))
    assert max(weights, key=lambda k: weights[k]) == best


def test_smoothing_gives_nobody_up():
    run = a_run()
    method = prepared(run, paced(smooth=True))
    assert method.rates["p0"] == 0.1 and method.rates["p1"] == 0.9
    assert all(w > 0 for w in method.weights(list(RATES)))
    assert run.metrics["prompts_kept"] == 1.0


def test_prompts_nobody_could_judge_are_skipped():
    run = a_run()
    method = prepared(run, paced())
    del method.rates["p3"]
    assert method.weights(["p3", "p2"])[0] == 0.0


def test_nothing_left_to_learn_from_is_an_error_in_words():
    run = a_run({k: 4 * (v > 2) for k, v in RIGHT.items()})
    with pytest.raises(ValueError, match=r"none of 5 prompts .* method\.smooth true"):
        prepared(run, paced())


# -- a step -----------------------------------------------------------------------------------------------------------


def test_prompts_of_weight_zero_are_replaced_by_the_next_ones():
    run = a_run()
    method = prepared(run, paced())
    assert run.stream is not None
    batch = method.collect(run, run.stream.next(3))
    # p0 and p1 of the first three are skipped; p3 and p4 come in their place.
    assert [p.id for p in batch.prompts] == ["p2", "p3", "p4"]
    assert run.stream.drawn == {"": 5}
    torch.testing.assert_close(batch.sequence["weight"], torch.tensor(method.weights(["p2", "p3", "p4"])))
    assert float(batch.sequence["weight"].mean()) == pytest.approx(1.0)


@pytest.mark.parametrize("forward_share", [1.0, 0.0])
def test_the_gradient_is_the_weighted_mean_of_the_prompts_own(forward_share):
    run = a_run()
    method = prepared(run, paced(forward_share=forward_share))
    batch = method.collect(run, prompts(5, response="ab")[2:])
    plain = dataclasses.replace(method, **UNWEIGHED)
    bare = dataclasses.replace(batch, sequence={})
    expected = torch.stack(
        [
            weight * step_gradient(run, plain, bare.select(torch.tensor([row])))
            for row, weight in enumerate(batch.sequence["weight"])
        ]
    ).mean(0)
    torch.testing.assert_close(step_gradient(run, method, batch), expected, rtol=2e-4, atol=2e-5)
    assert float(batch.sequence["weight"].std()) > 0.1


def test_without_exponents_it_is_plain_distillation_bit_for_bit_and_estimates_nothing():
    run = a_run()
    given = prompts(3, response="ab")
    forward, reverse = paced(**UNWEIGHED), paced(**UNWEIGHED, forward_share=0.0)
    assert not forward.needs().reward and not forward.needs().rollouts
    for method, base in (
        (forward, SupervisedKD()),
        (reverse, GKD(divergence="reverse_kl")),
    ):
        prepared(run, method)
        found, expected = (step_gradient(run, m, m.collect(run, given)) for m in (method, base))
        assert torch.equal(found, expected) and bool(found.any())
    assert run.judge is not None and run.judge.calls == 0  # type: ignore[attr-defined]


def test_forward_first_then_reverse():
    run = a_run()
    method = paced(**UNWEIGHED, forward_share=0.5)
    seen = []
    for step in range(4):
        run.step = step
        batch = method.collect(run, prompts(2, response="ab"))
        (term,) = method.loss(run, batch).terms
        seen.append((term.name, term.stream))
    assert seen == [("forward_kl", "data")] * 2 + [("reverse_kl", "student")] * 2


@pytest.mark.parametrize(
    ("changes", "shares"),
    [
        ({}, 1.0),
        ({"track": "self_distillation"}, 0.0),
        ({"track": "self_distillation", "forward_share": 0.5}, 0.5),
    ],
    ids=str,
)
def test_each_track_has_its_own_stage(changes, shares):
    method = paced(**changes)
    assert method.share_forward == shares
    needs = method.needs()
    assert needs.teacher and needs.reward and needs.rollouts
    assert needs.response == (shares > 0)
    assert ("teacher" in method.roles()) == ("track" in changes)


def test_the_teacher_may_write_the_text():
    run = a_run(teacher_answers=[[1, 1, 3]])
    method = paced(**UNWEIGHED, text="teacher", samples=2)
    batch = method.collect(run, prompts(2))
    (term,) = method.loss(run, batch).terms
    assert term.stream == "teacher" and len(batch) == 4


# -- memory -----------------------------------------------------------------------------------------------------------


def test_rates_are_estimated_once_unless_refreshed_and_survive_a_resume():
    run = a_run()
    once, renewed = (prepared(run, paced(refresh=r)) for r in (None, 2))
    later = a_run({"p0": 2, "p1": 2, "p2": 0, "p3": 4, "p4": 1})
    for step in (1, 2):
        later.step = step
        for method in (once, renewed):
            method.collect(later, prompts(5, response="ab")[2:])
        assert once.rates == RATES
        assert (renewed.rates == RATES) == (step == 1)
    assert renewed.rates["p0"] == 0.5
    again = paced(refresh=2)
    again.load_state_dict(json.loads(json.dumps(renewed.state_dict())))
    assert again.rates == renewed.rates
    ids = list(RATES)
    assert again.weights(ids) == renewed.weights(ids)


def test_another_teacher_another_gradient():
    method = prepared(a_run(), paced())
    given = prompts(5, response="ab")[2:]
    first, second = (
        step_gradient(run, method, method.collect(run, given)) for run in (a_run(), a_run(teacher=policy(5)))
    )
    assert float((first - second).norm()) > 0.05 * float(first.norm())


def test_the_ground_truth_is_read_by_the_self_teacher_alone():
    from surpass.prompts.views import View
    from surpass.roles.role import Role, snapshot

    run = a_run()
    (spec,) = paced(track="self_distillation").roles().values()
    assert spec.source == "initial" and spec.view == "solution"
    run.teachers = {
        "default": Role("teacher", snapshot(run.student), View("solution", "{problem}{solution}"))
    }
    method = prepared(run, paced(track="self_distillation"))

    def collected(solution: str) -> Any:
        given: list[Prompt] = prompts(5, privileged={"solution": solution})[2:]
        return method.collect(run, given)

    one, other = collected("ba"), collected("cc")
    assert torch.equal(one.prompt_ids.values, other.prompt_ids.values)
    assert not torch.equal(step_gradient(run, method, one), step_gradient(run, method, other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": -1.0}, "at least 0"),
        ({"forward_share": 1.5}, "share of the steps"),
        ({"pass_rate_samples": 0}, "at least 1"),
        ({"refresh": 0}, "at least 1"),
        ({"samples": 2}, "has one response"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        PACED(**changes)
