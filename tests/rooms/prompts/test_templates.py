"""Rendering: templates, BOS, prefixes and fingerprints."""

import pytest
from chat_tokenizers import TEMPLATE, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from surpass.prompts.templates import check_same_template, continuation, render, template_fingerprint
from surpass.records import Prompt

PLAIN, WITH_BOS = make_tokenizer(), make_tokenizer(bos=True)
CHAT = Prompt(id="p", messages=({"role": "user", "content": "1+1?"},))
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<>|"), max_size=30)


def test_conversations_go_through_the_template():
    assert PLAIN.decode(render(CHAT, PLAIN)) == "<|user|>1+1?<|end|><|assistant|>"
    assert PLAIN.decode(render(CHAT, PLAIN, add_generation_prompt=False)) == "<|user|>1+1?<|end|>"
    shown = PLAIN.decode(render(CHAT, PLAIN, template_args={"enable_thinking": False}))
    assert shown == "<|user|>1+1?<|end|><|assistant|><think></think>"
    assert render(CHAT, PLAIN, template_args={"enable_thinking": True}) == render(CHAT, PLAIN)


@settings(max_examples=50)
@given(TEXT)
def test_plain_text_is_kept_and_begins_with_one_bos_where_the_tokenizer_adds_one(text):
    assert PLAIN.decode(render(Prompt("p", text), PLAIN)) == text
    ids = render(Prompt("p", text), WITH_BOS)
    assert ids[0] == WITH_BOS.bos_token_id
    assert ids[1:] == render(Prompt("p", text), PLAIN)
    assert WITH_BOS.eos_token_id not in ids
    assert render(Prompt("p", f"<s>{text}"), WITH_BOS) == ids


def test_no_double_bos_from_a_template_that_writes_one():
    tokenizer = make_tokenizer("<s>" + TEMPLATE, bos=True)
    assert tokenizer.decode(render(CHAT, tokenizer)) == "<s><|user|>1+1?<|end|><|assistant|>"


def test_a_conversation_needs_a_template():
    with pytest.raises(
        ValueError, match=r"prompt 'p': it is a conversation, but the tokenizer .* has no chat template"
    ):
        render(CHAT, make_tokenizer(None))


def test_arguments_the_template_does_not_read_are_refused():
    with pytest.raises(ValueError, match=r"does not read template_args\.enable_think,"):
        render(CHAT, PLAIN, template_args={"enable_think": False})


def test_a_refusing_template_is_explained():
    tokenizer = make_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(
        ValueError, match=r"prompt 'p': the chat template of .* refuses turns \['user'\]: no system role"
    ):
        render(CHAT, tokenizer)


ROLES = st.sampled_from(["user", "assistant", "system"])
TURNS = st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXT}), min_size=1, max_size=3)


@settings(max_examples=50)
@given(before=TURNS, more=TURNS)
def test_continuation_is_what_the_longer_rendering_adds(before, more):
    opened = more[0]["role"] == "assistant"
    whole = render(
        Prompt("p", (*before, *more)), PLAIN, add_generation_prompt=more[-1]["role"] != "assistant"
    )
    start = render(Prompt("p", tuple(before)), PLAIN, add_generation_prompt=opened)
    assert start + continuation(before, more, PLAIN) == whole


def test_templates_that_rewrite_the_past_have_no_continuation():
    forgetful = make_tokenizer(
        "{% for m in messages %}<|{{ m.role }}|>{% if loop.last %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
    )
    asked, answered = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    with pytest.raises(ValueError, match="changes what stands before them, from token 3 on"):
        continuation([asked, answered], [asked], forgetful)


def test_fingerprints_tell_renderings_apart():
    same = template_fingerprint(make_tokenizer())
    assert template_fingerprint(PLAIN) == same
    others = [
        template_fingerprint(PLAIN, {"enable_thinking": False}),
        template_fingerprint(make_tokenizer("<s>" + TEMPLATE)),
        template_fingerprint(make_tokenizer(None)),
        template_fingerprint(WITH_BOS),
    ]
    assert len({same, *others}) == 5


def test_template_mismatch_shows_both_renderings():
    check_same_template(PLAIN, make_tokenizer(), {"enable_thinking": False})
    with pytest.raises(ValueError, match="differently") as caught:
        check_same_template(
            PLAIN, PLAIN, {"enable_thinking": False}, teacher_args={}, other_name="teacher/math"
        )
    shown = str(caught.value)
    assert "student: '<|user|>How much is 1 + 1?<|end|><|assistant|><think></think>'" in shown
    assert "teacher/math: '<|user|>How much is 1 + 1?<|end|><|assistant|>'" in shown
    with pytest.raises(ValueError, match="no chat template"):
        check_same_template(PLAIN, make_tokenizer(None))
