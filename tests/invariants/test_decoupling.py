"""Decoupling: the direction of KL and the source of the text are independent, and the length follows the entropy."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from tabular import PRINTED, STUDENT, TEACHER, at_root, tabular
from world import (
    CLOSE,
    PROMPT,
    distributions,
    every_answer,
    expected_gradient,
    gradient,
    policy,
    probability,
    prompts,
    rollouts,
    step_gradient,
    token_logp,
    world,
)

from surpass.learn.divergence import entropy, forward_kl, reverse_kl
from surpass.methods.decoupling import Decoupling
from surpass.methods.run import Run
from surpass.methods.supervised_kd import SupervisedKD
from surpass.records import Author, Rollouts
from surpass.roles.scoring import Want

CELLS = list(product(("student", "teacher", "data"), ("forward", "reverse")))
AUTHOR = {"student": Author.STUDENT, "teacher": Author.TEACHER, "data": Author.DATA}
ANSWERS = every_answer(2)
GIVEN = [[0, 1, 3], [2, 3]]


def scored(run: Run, batch: Rollouts) -> Rollouts:
    return run.score(batch, "teacher", Want(logp=False, hidden=True))


def at_fixture(**settings: Any) -> torch.Tensor:
    run = world([[0]], student=tabular(STUDENT), teacher=tabular(TEACHER))
    method = Decoupling(**settings)
    batch = scored(run, rollouts(run, [[2]], author=AUTHOR[method.prefix]))
    return at_root(gradient(run.student, method.loss(run, batch).terms[0].values.sum()))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"divergence": "forward"}, [-0.2, 0.1, 0.1]),
        ({"divergence": "reverse"}, [-0.214253, 0.094030, 0.120223]),
        ({"reverse_share": 0.5}, [-0.207127, 0.097015, 0.110112]),
        ({}, [-0.203563, 0.098508, 0.105056]),
    ],
    ids=str,
)
def test_hand_checked_gradients(settings: dict[str, Any], expected: list[float]):
    torch.testing.assert_close(at_fixture(**settings), torch.tensor(expected), **PRINTED)


@pytest.mark.parametrize(("share", "pure"), [(0.0, "forward"), (1.0, "reverse")])
def test_the_ends_of_the_mixture_are_the_pure_directions_bit_for_bit(share: float, pure: Any):
    assert torch.equal(at_fixture(reverse_share=share), at_fixture(divergence=pure))


@pytest.mark.parametrize(("prefix", "direction"), CELLS, ids=str)
def test_every_cell_is_its_direction_on_its_own_text(prefix: Any, direction: Any):
    run = world(GIVEN, teacher_answers=[[1, 2, 3], [0, 0]])
    asked = prompts(2, response="bc")
    batch = Decoupling(prefix=prefix, divergence=direction).collect(run, asked)
    written = {"student": GIVEN, "teacher": [[1, 2, 3], [0, 0]], "data": [[1, 2, 3]] * 2}[prefix]
    assert batch.response.tolist() == written
    assert set(batch.author.tolist()) == {int(AUTHOR[prefix])}
    student = distributions(run.student, batch)
    teacher = distributions(run.teachers["default"].policy, batch).detach()
    kl = (forward_kl if direction == "forward" else reverse_kl)(student, teacher)
    found = step_gradient(run, Decoupling(prefix=prefix, divergence=direction), batch)
    torch.testing.assert_close(found, gradient(run.student, kl.mean()), **CLOSE)


@pytest.mark.parametrize(("prefix", "direction"), CELLS, ids=str)
def test_another_teacher_another_gradient(prefix: Any, direction: Any):
    method, found = Decoupling(prefix=prefix, divergence=direction), []
    for teacher in (policy(1), policy(2), policy(0)):
        run = world(GIVEN, teacher=teacher)
        found.append(step_gradient(run, method, method.collect(run, prompts(2, response="bc"))))
    assert float((found[0] - found[1]).norm()) > 0.1 * float(found[0].norm())
    assert float(found[2].norm()) < 1e-4 * float(found[0].norm())


def test_the_source_changes_the_text_and_nothing_else():
    run = world(GIVEN)
    found = []
    for prefix in ("student", "teacher", "data"):
        batch = scored(run, rollouts(run, GIVEN, prompts(2), author=AUTHOR[prefix]))
        found.append(step_gradient(run, Decoupling(prefix=prefix), batch))  # type: ignore[arg-type]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_forward_kl_on_the_teachers_text_is_sft_on_it_in_expectation():
    run = world()
    batch = scored(run, rollouts(run, ANSWERS, author=Author.TEACHER))
    weight = probability(run.teachers["default"].policy, batch)
    soft = expected_gradient(run, Decoupling(prefix="teacher", divergence="forward"), batch, weight)
    hard = gradient(run.student, (batch.ragged(-token_logp(run.student, batch)).sum() * weight).sum())
    torch.testing.assert_close(soft, hard, **CLOSE)


def test_forward_on_data_is_supervised_distillation_bit_for_bit():
    run = world(GIVEN)
    method, other = Decoupling(prefix="data", divergence="forward"), SupervisedKD(reduction="token_mean")
    asked = prompts(2, response="bc")
    one, two = (step_gradient(run, m, m.collect(run, asked)) for m in (method, other))
    assert torch.equal(one, two)


# -- the length curriculum --------------------------------------------------------------------------------------


def gated(floor: float, **settings: Any) -> Decoupling:
    return Decoupling(caps=[1, 2, 4], stage_steps=2, entropy_floor=floor, **settings)


def walk(method: Decoupling, steps: int) -> list[float]:
    run = world([[0, 0, 0, 0]])
    caps = []
    for step in range(steps):
        run.step = step
        run.metrics.clear()
        method.collect(run, [PROMPT])
        caps.append(run.metrics["curriculum/cap"])
    return caps


def test_the_ladder_is_climbed_while_the_entropy_lasts():
    assert walk(gated(0.0), 7) == [1, 1, 2, 2, 4, 4, 4]


def test_below_the_floor_it_never_advances():
    method = gated(10.0)
    assert walk(method, 7) == [1] * 7
    assert method.stopped


def test_the_gate_is_the_mean_token_entropy_of_the_students_batch():
    run = world([[0, 0, 0, 0]])
    batch = rollouts(run, [[0, 0, 0, 0]])
    exact = float(entropy(distributions(run.student, batch).detach()).mean())
    for floor, stage in ((exact - 1e-3, 1), (exact + 1e-3, 0)):
        method = Decoupling(caps=[1, 4], stage_steps=1, entropy_floor=floor)
        method.gate(run, batch)
        assert method.stage == stage
        assert run.metrics["curriculum/entropy"] == pytest.approx(exact, rel=1e-4)


def test_the_cap_reaches_whoever_writes():
    seen: list[int] = []
    for prefix in ("student", "teacher"):
        run = world([[0, 0, 0, 0]])
        watch(run.engine, seen)
        factory = run.engine_for
        assert factory is not None
        run.engine_for = lambda writer, factory=factory: watch(factory(writer), seen)
        gated(0.0, prefix=prefix).collect(run, [PROMPT])
    assert seen == [1, 1]
    run = world([[0, 0, 0, 0]])
    data = gated(0.0, prefix="data").collect(run, [replace(PROMPT, response="bcbc")])
    assert data.lengths.tolist() == [1]


def watch(engine: Any, seen: list[int]) -> Any:
    write = engine.generate

    def generate(prompt_ids: Any, n: int, sampling: Any, *rest: Any) -> Any:
        seen.append(sampling.max_new_tokens)
        return write(prompt_ids, n, sampling, *rest)

    engine.generate = generate
    return engine


def test_the_curriculum_goes_on_where_it_was():
    for steps in range(7):
        whole, first = gated(0.0), gated(0.0)
        expected = walk(whole, 7)
        before = walk(first, steps)
        second = gated(0.0)
        second.load_state_dict(first.state_dict())
        assert before + walk(second, 7 - steps) == expected
    stopped = gated(10.0)
    walk(stopped, 3)
    again = gated(0.0)
    again.load_state_dict(stopped.state_dict())
    assert walk(again, 4) == [1] * 4


def test_without_a_ladder_there_is_no_state_and_no_metric():
    run = world(GIVEN)
    method = Decoupling()
    method.collect(run, prompts(2))
    assert method.state_dict() == {} and not run.metrics
    with pytest.raises(ValueError, match="keeps no state"):
        method.load_state_dict({"stage": 1})


def test_errors_in_words():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"divergence": "forward", "reverse_share": 0.5}, "leave it null"),
        ({"reverse_share": 1.5}, r"\[0, 1\]"),
        ({"prefix": "data", "samples": 2}, "one response"),
        ({"caps": [1, 2]}, "together"),
        ({"entropy_floor": 1.0}, "together"),
        ({"caps": [2, 2], "stage_steps": 1, "entropy_floor": 1.0}, "must rise"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            Decoupling(**settings)
    with pytest.raises(ValueError, match=r"rollout\.max_new_tokens is 3"):
        gated(0.0).collect(world([[0, 1, 3]]), [PROMPT])
