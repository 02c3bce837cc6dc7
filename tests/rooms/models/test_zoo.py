"""Tiny checkpoints: they load like real ones, are reproducible, and have the traits their architecture is chosen for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from surpass.models.policy import load_policy
from surpass.models.zoo import ARCHITECTURES, PRINTABLE, bpe_tokenizer, char_tokenizer, save_tiny, tiny_model
from surpass.prompts.templates import continuation, render
from surpass.records import Prompt

QUESTION = {"role": "user", "content": "sort 31"}
CHAR, CHAR_THINKING = char_tokenizer(), char_tokenizer(thinking=True)
BPE = bpe_tokenizer(["sort the digits and sort again "] * 20, 320)


@given(st.text(alphabet=PRINTABLE, max_size=40))
@settings(max_examples=50, deadline=None)
def test_characters_round_trip_one_token_each(text: str) -> None:
    ids = CHAR(text)["input_ids"]
    assert len(ids) == len(text)
    assert CHAR.decode(ids) == text


@given(st.text(max_size=40))
@settings(max_examples=50, deadline=None)
def test_bpe_round_trips_any_text(text: str) -> None:
    assert BPE.decode(BPE(text)["input_ids"]) == text


def test_bpe_has_learnt_words_from_its_texts() -> None:
    assert len(BPE("sort the digits")["input_ids"]) < len("sort the digits") / 2


def test_a_character_outside_the_alphabet_is_unknown() -> None:
    small = char_tokenizer("0123456789 ")
    assert small("1a")["input_ids"] == [*small("1")["input_ids"], small.unk_token_id]
    assert len(small) < len(CHAR)


@pytest.mark.parametrize("tokenizer", [CHAR, CHAR_THINKING, BPE])
def test_special_tokens_differ_and_padding_comes_first(tokenizer: object) -> None:
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]  # type: ignore[attr-defined]
    assert ids == [0, 1, 2]


def test_a_bpe_vocabulary_without_room_for_all_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="256 bytes"):
        bpe_tokenizer(["a"], 200)


def test_the_template_writes_one_token_per_role_and_opens_the_answer() -> None:
    ids = render(Prompt("1", (QUESTION,)), CHAR)
    assert CHAR.convert_ids_to_tokens(ids[:1]) == ["<|user|>"]
    assert CHAR.convert_ids_to_tokens(ids[-2:]) == ["<|end|>", "<|assistant|>"]
    assert len(ids) == len("sort 31") + 3


@pytest.mark.parametrize("args", [None, {"enable_thinking": False}, {"enable_thinking": True}])
def test_a_longer_conversation_begins_with_the_shorter_one(args: dict[str, bool] | None) -> None:
    answer = {"role": "assistant", "content": "13"}
    more = [answer, QUESTION]
    added = continuation([QUESTION], more, CHAR_THINKING, template_args=args)
    whole = render(Prompt("1", (QUESTION, *more)), CHAR_THINKING, template_args=args)
    assert render(Prompt("1", (QUESTION,)), CHAR_THINKING, template_args=args) + added == whole


def test_thinking_off_writes_an_empty_block_and_only_where_the_tokenizer_thinks() -> None:
    prompt = Prompt("1", (QUESTION,))
    on = render(prompt, CHAR_THINKING, template_args={"enable_thinking": True})
    off = render(prompt, CHAR_THINKING, template_args={"enable_thinking": False})
    assert on == render(prompt, CHAR_THINKING)
    assert CHAR_THINKING.decode(off[len(on) :]) == "<think>\n\n</think>\n\n"
    assert len(off) - len(on) == 6  # the two tags are one token each
    with pytest.raises(ValueError, match="does not read"):
        render(prompt, CHAR, template_args={"enable_thinking": False})


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown role judge"):
        render(Prompt("1", ({"role": "judge", "content": "?"},)), CHAR)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("tokenizer", [CHAR, BPE], ids=["char", "bpe"])
def test_a_saved_checkpoint_loads_as_it_was(tmp_path: Path, architecture: str, tokenizer) -> None:
    save_tiny(tmp_path, architecture, tokenizer, hidden=32, seed=3)
    model, read = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "<|user|>sort 31 again\n<|end|>"
    assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert read.chat_template == tokenizer.chat_template
    assert model.generation_config.eos_token_id == read.eos_token_id == tokenizer.eos_token_id
    ids = torch.arange(5, 25).unsqueeze(0)
    expected = tiny_model(architecture, len(tokenizer), hidden=32, seed=3)(ids).logits
    assert torch.equal(model.eval()(ids).logits, expected)


def test_equal_arguments_give_equal_weights_and_leave_the_random_state_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, second, other = (tiny_model(hidden=32, seed=s).state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "mistral"])
def test_a_sliding_window_forgets_what_lies_before_it(architecture: str) -> None:
    """One window layer sees `sliding_window` tokens: the last state must not change with the first token."""
    model = tiny_model(architecture, layers=1, sliding_window=4)
    ids = torch.arange(10, 20).unsqueeze(0)
    changed = torch.cat([torch.tensor([[50]]), ids[:, 1:]], 1)
    assert torch.equal(model(ids).logits[0, -1], model(changed).logits[0, -1])
    assert not torch.equal(model(ids).logits[0, 3], model(changed).logits[0, 3])


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_gemma_mixes_window_and_full_attention(architecture: str) -> None:
    model = tiny_model(architecture, layers=4, sliding_window=2)
    assert model.config.layer_types == ["sliding_attention", "full_attention"] * 2
    ids = torch.arange(10, 30).unsqueeze(0)
    changed = torch.cat([torch.tensor([[50]]), ids[:, 1:]], 1)
    assert not torch.equal(model(ids).logits[0, -1], model(changed).logits[0, -1])


def test_gemma2_caps_its_logits(tmp_path: Path) -> None:
    save_tiny(tmp_path, "gemma2", final_logit_softcapping=0.05, initializer_range=1.0)
    policy = load_policy(str(tmp_path), attention="eager")
    logits = policy.model(torch.arange(10, 30).unsqueeze(0)).logits.detach()
    assert policy.head.softcap == 0.05
    assert 0.04 < float(logits.abs().max()) <= 0.05 + 1e-6  # 0.05 is not a float32


def test_a_vocabulary_may_be_padded_but_not_cut(tmp_path: Path) -> None:
    save_tiny(tmp_path, vocab_size=128)
    assert AutoModelForCausalLM.from_pretrained(tmp_path)(torch.tensor([[127]])).logits.shape[-1] == 128
    with pytest.raises(ValueError, match="too small"):
        save_tiny(tmp_path, vocab_size=50)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown architecture 'qwen9'.*qwen3"):
        tiny_model("qwen9")
    with pytest.raises(ValueError, match="multiple of 4"):
        tiny_model(hidden=30)
    with pytest.raises(ValueError, match="no field 'rope_speed'"):
        tiny_model(rope_speed=1)
