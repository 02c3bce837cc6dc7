"""Invariants of SOD: the weights of steps, what they leave alone, and the methods it contains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import world
from hypothesis import given
from hypothesis import strategies as st

from surpass.methods.grpo import GRPO
from surpass.methods.opd import OPD
from surpass.methods.run import Run
from surpass.methods.sod import SOD, Weighting, step_weights, steps_of
from surpass.models.policy import Policy
from surpass.records import Author, Ragged, Rollouts, Scores
from surpass.rollout.engine import Sampling

DISTANCES = st.lists(st.floats(0.01, 5.0), min_size=1, max_size=6)
# What SOD changes of GRPO's defaults beside the teacher's signal.
SHARED: dict[str, Any] = {"samples": 4, "reduction": "token_mean", "clip_high": 0.28}
ANSWERS = [[0, 1, 3], [2, 0, 1, 3], [1, 3], [0, 0, 2, 1, 1]]
REWARDS = [1.0, 0.0, 0.5, 1.0]
S, T = int(Author.STUDENT), int(Author.TOOL)
# Who wrote each token of ANSWERS: rows of two, two, one and three steps.
AUTHORS = [[S, T, S], [S, S, T, S], [S, S], [S, T, S, T, S]]
ENVIRONMENT = """
from surpass.judge.environments import Step

class Twice:
    def reset(self, prompt):
        self.count = 0
        return None

    def step(self, action):
        self.count += 1
        return Step("ba", done=self.count == 2)
"""


def weights(
    distances: list[float],
    bound: float = 0.2,
    epsilon: float = 1e-12,
    weighting: Weighting = "telescoped",
) -> list[float]:
    """One row whose step `k` has two tokens, `distances[k]` away on average, with a tool's token in between."""
    distance, written = [], []
    for d in distances:
        distance += [0.5 * d, 1.5 * d, 9.0]
        written += [True, True, False]
    steps = steps_of(Ragged.from_list([torch.tensor(written)]))
    found = step_weights(torch.tensor(distance, dtype=torch.float64), steps, bound, epsilon, weighting)
    assert bool((found[2::3] == 0).all()) and torch.equal(found[0::3], found[1::3])
    return found[0::3].tolist()


def test_the_example_of_the_formula():
    assert weights([0.4, 0.2, 0.8]) == pytest.approx([1.0, 1.2, 0.5])
    assert weights([0.4, 0.2, 0.8], weighting="none") == [1.0, 1.0, 1.0]


def test_clipping_every_product_forgets_what_was_cut_off():
    assert weights([0.4, 0.1, 0.4]) == pytest.approx([1.0, 1.2, 1.0])
    assert weights([0.4, 0.1, 0.4], weighting="clipped") == pytest.approx([1.0, 1.2, 0.3])


@given(DISTANCES)
def test_the_product_telescopes(distances: list[float]):
    assert weights(distances) == pytest.approx([min(distances[0] / d, 1.2) for d in distances])


@given(st.floats(0.01, 5.0), st.integers(1, 6), st.sampled_from(["telescoped", "clipped"]))
def test_a_constant_distance_leaves_every_step_alone(distance: float, steps: int, weighting: Weighting):
    assert weights([distance] * steps, weighting=weighting) == pytest.approx([1.0] * steps)


@given(DISTANCES, st.floats(0.1, 10.0))
def test_weights_do_not_depend_on_the_scale(distances: list[float], scale: float):
    assert weights([scale * d for d in distances]) == pytest.approx(weights(distances), rel=1e-6)


@given(DISTANCES, st.randoms())
def test_the_order_of_later_steps_is_their_own_business(distances: list[float], random: Any):
    order = list(range(1, len(distances)))
    random.shuffle(order)
    found = weights([distances[0], *(distances[i] for i in order)])
    expected = weights(distances)
    assert found == pytest.approx([1.0, *(expected[i] for i in order)])


def test_steps_are_runs_of_the_student_s_tokens():
    written = Ragged.from_list([torch.tensor([a == S for a in row]) for row in AUTHORS])
    found = steps_of(written)
    assert found.tolist() == [[0, -1, 1], [0, 0, -1, 1], [0, 0], [0, -1, 1, -1, 2]]
    turn = torch.tensor([0, 0, 1, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 2])
    assert steps_of(written, turn).tolist() == [[0, -1, 1], [0, 1, -1, 2], [0, 0], [0, -1, 1, -1, 2]]


# -- in a run -------------------------------------------------------------------------------------------------------


def batch_of(run: Run, method: SOD | GRPO, several: bool = True) -> Rollouts:
    """Judged and graded answers: of several steps, or of one."""
    batch = world.rollouts(run, ANSWERS).with_(reward=torch.tensor(REWARDS))
    if several:
        author = torch.tensor([a for row in AUTHORS for a in row], dtype=torch.int8)
        unknown = torch.full_like(batch.sampler_logp, torch.nan)
        batch = replace(
            batch, author=author, sampler_logp=torch.where(author == S, batch.sampler_logp, unknown)
        )
    return run.score(method.with_advantage(batch), "teacher")


@pytest.mark.parametrize("several", [True, False])
def test_without_the_teacher_it_is_grpo(several: bool):
    run = world.world()
    sod, grpo = SOD(distillation=0.0, **SHARED), GRPO(**SHARED)
    batch = batch_of(run, grpo, several)
    assert torch.equal(world.step_gradient(run, sod, batch), world.step_gradient(run, grpo, batch))
    assert not sod.needs().teacher and SOD().needs().teacher


def test_of_one_step_it_is_grpo_plus_opd():
    """On the weights that wrote the answers the gradient is linear in the advantage."""
    run = world.world()
    sod, grpo = SOD(distillation=0.7, **SHARED), GRPO(**SHARED)
    batch = batch_of(run, sod, several=False)
    expected = world.step_gradient(run, grpo, batch) + 0.7 * world.step_gradient(run, OPD(), batch)
    torch.testing.assert_close(world.step_gradient(run, sod, batch), expected, **world.CLOSE)


def test_several_steps_are_weighed():
    run = world.world()
    batch = batch_of(run, SOD(**SHARED))
    weighed, plain = (
        world.step_gradient(run, SOD(weighting=w, **SHARED), batch) for w in ("telescoped", "none")
    )
    assert (weighed - plain).norm() > 0.01 * plain.norm()


def test_a_teacher_that_agrees_leaves_grpo():
    run = world.world()
    logp = world.token_logp(run.student, batch := batch_of(run, SOD(**SHARED)))
    agreed = batch.with_(scores={"teacher": Scores(logp=logp.detach())})
    found, metrics = SOD(**SHARED).token_advantage(agreed, logp)
    assert torch.equal(found, batch.response.expand(batch.sequence["advantage"]))
    assert torch.equal(metrics["step_weight"], batch.mask("student").float())


def test_observations_are_not_trained_and_do_not_count():
    """Whatever the teacher says of a tool's tokens, and wherever they lie, the gradient is the same."""
    run = world.world()
    method = SOD(**SHARED)
    batch = batch_of(run, method)
    grades = batch.scores["teacher"].logp
    assert grades is not None
    other = torch.where(batch.mask("tool"), grades - 5.0, grades)
    changed = batch.with_(scores={"teacher": Scores(logp=other)})
    first, second = (world.step_gradient(run, method, b) for b in (batch, changed))
    assert torch.equal(first, second) and bool(first.isfinite().all()) and first.norm() > 0


def test_the_weights_are_those_before_the_first_update():
    run = world.world()
    method = SOD(**SHARED)
    batch = batch_of(run, method)
    before = world.token_logp(world.policy(3), batch).detach()
    stale = batch.with_(scores={"old": Scores(logp=before)})
    advantage, metrics = method.token_advantage(stale, world.token_logp(run.student, batch))
    assert batch.scores["teacher"].logp is not None
    ratio = batch.scores["teacher"].logp - before
    steps = steps_of(batch.ragged(batch.mask("student")))
    weight = step_weights(ratio.abs(), steps, 0.2, 1e-6)
    expected = batch.response.expand(batch.sequence["advantage"]) + weight * ratio
    own = batch.mask("student")
    assert torch.equal(advantage[own], expected[own]) and torch.equal(metrics["step_weight"], weight)
    assert not advantage.requires_grad


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_the_gradient_does_not_depend_on_micro_batches(micro: int):
    run = world.world()
    method = SOD(**SHARED)
    batch = batch_of(run, method)
    expected = world.step_gradient(run, method, batch)
    torch.testing.assert_close(world.step_gradient(run, method, batch, micro), expected, **world.CLOSE)


def test_the_teacher_matters():
    found = []
    for seed in (1, 5):
        run = world.world(teacher=world.policy(seed))
        method = SOD(**SHARED)
        found.append(world.step_gradient(run, method, batch_of(run, method)))
    assert (found[0] - found[1]).norm() > 0.01 * found[0].norm()


@pytest.fixture
def twice(tmp_path: Path) -> str:
    (tmp_path / "twice.py").write_text(ENVIRONMENT)
    return f"{tmp_path / 'twice.py'}:Twice"


def scripted(teacher: Policy | None = None, **settings: Any) -> Run:
    """Two answers to one prompt, two turns each: `b` then `c`, `ab` then `b`; the last turn is judged."""
    return world.world(
        [[1, 3], [0, 1, 3], [2, 3], [1, 3]],
        teacher=teacher,
        reward=lambda text: float(text.strip(".") == "c"),
        sampling=Sampling(max_new_tokens=20),
        **settings,
    )


class InOrder(world.Scripted):
    """Goes on in its list of answers from call to call."""

    def generate(self, prompt_ids: Any, n: int, *rest: Any, **more: Any) -> Any:
        count = len(prompt_ids) * n
        found = super().generate(prompt_ids, n, *rest, **more)
        self.answers = [*self.answers[count:], *self.answers[:count]]
        return found


def test_a_whole_step_in_an_environment(twice: str):
    run = scripted()
    run.engine = InOrder(run.student, run.engine.answers)  # type: ignore[attr-defined]
    method = SOD(environment=twice, **{**SHARED, "samples": 2})
    batch = method.collect(run, [world.PROMPT])
    assert [run.student.tokenizer.decode(i) for i in batch.response.tolist()] == ["b.bac.", "ab.bab."]
    assert batch.reward is not None and batch.reward.tolist() == [1.0, 0.0]
    assert batch.sequence["advantage"][0] > 0 > batch.sequence["advantage"][1]
    assert torch.equal(batch.masks["trained"], batch.mask("student"))
    assert run.metrics["turns/mean"] == 2.0 and run.tokens["generated"] == 9
    assert bool(world.step_gradient(run, method, batch).isfinite().all())


def test_prompts_without_environment_are_answered_in_one_turn():
    run = scripted()
    method = SOD(**SHARED)
    batch = method.collect(run, [world.PROMPT])
    assert batch.turn is None and [len(call) for call in run.engine.calls] == [1]  # type: ignore[attr-defined]
    expected = GRPO(**SHARED).collect(scripted(), [world.PROMPT])
    assert torch.equal(batch.sequence["advantage"], expected.sequence["advantage"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"distillation": -1.0},
        {"step_bound": -0.1},
        {"step_epsilon": 0.0},
        {"max_turns": 0},
        {"turn_seconds": 0.0},
    ],
)
def test_settings_without_a_meaning_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=f"method.{next(iter(wrong))}"):
        SOD(**wrong)
