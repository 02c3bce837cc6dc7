"""Invariants of MAD-OPD and OPAD: the weights of the teachers, what their mixture teaches, and who reads the debate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import world
from hypothesis import given
from hypothesis import strategies as st

from surpass.learn.divergence import forward_kl, jsd, reverse_kl
from surpass.methods import debate
from surpass.methods.debate import Debate, confidence_in, confidence_weights
from surpass.methods.gkd import GKD
from surpass.methods.mad_opd import MADOPD, OPAD, repetition
from surpass.methods.run import Run
from surpass.models.policy import Policy
from surpass.records import Prompt, Rollouts
from surpass.roles.role import Role
from surpass.rollout.engine import Sampling

CONFIDENCE = st.floats(0, 100) | st.none()
# Short enough for a world whose models read 32 letters; anything it has no letter for is read as `a`.
SHORT = {"first": "b", "later": "{debate}b", "confidence": "c", "answer": "{debate}c"}
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


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debate, "TEMPLATES", SHORT)
    # The transcript alone, without headings.
    monkeypatch.setattr(
        Debate,
        "transcript",
        property(lambda d: "".join(t for statements in d.statements for t in statements)),
    )


@dataclass
class Speaker(world.Scripted):
    """A teacher's engine that remembers what it was asked."""

    heard: list[str] = field(default_factory=list)

    def generate(self, prompt_ids: Any, n: int, *rest: Any, **more: Any) -> Any:
        self.heard += [str(self.writer.tokenizer.decode(i)) for i in prompt_ids.tolist()]
        return super().generate(prompt_ids, n, *rest, **more)


def run_with(
    teachers: Sequence[Policy] = (),
    says: dict[str, list[list[int]]] | None = None,
    **settings: Any,
) -> tuple[Run, dict[str, Speaker]]:
    """A run with several teachers that nobody routes; each says its own statements."""
    chosen = list(teachers) or [world.policy(1), world.policy(4)]
    speakers = {p.name: Speaker(p, (says or {}).get(p.name, [[1, 2, 3]])) for p in chosen}
    roles = {chr(ord("x") + k): Role(f"teacher/{chr(ord('x') + k)}", p) for k, p in enumerate(chosen)}
    settings.setdefault("sampling", Sampling(max_new_tokens=3))
    return world.world(teachers=roles, engine_for=lambda p: speakers[p.name], **settings), speakers


def graded(
    run: Run, weights: Sequence[float], samples: int = 8
) -> tuple[Rollouts, torch.Tensor, list[torch.Tensor]]:
    """A batch under given weights, and the log-distributions of the student (with gradient) and the teachers."""
    batch = MADOPD(rounds=0, most_repetition=None, samples=samples).collect(run, [world.PROMPT])
    shares = {
        f"weight/{t.name}": torch.full((len(batch),), w) for t, w in zip(run.teachers.values(), weights)
    }
    teachers = [world.distributions(t.policy, batch).detach() for t in run.teachers.values()]
    return batch.with_(sequence=shares), world.distributions(run.student, batch), teachers


# -- weights --------------------------------------------------------------------------------------------------------


@given(st.lists(CONFIDENCE, min_size=1, max_size=4), st.data())
def test_weights_sum_to_one_and_nobody_who_failed_counts(confidences: list[float | None], data: Any):
    spoke = data.draw(st.lists(st.booleans(), min_size=len(confidences), max_size=len(confidences)))
    found = confidence_weights(confidences, spoke)
    assert sum(found) == pytest.approx(1.0) and min(found) >= 0
    if any(spoke):
        assert all(w == 0 for w, heard in zip(found, spoke, strict=True) if not heard)
    else:
        assert found == pytest.approx([1 / len(found)] * len(found))


@given(st.floats(0, 100), st.floats(0, 100))
def test_two_teachers_share_between_27_and_73_percent(one: float, other: float):
    weights = confidence_weights([one, other], [True, True])
    low, high = 1 / (1 + math.e), math.e / (1 + math.e)
    assert all(low - 1e-9 <= w <= high + 1e-9 for w in weights)
    assert weights[0] / weights[1] == pytest.approx(math.exp((one - other) / 100))


@given(st.floats(0, 100), st.integers(1, 4))
def test_equal_confidences_weigh_alike(confidence: float, teachers: int):
    assert confidence_weights([confidence] * teachers, [True] * teachers) == pytest.approx(
        [1 / teachers] * teachers
    )


def test_a_missing_confidence_makes_all_equal_and_temperature_evens_out():
    assert confidence_weights([90.0, None, 10.0], [True] * 3) == pytest.approx([1 / 3] * 3)
    assert confidence_weights([90.0, None, 10.0], [True, False, True])[0] > 0.5
    assert confidence_weights([100.0, 0.0], [True] * 2, 1e6) == pytest.approx([0.5, 0.5], abs=1e-6)
    assert confidence_weights([100.0, 0.0], [True] * 2, 1e-3) == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("it is 3. <<CONFIDENCE=85>>", 85.0),
        ("<<CONFIDENCE=85>> no: << confidence = 62.5% >>", 62.5),
        ("<<CONFIDENCE=101>>", None),
        ("<<CONFIDENCE=-1>>", None),
        ("CONFIDENCE=85", None),
        ("", None),
    ],
)
def test_confidence_tags(text: str, found: float | None):
    assert confidence_in(text) == found


# -- what the mixture teaches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("divergence", "beta"), [("jsd", 0.5), ("reverse_kl", None), ("forward_kl", None)])
def test_one_teacher_without_debate_is_gkd(divergence: Any, beta: float | None):
    gradients = []
    for method in (
        MADOPD(rounds=0, divergence=divergence, beta=beta, most_repetition=None, samples=8),
        GKD(divergence=divergence, beta=beta, samples=8),
    ):
        run = world.world()
        gradients.append(world.step_gradient(run, method, method.collect(run, [world.PROMPT])))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.7)])
def test_the_loss_is_the_weighted_sum_of_divergences(weights: tuple[float, float]):
    run, _ = run_with()
    batch, student, (one, other) = graded(run, weights)
    for name, beta, by_hand in (
        ("jsd", 0.5, lambda t: jsd(student, t, 0.5)),
        ("reverse_kl", None, lambda t: reverse_kl(student, t)),
    ):
        found = MADOPD(divergence=name, beta=beta).loss(run, batch).terms[0].values  # type: ignore[arg-type]
        expected = weights[0] * by_hand(one) + weights[1] * by_hand(other)
        torch.testing.assert_close(found, expected, **world.CLOSE)


def test_forward_kl_teaches_the_arithmetic_mean():
    """`sum_k w_k KL(T_k || S) >= KL(sum_k w_k T_k || S)`, and both have the gradient `S - sum_k w_k T_k`."""
    run, _ = run_with()
    weights = (0.3, 0.7)
    batch, student, (one, other) = graded(run, weights)
    values = MADOPD(divergence="forward_kl", beta=None).loss(run, batch).terms[0].values
    mixture = (weights[0] * one.exp() + weights[1] * other.exp()).log()
    single = forward_kl(student, mixture)
    assert bool((values > single - 1e-5).all()) and float((values - single).detach().max()) > 1e-3
    found, expected = (world.gradient(run.student, v.sum()) for v in (values, single))
    torch.testing.assert_close(found, expected, **world.CLOSE)


def test_reverse_kl_teaches_the_geometric_mean():
    run, _ = run_with()
    weights = (0.3, 0.7)
    batch, student, (one, other) = graded(run, weights)
    values = MADOPD(divergence="reverse_kl", beta=None).loss(run, batch).terms[0].values
    mean = (weights[0] * one + weights[1] * other).log_softmax(-1)
    found, expected = (world.gradient(run.student, v.sum()) for v in (values, reverse_kl(student, mean)))
    torch.testing.assert_close(found, expected, **world.CLOSE)


def test_jsd_is_at_most_ln_2_even_for_teachers_that_are_sure():
    sharp = [world.sharpened(world.policy(seed)) for seed in (1, 4)]
    run, _ = run_with(sharp)
    batch, _, _ = graded(run, (0.5, 0.5))
    values = MADOPD().loss(run, batch).terms[0].values
    assert 0.1 < float(values.detach().max()) <= math.log(2) + 1e-5


@pytest.mark.parametrize("micro", [1, 3])
def test_the_gradient_does_not_depend_on_micro_batches(micro: int):
    run, _ = run_with()
    batch, _, _ = graded(run, (0.3, 0.7))
    method = MADOPD()
    expected = world.step_gradient(run, method, batch)
    torch.testing.assert_close(world.step_gradient(run, method, batch, micro), expected, **world.CLOSE)


# -- the debate -----------------------------------------------------------------------------------------------------


def test_who_reads_what(short: None):
    """Each round shows the earlier ones to all; nobody is shown the student's answer; the student reads its prompt."""
    names = [world.policy(1).name, world.policy(4).name]
    run, speakers = run_with(says={names[1]: [[2, 2, 3]]})
    speakers[names[0]] = InOrder(world.policy(1), [[1, 2, 3], [2, 3]])
    prompt = replace(world.PROMPT, domain="a domain no teacher has")
    batch = MADOPD(samples=2, most_repetition=None).collect(run, [prompt])
    first, second = "bc", "cc"
    assert [_letters(t) for t in speakers[names[0]].heard] == ["ab|b", f"ab|{first}{second}bc"]
    assert [_letters(t) for t in speakers[names[1]].heard] == ["ab|b", f"ab|{first}{second}bc"]
    assert [run.student.tokenizer.decode(i) for i in batch.prompt_ids.tolist()] == ["ab"] * 2
    assert set(run.rendered) == {"p"}
    transcript = f"{first}{second}c{second}"
    for k, name in enumerate(("teacher/x", "teacher/y")):
        read = replace(
            batch,
            prompts=tuple(replace(p, messages=f"ab\n\n{transcript}c\n\n") for p in batch.prompts),
            scores={},
        )
        context = [run.student.tokenizer(str(p.messages))["input_ids"] for p in read.prompts]
        read = replace(read, prompt_ids=type(read.prompt_ids).from_list(context, torch.int64))
        expected = world.distributions(run.role(name).policy, read)
        (part,) = batch.scores[name].hidden
        found = run.role(name).head.logits(part.states).log_softmax(-1)
        torch.testing.assert_close(found, expected, **world.CLOSE)
        assert batch.sequence[f"weight/{name}"].tolist() == [0.5] * 2, k


class InOrder(Speaker):
    """Says one thing per round."""

    def generate(self, prompt_ids: Any, n: int, *rest: Any, **more: Any) -> Any:
        found = super().generate(prompt_ids, n, *rest, **more)
        self.answers = [*self.answers[len(prompt_ids) :], *self.answers[: len(prompt_ids)]]
        return found


def _letters(text: str) -> str:
    """The world reads line breaks as one `a`, before and after what is asked."""
    assert text.startswith("aba") and text.endswith("a")
    return text[:2] + "|" + text[3:-1]


def test_confidences_of_the_last_round_become_weights():
    """Through the whole of `collect`, with the debate held by hand."""
    run, _ = run_with()

    def held(*arguments: Any) -> dict[str, Debate]:
        (prompt,) = arguments[1]
        said = [["<<CONFIDENCE=0>>"] * 2, ["a <<CONFIDENCE=90>>", "b <<CONFIDENCE=40>>"]]
        return {prompt.id: Debate(prompt, [True, True], said)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surpass.methods.mad_opd.hold_debates", held)
        patch.setattr(debate, "TEMPLATES", {"answer": "c"})
        batch = MADOPD(most_repetition=None).collect(run, [world.PROMPT])
    expected = confidence_weights([90.0, 40.0], [True, True])
    for name, weight in zip(("teacher/x", "teacher/y"), expected, strict=True):
        assert batch.sequence[f"weight/{name}"].tolist() == pytest.approx([weight])


def test_a_teacher_that_says_nothing_leaves_its_weight_to_the_other(short: None):
    silent, speaks = world.policy(1), world.policy(4)
    run, _ = run_with([silent, speaks], says={silent.name: [[3]], speaks.name: [[1, 3]]})
    method = MADOPD(rounds=1, samples=4)
    batch = method.collect(run, [world.PROMPT])
    assert batch.sequence["weight/teacher/x"].tolist() == [0.0] * 4
    assert batch.sequence["weight/teacher/y"].tolist() == [1.0] * 4
    assert run.metrics["debate/failed"] == 0.5
    values = MADOPD().loss(run, batch).terms[0].values
    alone = run.divergence(
        batch, run.student_hidden(batch), {"teacher/y": 1.0}, method.divergence_kind()
    ).value
    assert torch.equal(values, alone)


def test_where_the_discussion_fits_nobody_they_grade_the_plain_prompt():
    """The real wording is far longer than the 32 letters these models read."""
    run, speakers = run_with()
    batch = MADOPD(samples=4).collect(run, [world.PROMPT])
    plain = MADOPD(samples=4, rounds=0).collect(run_with()[0], [world.PROMPT])
    assert run.metrics["debate/failed"] == 1.0 and not any(s.heard for s in speakers.values())
    for name in ("teacher/x", "teacher/y"):
        assert torch.equal(batch.scores[name].hidden[0].states, plain.scores[name].hidden[0].states)
        assert batch.sequence[f"weight/{name}"].tolist() == [0.5] * 4


def test_the_debate_is_asked_of_conversations_too():
    asked = ({"role": "user", "content": "q"},)
    said = [["one {debate}", "two <<CONFIDENCE=5>>"]]
    found = Debate(Prompt("p", asked), [True, True], said).context(1)
    assert len(found) == 1
    text = found[0]["content"]  # type: ignore[index]
    assert text.startswith("q\n\nYou are expert B.")
    assert "Expert A, round 1: one {debate}\n\nExpert B, round 1: two" in text
    acting = (*asked, {"role": "assistant", "content": "f(x)"}, {"role": "tool", "content": "1"})
    later = Debate(Prompt("p", acting), [True, True]).turn(0, last=True)
    assert later[:3] == acting and later[3]["role"] == "user"  # type: ignore[index]
    assert "<<CONFIDENCE=number>>" in later[3]["content"]  # type: ignore[index]


# -- what is skipped, and episodes ----------------------------------------------------------------------------------


def test_repetition():
    assert repetition([1, 2]) == 0.0 and repetition([1, 2, 3, 4]) == 0.0
    assert repetition([1] * 12) == pytest.approx(0.9)


def test_answers_that_go_round_in_circles_count_as_nothing():
    circle, fine = [0] * 9, [0, 1, 3]
    run, _ = run_with(sampling=Sampling(max_new_tokens=9))
    run.engine.answers = [circle, fine]  # type: ignore[attr-defined]
    method = MADOPD(rounds=0, samples=2)
    batch = method.collect(run, [world.PROMPT])
    assert batch.sequence["kept"].tolist() == [False, True]
    values = method.loss(run, batch).terms[0].values
    assert bool((values[:9] == 0).all()) and bool((values[9:] > 0).all())
    kept = method.loss(run, batch.select(torch.tensor([1])))
    half = world.step_gradient(run, method, batch)
    whole = world.gradient(run.student, kept.terms[0].values.mean())
    torch.testing.assert_close(half, whole / 2, **world.CLOSE)


def test_opad_is_mad_opd_at_every_action(short: None, tmp_path: Path):
    (tmp_path / "twice.py").write_text(ENVIRONMENT)
    run, speakers = run_with(sampling=Sampling(max_new_tokens=12))
    run.engine.answers = [[1, 3]]  # type: ignore[attr-defined]
    method = OPAD(environment=f"{tmp_path / 'twice.py'}:Twice", rounds=1, most_repetition=None, samples=2)
    batch = method.collect(run, [world.PROMPT])
    read = [run.student.tokenizer.decode(i) for i in batch.prompt_ids.tolist()]
    assert read == ["ab", "abb.ba", "ab", "abb.ba"]
    assert batch.response.tolist() == [[1, 3]] * 4
    # Both episodes begin alike: one debate on the first state, one on each later one.
    for speaker in speakers.values():
        assert [t.removesuffix("abca") for t in speaker.heard] == ["ab", "abbba", "abbba"]
    gradient = world.step_gradient(run, method, batch)
    assert bool(gradient.isfinite().all()) and gradient.norm() > 0


def test_opad_without_environment_is_mad_opd():
    gradients = []
    for method in (MADOPD(rounds=0, samples=4), OPAD(rounds=0, samples=4)):
        run, _ = run_with()
        gradients.append(world.step_gradient(run, method, method.collect(run, [world.PROMPT])))
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    "wrong", [{"rounds": -1}, {"debate_tokens": 0}, {"confidence_temperature": 0.0}, {"max_turns": 0}]
)
def test_settings_without_a_meaning_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=f"method.{next(iter(wrong))}"):
        OPAD(**wrong)
