"""A policy: a Hugging Face causal language model with its tokenizer, loaded, checked and saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from surpass.learn.head import Head

Dtype = Literal["float32", "bfloat16", "float16"]

# One bar per run is enough; transformers would draw two more for every checkpoint.
disable_progress_bar()


@dataclass
class Policy:
    """Weights and the tokenizer that belongs to them. `name` is the path or hub id they came from."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The Hugging Face model under a LoRA wrapper, if there is one."""
        model = self.model
        return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]

    @property
    def config(self) -> Any:
        return self.causal_lm.config.get_text_config()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def vocabulary(self) -> int:
        """Rows of the output head; may be padded beyond the tokenizer."""
        return self.head.vocabulary

    @property
    def max_length(self) -> int:
        """Positions the model can read, in tokens."""
        return int(getattr(self.config, "max_position_embeddings", 0) or 1 << 30)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: those of the generation configuration and of the tokenizer."""
        found: list[Any] = []
        generation = getattr(self.causal_lm, "generation_config", None)
        for value in (getattr(generation, "eos_token_id", None), self.tokenizer.eos_token_id):
            found += value if isinstance(value, list) else [] if value is None else [value]
        return tuple(dict.fromkeys(int(i) for i in found))

    @property
    def head(self) -> Head:
        """The output head, with a LoRA adapter on it folded in differentiably."""
        module: Any = self.causal_lm.get_output_embeddings()
        base = getattr(module, "base_layer", module)
        weight = base.weight
        if module is not base and not module.disable_adapters:
            for adapter in module.active_adapters:
                weight = weight + module.get_delta_weight(adapter)
        scale = float(getattr(self.config, "logit_scale", None) or 1.0)
        scale /= float(getattr(self.config, "logits_scaling", None) or 1.0)
        softcap = getattr(self.config, "final_logit_softcapping", None)
        return Head(weight, getattr(base, "bias", None), softcap, scale)

    def body(self, **inputs: Any) -> Tensor:
        """Last hidden states `[B, L, D]` of the decoder, before the head. Takes the decoder's own keyword arguments."""
        return self.causal_lm.base_model(**inputs, return_dict=True).last_hidden_state

    @contextlib.contextmanager
    def adapter(self, on: bool) -> Iterator[None]:
        """Within the block the LoRA adapter is on or off; without an adapter only `on=True` makes sense."""
        if on or not isinstance(self.model, PeftModel):
            yield
            return
        with self.model.disable_adapter():
            yield


def load_policy(
    path: str,
    *,
    dtype: Dtype = "float32",
    device: str = "cpu",
    attention: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Policy:
    """Load a checkpoint directory or hub id.

    Raises ValueError where the files are missing, are not a causal language model, or where logits are not
    `head(hidden)` (a model whose forward does more than its head after the last hidden state).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            dtype=getattr(torch, dtype),
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load a causal language model and its tokenizer from {path!r}: {error}\n"
            "Expected a directory with config.json, safetensors and tokenizer files, or a hub id."
        ) from error
    policy = Policy(model.to(device), tokenizer, path)
    check_head(policy)
    return policy


def load_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The architecture's configuration alone; no weights are read."""
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the model configuration of {path!r}: {error}") from error


@torch.no_grad()
def check_head(policy: Policy) -> None:
    """Raise ValueError unless `head.logits(body(ids))` is what the model's own forward gives."""
    ids = torch.arange(4, device=policy.device).unsqueeze(0) % policy.vocabulary
    was_training = policy.model.training
    policy.model.eval()
    causal_lm: Any = policy.causal_lm
    theirs = causal_lm(input_ids=ids, use_cache=False).logits.float()
    ours = policy.head.logits(policy.body(input_ids=ids, use_cache=False)[0]).unsqueeze(0)
    policy.model.train(was_training)
    tolerance = 1e-3 if policy.dtype == torch.float32 else 5e-2
    worst = (theirs - ours).abs().max() / theirs.abs().max().clamp(min=1.0)
    if not worst < tolerance:
        raise ValueError(
            f"{policy.name!r} ({type(policy.causal_lm).__name__}): its logits are not output head times last hidden "
            f"state (relative difference {worst:.2e}); this architecture transforms logits in a way surpass does not know."
        )


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters through peft. rank 0 trains all weights."""

    rank: int = 0
    """Rank of the update; 0 trains the full model."""
    alpha: float = 32.0
    """Scaling numerator: the update is multiplied by `alpha / rank`."""
    dropout: float = 0.0
    """Share of the adapter's inputs dropped while training."""
    targets: str | list[str] = "all-linear"
    """Module names peft adapts, or `all-linear`."""


def add_lora(policy: Policy, lora: Lora) -> Policy:
    """The policy with a fresh adapter; its base weights are frozen and serve as a free reference."""
    if lora.rank == 0:
        return policy
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        task_type="CAUSAL_LM",
    )
    return Policy(get_peft_model(policy.causal_lm, config), policy.tokenizer, policy.name)  # type: ignore[arg-type]


def save_policy(policy: Policy, directory: Path) -> None:
    """Write weights (safetensors), configuration and tokenizer in Hugging Face format (an adapter in peft's)."""
    directory.mkdir(parents=True, exist_ok=True)
    policy.model.save_pretrained(str(directory), safe_serialization=True)
    policy.tokenizer.save_pretrained(str(directory))
