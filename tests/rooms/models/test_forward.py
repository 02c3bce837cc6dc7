import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rooms_models import KINDS, V, tiny

from surpass.models.forward import micro_batches, response_hidden
from surpass.records import Ragged

PROMPTS = [[0], [1, 2, 3, 4, 5], [2, 6], [5, 5, 5]]
RESPONSES = [[1, 2, 6], [3], [], [6, 6, 6, 6, 6, 6, 6]]


def ragged(lists: list[list[int]]) -> Ragged:
    return Ragged.from_list(lists, torch.int64)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_an_unpadded_forward_of_each_sequence(kind):
    policy = tiny(kind)
    found = Ragged.from_lengths(
        response_hidden(policy, ragged(PROMPTS), ragged(RESPONSES)).detach(), ragged(RESPONSES).lengths
    )
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        alone = policy.body(input_ids=torch.tensor([prompt + response]), use_cache=False)[0].detach()
        expected = alone[len(prompt) - 1 : len(prompt) + len(response) - 1]
        torch.testing.assert_close(found[i], expected, msg=lambda m, i=i: f"sequence {i}: {m}")


def test_state_predicts_the_token_from_what_precedes_it_alone():
    policy = tiny("qwen3")
    changed = [[*r[:-1], (r[-1] + 1) % V] if r else r for r in RESPONSES]
    first = response_hidden(policy, ragged(PROMPTS), ragged(RESPONSES))
    second = response_hidden(policy, ragged(PROMPTS), ragged(changed))
    assert torch.equal(first, second)


def test_eos_inside_the_prompt_and_padding_token_are_ordinary_tokens():
    policy = tiny("qwen3")
    alone = response_hidden(policy, ragged([PROMPTS[2]]), ragged([[0, 6]]))
    padded = response_hidden(policy, ragged([PROMPTS[2], [0] * 8]), ragged([[0, 6], [1]]))
    torch.testing.assert_close(padded[:2], alone)


def test_gradient_reaches_the_weights():
    policy = tiny("qwen3")
    response_hidden(policy, ragged(PROMPTS), ragged(RESPONSES)).sum().backward()
    assert policy.causal_lm.get_input_embeddings().weight.grad is not None


def test_sequence_longer_than_the_model_is_an_error_in_words():
    policy = tiny("qwen3")
    with pytest.raises(ValueError, match=r"sequence 1 has 10 prompt and 7 response tokens.*reads at most 16"):
        response_hidden(policy, ragged([[0], [0] * 10]), ragged([[1], [1] * 7]))
    assert len(response_hidden(policy, ragged([[0] * 10]), ragged([[1] * 6]))) == 6


def test_empty_prompt_is_an_error_in_words():
    with pytest.raises(ValueError, match=r"zero tokens.*BOS"):
        response_hidden(tiny("qwen3"), ragged([[0], []]), ragged([[1], [1]]))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=0, max_size=12), st.integers(1, 100))
def test_micro_batches_cover_every_row_once_within_the_budget(lengths, budget):
    batches = micro_batches(torch.tensor(lengths, dtype=torch.int64), budget)
    assert sorted(i for rows in batches for i in rows.tolist()) == list(range(len(lengths)))
    for rows in batches:
        padded = len(rows) * max(lengths[i] for i in rows.tolist())
        assert padded <= budget or len(rows) == 1
