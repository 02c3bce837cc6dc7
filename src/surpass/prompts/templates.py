"""From a prompt to the token ids a model reads, and whether two models read the same.

Conversations go through the tokenizer's chat template; plain text goes through the tokenizer as it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from surpass.records import Prompt

Messages = Sequence[Mapping[str, Any]]

# What two templates are compared on: one turn, a system text, and a finished turn followed by another.
_USER = {"role": "user", "content": "How much is 1 + 1?"}
_PROBES: dict[str, list[dict[str, Any]]] = {
    "one question": [_USER],
    "system text and question": [{"role": "system", "content": "Be brief."}, _USER],
    "second question": [
        _USER,
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2 + 2?"},
    ],
}


def render(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template_args: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of a prompt, ready for the model to continue.

    Plain text gets a BOS where the tokenizer adds one and none is written already, and never an EOS.
    template_args: variables of the chat template (`enable_thinking: false`).
    Raises ValueError for a conversation without chat template, one the template refuses, and template arguments
    it does not read.
    """
    if isinstance(prompt.messages, str):
        return _plain(prompt.messages, tokenizer)
    try:
        text = _rendered(prompt.messages, tokenizer, template_args, add_generation_prompt)
    except ValueError as error:
        raise ValueError(f"prompt {prompt.id!r}: {error}") from None
    return _tokens(text, tokenizer)


def continuation(
    messages: Messages,
    more: Messages,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template_args: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids the template writes when `more` follow `messages`: what a further turn appends to a context.

    Where the assistant speaks first in `more`, `messages` are taken as already opened for it. Raises ValueError where
    the longer rendering does not begin with the shorter one (templates that drop earlier thinking, for example):
    then tokens that were sampled cannot be kept as they are.
    """
    if not more:
        return []
    before = _rendered(messages, tokenizer, template_args, more[0]["role"] == "assistant")
    after = _rendered([*messages, *more], tokenizer, template_args, more[-1]["role"] != "assistant")
    first, both = _tokens(before, tokenizer), _tokens(after, tokenizer)
    if both[: len(first)] != first:
        at = next((i for i, (a, b) in enumerate(zip(first, both, strict=False)) if a != b), len(both))
        raise ValueError(
            f"adding turns changes what stands before them, from token {at} on: {tokenizer.decode(first[at:])!r} became "
            f"{tokenizer.decode(both[at : len(first)])!r}. Sampled tokens would no longer be the ones trained; use a chat "
            "template whose renderings extend each other (for Qwen3: one that keeps earlier thinking)"
        )
    return both[len(first) :]


def template_fingerprint(
    tokenizer: PreTrainedTokenizerBase, template_args: Mapping[str, Any] | None = None
) -> str:
    """Twelve hex digits that change when plain text or probe conversations are rendered differently."""
    shown = _probe_texts(tokenizer, template_args)
    return hashlib.sha256("\0".join(f"{k}\0{v}" for k, v in shown.items()).encode()).hexdigest()[:12]


def check_same_template(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    template_args: Mapping[str, Any] | None = None,
    *,
    teacher_args: Mapping[str, Any] | None = None,
    other_name: str = "teacher",
) -> None:
    """Raise ValueError, both renderings printed, unless student and teacher read prompts as the same text.

    teacher_args: template arguments of the teacher; None: the student's.
    """
    mine = _probe_texts(student, template_args)
    theirs = _probe_texts(teacher, template_args if teacher_args is None else teacher_args)
    for name, text in mine.items():
        if text != theirs[name]:
            raise ValueError(
                f"the student and {other_name} render prompts differently ({name}):\n"
                f"  student: {text!r}\n  {other_name}: {theirs[name]!r}\n"
                "The teacher would judge answers to another prompt. Set data.template_args alike (thinking on or off), "
                f"give both the same chat template, or let {other_name} read its own template on purpose"
            )


def _probe_texts(tokenizer: PreTrainedTokenizerBase, args: Mapping[str, Any] | None) -> dict[str, str]:
    def text_of(messages: list[dict[str, Any]]) -> str:
        try:
            return _rendered(messages, tokenizer, args, True)
        except ValueError as error:
            return f"(refused: {error})"

    texts = {name: text_of(messages) for name, messages in _PROBES.items()}
    if tokenizer.chat_template is None:
        texts = dict.fromkeys(_PROBES, "(no chat template)")
    return {**texts, "beginning of plain text": "BOS" if _adds_bos(tokenizer) else "no BOS"}


def _rendered(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, args: Mapping[str, Any] | None, open_turn: bool
) -> str:
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if tokenizer.chat_template is None:
        raise ValueError(
            f"it is a conversation, but the tokenizer {name} has no chat template; use a checkpoint that has one "
            "(chat_template.jinja beside the tokenizer), or give prompts as plain text in a `prompt` column"
        )
    template = tokenizer.get_chat_template()
    for argument in args or {}:
        if not re.search(rf"\b{re.escape(argument)}\b", template):
            raise ValueError(
                f"the chat template of {name} does not read template_args.{argument}, so it would have no effect; "
                "remove it"
            )
    try:
        text = tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=open_turn, **(args or {})
        )
    except TemplateError as error:
        roles = [m["role"] for m in messages]
        raise ValueError(f"the chat template of {name} refuses turns {roles}: {error}") from None
    return str(text)


def _plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = _tokens(text, tokenizer)
    if _adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]:
        ids.insert(0, tokenizer.bos_token_id)  # type: ignore[arg-type]
    return ids


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
