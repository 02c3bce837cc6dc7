"""Tiny policies of several architectures, and what an engine's log-probs are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from surpass.models.policy import Policy
from surpass.records import Ragged
from surpass.rollout.engine import Completions, Sampling
from surpass.rollout.sampling import law

V = 24
EOS = V - 1
WINDOW = 5
"""Sliding windows are shorter than most prompts of the tests."""

SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "bos_token_id": 0,
}
EAGER: dict[str, Any] = {"attn_implementation": "eager"}
ALTERNATING = ["sliding_attention", "full_attention"] * 2


def tokenizer(vocabulary: int = V) -> PreTrainedTokenizerFast:
    """One letter is one token; the last is `.`, both EOS and padding."""
    letters = {chr(ord("a") + i): i for i in range(vocabulary - 1)} | {".": vocabulary - 1}
    inner = Tokenizer(models.WordLevel(letters, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=".", pad_token=".", unk_token="a")


def _gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3,
            eos_token_id=EOS, bos_token_id=0,
        )
    )  # fmt: skip


MODELS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "qwen3-eager": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, **EAGER)),
    "qwen3-sliding": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=WINDOW, layer_types=ALTERNATING)
    ),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=WINDOW)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SHAPE, sliding_window=WINDOW, layer_types=ALTERNATING, query_pre_attn_scalar=4,
            final_logit_softcapping=2.0, attn_logit_softcapping=5.0, **EAGER,
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SHAPE, sliding_window=WINDOW, layer_types=ALTERNATING, query_pre_attn_scalar=4)
    ),
    "gpt2": _gpt2,
}  # fmt: skip


def policy(name: str = "qwen3", seed: int = 0) -> Policy:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[name]().eval()
    return Policy(model, tokenizer(), name)


def prompts(count: int, seed: int = 0, longest: int = 14) -> Ragged:
    """Ragged prompts of 1 to `longest` tokens, several longer than the sliding window."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return Ragged.from_list([torch.randint(0, V - 1, (length,), generator=generator) for length in lengths])


def text(writer: Policy, ids: list[int]) -> str:
    return str(writer.tokenizer.decode(ids))


@torch.no_grad()
def plain_logp(writer: Policy, prompt_ids: Ragged, n: int, out: Completions, sampling: Sampling) -> Tensor:
    """`[T]`: log-probs of the completions from the model's own forward over each whole text, one by one."""
    columns = []
    for i, response in enumerate(out.response.tolist()):
        prompt = prompt_ids[i // n]
        ids = torch.cat([prompt, torch.tensor(response, dtype=torch.int64)])
        logits = (
            writer.causal_lm(input_ids=ids.unsqueeze(0), use_cache=False)
            .logits[0, len(prompt) - 1 : -1]
            .float()
        )
        logits = logits / (sampling.temperature or 1.0)
        logits[: max(0, sampling.min_new_tokens - 1), list(writer.eos_ids)] = -torch.inf
        columns.append(law(logits, sampling).gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1))
    return torch.cat(columns)
