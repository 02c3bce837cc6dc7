"""TRD: the teacher rewrites the attempt and grades what it wrote; the student never reads the attempt."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from world import CLOSE, distributions, gradient, policy, prompts, rollouts, step_gradient, world

from surpass.learn.divergence import forward_kl
from surpass.methods.base import RoleSpec
from surpass.methods.decoupling import Decoupling
from surpass.methods.run import Run
from surpass.methods.trd import TRD
from surpass.prompts import views
from surpass.prompts.views import View
from surpass.records import Author, Finish, Prompt, Ragged, Rollouts
from surpass.roles.role import Role, snapshot

# Token ids of letters: a 0, b 1, c 2, end 3. `a` stands for unknown text too, and is lost in decoding.
DRAFTS, REFINED = [[1, 2, 3], [2]], [[2, 3], [1, 1, 3]]


@pytest.fixture(autouse=True)
def short_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real wording is longer than these models can read."""
    monkeypatch.setitem(views.TEMPLATES, "refine", "{draft}{problem}")
    monkeypatch.setitem(views.TEMPLATES, "refine_with_solution", "{draft}{solution}{problem}")


def a_run(**settings: Any) -> Run:
    student = policy(0)
    run = world(DRAFTS, student=student, teacher_answers=REFINED, **settings)
    run.roles["initial"] = Role("initial", snapshot(student))
    write = run.engine_for
    assert write is not None
    # The initial student writes the attempts, the teacher the rewritten answers.
    run.engine_for = lambda writer: run.engine if writer is run.roles["initial"].policy else write(writer)
    return run


def asked(**changes: Any) -> list[Prompt]:
    return prompts(2, **changes)


def reading(run: Run, batch: Rollouts, contexts: list[str]) -> Rollouts:
    """The batch after other prompts."""
    ids = [run.student.tokenizer(text)["input_ids"] for text in contexts]
    return replace(batch, prompt_ids=Ragged.from_list(ids, torch.int64))


@pytest.mark.parametrize(("context", "read"), [("refine", ["bca", "cb"]), ("plain", ["a", "b"])])
def test_forward_kl_on_the_rewritten_answer_from_the_teachers_own_context(context: Any, read: list[str]):
    run, method = a_run(), TRD(context=context)
    batch = method.collect(run, asked())
    assert batch.response.tolist() == REFINED
    assert set(batch.author.tolist()) == {int(Author.TEACHER)}
    teacher = distributions(run.teachers["default"].policy, reading(run, batch, read)).detach()
    kl = forward_kl(distributions(run.student, batch), teacher)
    torch.testing.assert_close(step_gradient(run, method, batch), gradient(run.student, kl.mean()), **CLOSE)


def test_the_student_reads_its_own_prompt_whatever_the_teacher_reads():
    found = [TRD(context=context).collect(a_run(), asked()) for context in ("refine", "plain")]
    for batch in found:
        assert batch.prompt_ids.tolist() == [[0], [1]]
        assert [p.privileged["draft"] for p in batch.prompts] == ["bc", "c"]
    assert torch.equal(found[0].response.values, found[1].response.values)
    run = a_run()
    gradients = [step_gradient(run, TRD(), batch) for batch in found]
    assert float((gradients[0] - gradients[1]).norm()) > 0.05 * float(gradients[0].norm())


def test_the_end_of_sequence_is_learnt():
    batch = TRD().collect(a_run(), asked())
    assert batch.finish.tolist() == [int(Finish.EOS)] * 2
    assert bool(batch.mask("teacher").all()) and [ids[-1] for ids in batch.response.tolist()] == [3, 3]


def test_an_identity_refiner_in_the_plain_context_is_forward_kl_on_the_attempts():
    run = a_run()
    run.engine_for = lambda writer: run.engine
    refined = TRD(context="plain", drafts="present")
    one = step_gradient(run, refined, refined.collect(run, asked()))
    forward = Decoupling(divergence="forward")
    other = step_gradient(run, forward, forward.collect(run, asked()))
    assert torch.equal(one, other)


def test_another_teacher_another_gradient():
    found = []
    for seed in (1, 2):
        run = a_run(teacher=policy(seed))
        found.append(step_gradient(run, TRD(), TRD().collect(run, asked())))
    assert float((found[0] - found[1]).norm()) > 0.1 * float(found[0].norm())


def test_a_student_that_reads_what_the_teacher_reads_has_nothing_to_learn():
    run = a_run(teacher=policy(0))
    method = TRD(context="plain")
    assert float(step_gradient(run, method, method.collect(run, asked())).abs().max()) < 1e-6


def test_the_clamp_only_lowers_the_loss():
    run = a_run()
    batch = TRD().collect(run, asked())
    free = TRD().loss(run, batch).terms[0].values
    middle = float(free.detach().median())
    bounded = TRD(clamp=middle).loss(run, batch).terms[0].values
    assert bool((bounded <= free).all()) and float(bounded.detach().max()) <= middle + 1e-6
    assert float((free - bounded).detach().sum()) > 0
    over = free.detach() > middle
    assert not bool(gradient(run.student, bounded[over].sum()).any())
    assert torch.equal(TRD(clamp=1e9).loss(run, batch).terms[0].values, free)


# -- who writes the attempts --------------------------------------------------------------------------------------


def test_the_initial_student_writes_in_one_round_and_the_present_one_step_by_step():
    assert TRD().roles() == {"initial": RoleSpec("initial")}
    assert TRD(drafts="present").roles() == {}
    run = a_run()
    assert TRD().writer(run) is run.roles["initial"]
    assert TRD(drafts="present").writer(run) is None


def test_every_attempt_is_rewritten_for_itself():
    run = a_run()
    batch = TRD(samples=2).collect(run, prompts(2))
    assert batch.group.tolist() == [0, 0, 1, 1]
    assert [p.privileged["draft"] for p in batch.prompts] == ["bc", "c", "bc", "c"]
    assert run.metrics["drafts/mean_length"] == 2.0


def test_long_attempts_are_cut_at_the_end():
    batch = TRD(draft_tokens=1).collect(a_run(), asked())
    assert [p.privileged["draft"] for p in batch.prompts] == ["b", "c"]


def test_self_refinement_is_by_the_initial_student_which_reads_the_solution():
    method = TRD(refiner="self", context="refine")
    assert method.roles() == {"teacher": RoleSpec("initial")}
    run = a_run()
    run.teachers["default"] = Role("teacher", snapshot(run.student))
    run.engine_for = lambda writer: run.engine
    batch = method.collect(run, asked(privileged={"solution": "cc"}))
    teacher = distributions(run.student, reading(run, batch, ["bccca", "cccb"])).detach()
    kl = forward_kl(distributions(run.student, batch), teacher)
    torch.testing.assert_close(
        method.loss(run, batch).terms[0].values.detach(), kl.detach(), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="'solution'"):
        method.collect(run, asked())


def test_the_frozen_refiner_does_not_follow_the_student():
    run = a_run()
    before = TRD().collect(run, asked()).scores["teacher"].hidden[0].states
    with torch.no_grad():
        run.student.head.weight.mul_(0.5)
    after = TRD().collect(run, asked()).scores["teacher"].hidden[0].states
    assert torch.equal(before, after)


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_do_not_change_the_gradient(micro: int):
    run = a_run()
    batch = TRD(samples=3).collect(run, asked())
    whole = step_gradient(run, TRD(), batch)
    torch.testing.assert_close(step_gradient(run, TRD(), batch, micro), whole, **CLOSE)


# -- the views ------------------------------------------------------------------------------------------------------


def test_what_a_refiner_reads_in_the_real_wording(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    problem = "What is {x} in $\\frac{1}{2}$?"
    prompt = Prompt("p", ({"role": "system", "content": "S"}, {"role": "user", "content": problem}))
    told = replace(prompt, privileged={"draft": "It is {solution}.", "solution": "Half."})
    for kind, shown in (("refine", False), ("refine_with_solution", True)):
        system, turn = View(kind).prompt_for(told)  # type: ignore[arg-type]
        assert isinstance(turn, dict)
        assert system == prompt.messages[0] and turn["role"] == "user"
        assert turn["content"].startswith(problem) and "It is {solution}." in turn["content"]
        assert ("Half." in turn["content"]) == shown
    empty = View("refine").prompt_for(replace(prompt, privileged={"draft": ""}))
    assert "first attempt" in str(empty[-1])
    with pytest.raises(ValueError, match="'draft'"):
        View("refine").prompt_for(prompt)
    with pytest.raises(ValueError, match=r"lacks \{solution\}"):
        View("refine_with_solution", "{problem}{draft}")
    renamed = View("refine", "{problem}|{draft}", field="attempt")
    assert renamed.prompt_for(replace(prompt, messages="P", privileged={"attempt": "x"})) == "P|x"


def test_a_role_without_its_adapter_writes_without_it():
    """The initial weights of a LoRA student are the student with its adapter off, when they write too."""
    from surpass.models.policy import Lora, add_lora

    plain = policy(0)
    tuned = add_lora(copy.deepcopy(plain), Lora(rank=2))
    with torch.no_grad():
        for name, weight in tuned.model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.5)
    run = world(DRAFTS, student=plain)
    run.student = tuned
    factory = world(DRAFTS).engine_for
    assert factory is not None
    run.engine_for = factory
    off, on = (run.generate(asked(), 1, Role(f"r{a}", tuned, adapter=a)).sampler_logp for a in (False, True))
    expected = world(DRAFTS, student=plain).generate(asked()).sampler_logp
    torch.testing.assert_close(off, expected, **CLOSE)
    assert float((on - off).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"), [({"draft_tokens": 0}, "at least 1"), ({"clamp": 0.0}, "above 0")]
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TRD(**settings)


def test_the_students_own_tokens_are_no_part_of_the_loss():
    batch = rollouts(a_run(), DRAFTS)
    assert not bool(batch.mask("teacher").any())
