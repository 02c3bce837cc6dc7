"""Tiny checkpoints made on the spot: tokenizers and random models of well-known architectures, nothing downloaded.

They are ordinary Hugging Face checkpoints, so everything that reads a real one reads these. The quickstart trains
them; the tests use them to stand in for models of every shape (soft-capped logits, sliding windows, experts).
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

PAD, BOS, END, UNKNOWN = "<|pad|>", "<|bos|>", "<|end|>", "<|unknown|>"
ROLES = ("system", "user", "assistant", "tool")
THINK = ("<think>", "</think>")
PRINTABLE = string.printable[:95] + "\n"  # digits, letters, punctuation and the blank; one token each

CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {%- if message.role not in ROLES -%}
    {{- raise_exception("unknown role " + message.role) -}}
  {%- endif -%}
  {{- "<|" + message.role + "|>" -}}
  {%- if message.role == "assistant" -%}OPENING{%- endif -%}
  {{- message.content + "<|end|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- "<|assistant|>" -}}OPENING
{%- endif -%}"""

# As Qwen3: thinking switched off is an empty block before the answer. It stands before earlier answers too, so that
# a longer conversation always begins with the rendering of the shorter one.
EMPTY_THINKING = (
    "{%- if enable_thinking is defined and not enable_thinking -%}"
    '{{- "<think>\\n\\n</think>\\n\\n" -}}'
    "{%- endif -%}"
)


def char_tokenizer(alphabet: str = PRINTABLE, thinking: bool = False) -> PreTrainedTokenizerFast:
    """One token per character of `alphabet` (per byte, beyond ASCII); anything else becomes `<|unknown|>`.

    It is Qwen's byte-level BPE without merges, so it loads beside any of the architectures here. Special tokens come
    first: padding (id 0), beginning, end of turn (which is the EOS), unknown, then one per chat role.
    thinking: adds `<think>` and `</think>`, and the chat template then reads `enable_thinking`; without them it
    does not know that argument.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = "".join(piece for piece, _ in byte_level.pre_tokenize_str(alphabet))
    words = dict.fromkeys([*_special_tokens(thinking), *letters])
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = byte_level  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return _finish(tokenizer, thinking, unknown=True)


def bpe_tokenizer(
    texts: Iterable[str], vocabulary: int = 512, thinking: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocabulary` tokens learnt from `texts`; writes and reads any text.

    Raises ValueError where `vocabulary` has no room for the 256 bytes and the special tokens.
    """
    special = _special_tokens(thinking)
    if vocabulary < 256 + len(special):
        raise ValueError(
            f"a byte-level vocabulary needs 256 bytes and {len(special)} special tokens, found vocabulary={vocabulary}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finish(tokenizer, thinking, unknown=False)


def _special_tokens(thinking: bool) -> list[str]:
    return [PAD, BOS, END, UNKNOWN, *(f"<|{role}|>" for role in ROLES), *(THINK if thinking else ())]


def _finish(tokenizer: Tokenizer, thinking: bool, unknown: bool) -> PreTrainedTokenizerFast:
    # As Qwen3's, the think tokens are ordinary text to the decoder, so that verifiers and readers see them.
    tokenizer.add_special_tokens([t for t in _special_tokens(thinking) if t not in THINK])
    if thinking:
        tokenizer.add_tokens(list(THINK))
    finished = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        unk_token=UNKNOWN if unknown else None,
        extra_special_tokens=[f"<|{role}|>" for role in ROLES],
        clean_up_tokenization_spaces=False,
    )
    template = CHAT_TEMPLATE.replace("ROLES", str(list(ROLES)))
    finished.chat_template = template.replace("OPENING", EMPTY_THINKING if thinking else "")
    return finished


@dataclass(frozen=True)
class Architecture:
    """How a family is made small. model_type: its name in transformers; settings: over the shared ones."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    alternating: bool = False
    """Layers take turns between a sliding window and full attention (transformers' own pattern needs six layers)."""


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_WINDOW = {"sliding_window": 8}

ARCHITECTURES: dict[str, Architecture] = {
    "qwen3": Architecture("qwen3"),
    "qwen2": Architecture("qwen2"),
    "llama": Architecture("llama"),
    "mistral": Architecture("mistral", _WINDOW),
    "gemma2": Architecture(
        "gemma2", {**_WINDOW, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}, True
    ),
    "gemma3": Architecture("gemma3_text", _WINDOW, True),
    "olmo2": Architecture("olmo2"),
    "phi3": Architecture("phi3"),
    "qwen3_moe": Architecture("qwen3_moe", _EXPERTS),
}


def tiny_model(
    architecture: str = "qwen3",
    vocabulary: int = 104,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A random model in float32, equal for equal arguments; the global random state is left as it was.

    hidden: width `D`, a multiple of `heads`. overrides: fields of the architecture's configuration
    (`max_position_embeddings`, 256 unless given; `initializer_range`: 0.02 writes nearly uniform text, 0.5 a decided one).
    Raises ValueError for unknown architectures, widths the heads do not divide, and fields the configuration lacks.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; there are {sorted(ARCHITECTURES)}")
    if hidden % heads:
        raise ValueError(f"hidden={hidden} does not divide into {heads} heads; choose a multiple of {heads}")
    family = ARCHITECTURES[architecture]
    kinds = ("sliding_attention", "full_attention")
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **family.settings,
    }
    if family.alternating:
        settings["layer_types"] = [kinds[i % 2] for i in range(layers)]
    known = AutoConfig.for_model(family.model_type)
    for name in ("head_dim", "query_pre_attn_scalar"):
        if hasattr(known, name):
            settings[name] = hidden // heads
    if unknown := [name for name in overrides if not hasattr(known, name)]:
        raise ValueError(f"the configuration of {architecture} has no field {', '.join(map(repr, unknown))}")
    config = AutoConfig.for_model(family.model_type, **{**settings, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def save_tiny(
    directory: Path | str,
    architecture: str = "qwen3",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a random model and its tokenizer (default `char_tokenizer()`) as a Hugging Face checkpoint; gives its path.

    `overrides` may set `vocab_size` above the tokenizer's size, as padded checkpoints do. Raises as `tiny_model`,
    and ValueError for a vocabulary smaller than the tokenizer's.
    """
    tokenizer = tokenizer or char_tokenizer()
    size = overrides.pop("vocab_size", len(tokenizer))
    if size < len(tokenizer):
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, so vocab_size={size} is too small")
    special = {
        name: getattr(tokenizer, name)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id")
        if getattr(tokenizer, name) is not None
    }
    model = tiny_model(architecture, size, hidden, layers, heads, seed, **{**special, **overrides})
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)
