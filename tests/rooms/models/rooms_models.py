"""Random tiny causal language models of several architectures, in plain `transformers`."""

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from surpass.models.policy import Policy

V = 7
SIZES = {
    "vocab_size": V,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 16,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": V - 1,
    "pad_token_id": V - 1,
}


def tokenizer() -> PreTrainedTokenizerFast:
    letters = {letter: i for i, letter in enumerate("abcdef.")}
    inner = Tokenizer(models.WordLevel(letters, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=".", pad_token=".", unk_token="a")


def tiny(kind: str, seed: int = 0, **changes) -> Policy:
    """kind: qwen3, qwen3-tied, gemma2 (soft-capped), cohere (scaled up), granite (scaled down), gpt2."""
    settings = {**SIZES, "tie_word_embeddings": False, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**settings))
        elif kind == "qwen3-tied":
            model = Qwen3ForCausalLM(Qwen3Config(**{**settings, "tie_word_embeddings": True}))
        elif kind == "gemma2":
            model = Gemma2ForCausalLM(
                Gemma2Config(**{**settings, "final_logit_softcapping": 0.7, "sliding_window": 16})
            )
        elif kind == "cohere":
            model = CohereForCausalLM(CohereConfig(**{**settings, "logit_scale": 3.0}))
        elif kind == "granite":
            model = GraniteForCausalLM(GraniteConfig(**{**settings, "logits_scaling": 4.0}))
        elif kind == "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=V,
                    n_embd=8,
                    n_layer=2,
                    n_head=2,
                    n_positions=16,
                    eos_token_id=V - 1,
                    bos_token_id=V - 1,
                )
            )
        else:
            raise ValueError(f"unknown kind {kind!r}")
    return Policy(model.eval(), tokenizer(), kind)


KINDS = ["qwen3", "qwen3-tied", "gemma2", "cohere", "granite", "gpt2"]
