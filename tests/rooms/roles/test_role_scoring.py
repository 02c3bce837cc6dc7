import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from world import V, distributions, policy, prompts, rollouts, world  # pyright: ignore[reportMissingImports]

from surpass.models.policy import Lora, Policy, add_lora
from surpass.records import Prompt, Rollouts, Scores
from surpass.roles.role import Role, snapshot
from surpass.roles.scoring import Want, merge, score

TEXTS = [[0, 1, 3], [2], [1, 0, 0, 2, 1, 3], [], [3], [2, 2]]
EVERYTHING = Want(logp=True, entropy=True, top_k=2, hidden=True)
# Float32 forwards of other paddings and batch sizes.
SAME: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def batch() -> Rollouts:
    return rollouts(world(), TEXTS, prompts(len(TEXTS)))


def ask(
    role: Role, want: Want = EVERYTHING, budget: int = 10_000, temperature: float = 1.0, support=None
) -> Scores:
    return score(role, batch(), want, temperature=temperature, token_budget=budget, support=support)


def assert_same(found: Scores, expected: Scores) -> None:
    for name in ("logp", "entropy", "top1", "support", "support_logp"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            torch.testing.assert_close(mine, theirs, **SAME)
    torch.testing.assert_close(states(found), states(expected), **SAME)


def states(scores: Scores) -> torch.Tensor:
    """Hidden states put back in the order of the tokens."""
    tokens = torch.cat([part.tokens for part in scores.hidden])
    assert sorted(tokens.tolist()) == list(range(len(tokens)))
    return torch.cat([part.states for part in scores.hidden])[torch.argsort(tokens)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_read_off_the_roles_full_distribution(temperature):
    role = Role("teacher", policy(1))
    found = ask(role, temperature=temperature)
    logp = distributions(role.policy, batch(), temperature).detach()
    ids = batch().response.values
    torch.testing.assert_close(found.logp, logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1), **SAME)
    torch.testing.assert_close(found.entropy, -(logp.exp() * logp).sum(-1), **SAME)
    torch.testing.assert_close(found.top1, logp.exp().amax(-1), **SAME)
    best = logp.topk(2, -1)
    assert torch.equal(found.support, best.indices)  # type: ignore[arg-type]
    torch.testing.assert_close(found.support_logp, best.values, **SAME)
    again = role.head.logits(states(found), temperature).log_softmax(-1).detach()
    torch.testing.assert_close(again, logp, **SAME)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60))
def test_any_token_budget_gives_what_one_big_batch_gives(budget):
    role = Role("teacher", policy(1))
    assert_same(ask(role, budget=budget), ask(role))


@pytest.mark.parametrize("budget", [1, 9, 10_000])
def test_log_probs_of_a_given_support(budget):
    role = Role("teacher", policy(1))
    support = torch.randint(
        0, V, (len(batch().response.values), 3), generator=torch.Generator().manual_seed(0)
    )
    found = ask(role, Want(), budget, support=support)
    assert torch.equal(found.support, support)  # type: ignore[arg-type]
    expected = distributions(role.policy, batch()).detach().gather(-1, support)
    torch.testing.assert_close(found.support_logp, expected, **SAME)


def test_only_what_was_asked_for_is_given():
    role = Role("teacher", policy(1))
    found = ask(role, Want())
    assert found.logp is not None
    assert (found.entropy, found.top1, found.support, found.support_logp, found.hidden) == (None,) * 4 + ((),)
    assert ask(role, Want(logp=False, top_k=1)).logp is None


def test_nothing_carries_a_gradient_and_the_model_is_left_as_it_was():
    role = Role("teacher", policy(1))
    role.policy.model.train()
    found = ask(role)
    columns = [found.logp, found.entropy, found.top1, found.support_logp, *(p.states for p in found.hidden)]
    assert not any(c.requires_grad for c in columns if c is not None)
    assert role.policy.model.training


def test_rows_selected_after_scoring_keep_their_scores():
    role = Role("teacher", policy(1))
    rows = torch.tensor([4, 2, 0])
    scored = batch().with_(scores={"teacher": ask(role, budget=7)}).select(rows)
    fresh = score(role, batch().select(rows), EVERYTHING, temperature=1.0, token_budget=10_000)
    assert_same(scored.scores["teacher"], fresh)


def test_a_token_the_role_does_not_have_is_an_error_in_words():
    with pytest.raises(ValueError, match=r"'small' has a vocabulary of 3 tokens and is asked about token 3"):
        ask(Role("small", policy(1, vocabulary=3)))
    with pytest.raises(ValueError, match="asked about token 9"):
        ask(Role("teacher", policy(1)), support=torch.full((13, 1), 9))


def test_a_top_k_beyond_the_vocabulary_is_an_error_in_words():
    with pytest.raises(ValueError, match=r"at most 4"):
        ask(Role("teacher", policy(1)), Want(top_k=5))


# -- the adapter ------------------------------------------------------------------------------------------------


def adapted(targets: str | list[str]) -> Policy:
    student = add_lora(policy(0), Lora(rank=2, targets=targets))
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-1.0, 1.0, parameter.numel()).view_as(parameter))
    return student


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"]], ids=str)
def test_without_its_adapter_a_role_is_the_base_model(targets):
    student = adapted(targets)
    on, off = Role("student", student), Role("reference", student, adapter=False)
    with_adapter = ask(on)
    assert_same(ask(off), ask(Role("base", policy(0))))
    assert float((with_adapter.logp - ask(off).logp).abs().max()) > 0.01  # type: ignore[operator]
    assert_same(ask(on), with_adapter)
    base = policy(0).head.logits(torch.ones(1, 8))
    torch.testing.assert_close(off.head.logits(torch.ones(1, 8)), base)
    if targets == ["lm_head"]:
        assert not torch.allclose(on.head.logits(torch.ones(1, 8)), base, atol=1e-3)


def test_a_role_without_its_adapter_has_no_weights_of_its_own():
    student = adapted("all-linear")
    assert Role("reference", student, adapter=False).shares_student
    assert not Role("reference", snapshot(student)).shares_student


# -- the view -----------------------------------------------------------------------------------------------------


class WithSolution:
    """Puts the solution before the question, and notes what it was shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, str | None]] = []

    def prompt_for(self, prompt: Prompt, response: str, feedback: str | None) -> str:
        self.shown.append((response, feedback))
        return prompt.privileged["solution"] + str(prompt.messages)


def informed() -> Rollouts:
    asked = [
        dataclasses.replace(p, privileged={"solution": "c" * (i + 1)})
        for i, p in enumerate(prompts(len(TEXTS)))
    ]
    return rollouts(world(), TEXTS, asked)


def test_a_view_changes_the_context_and_never_the_response():
    view = WithSolution()
    role = Role("teacher", policy(1), view=view)  # type: ignore[arg-type]
    rows = informed()
    found = score(role, rows, EVERYTHING, temperature=1.0, token_budget=12)
    texts = [p.privileged["solution"] + str(p.messages) for p in rows.prompts]
    longer = rollouts(
        world(), TEXTS, [dataclasses.replace(p, messages=t) for p, t in zip(rows.prompts, texts)]
    )
    assert role.prompt_ids(rows).tolist() == longer.prompt_ids.tolist()
    expected = score(Role("plain", policy(1)), longer, EVERYTHING, temperature=1.0, token_budget=10_000)
    assert_same(found, expected)
    assert float((found.logp - ask(Role("blind", policy(1))).logp).abs().max()) > 0.01  # type: ignore[operator]


def test_a_view_is_shown_the_answer_and_its_feedback():
    view = WithSolution()
    role = Role("teacher", policy(1), view=view)  # type: ignore[arg-type]
    notes = tuple(f"note {i}" for i in range(len(TEXTS)))
    role.prompt_ids(informed().with_(feedback=notes))
    assert [note for _, note in view.shown] == list(notes)
    assert [text for text, _ in view.shown][1] == "c"


def test_without_a_view_a_role_reads_the_students_very_prompt_ids():
    rows = batch()
    assert Role("teacher", policy(1)).prompt_ids(rows) is rows.prompt_ids


# -- putting scores together ----------------------------------------------------------------------------------------


def test_merge_puts_every_part_at_its_tokens():
    first = Scores(logp=torch.tensor([1.0, 2.0]), support=torch.tensor([[1], [2]]))
    second = Scores(logp=torch.tensor([3.0]), support=torch.tensor([[3]]))
    whole = merge([(torch.tensor([3, 0]), first), (torch.tensor([1]), second)], 4)
    assert whole.logp is not None
    assert whole.support is not None
    assert whole.logp[[3, 0, 1]].tolist() == [1.0, 2.0, 3.0]
    assert bool(whole.logp[2].isnan())
    assert whole.support[[3, 0, 1]].tolist() == [[1], [2], [3]]
    assert whole.entropy is None


def test_merge_of_nothing_says_nothing():
    assert merge([], 3) == Scores()
