"""The model as the local engine calls it: read prompts into slots, then one token per slot and step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from surpass.models.policy import Policy
from surpass.records import Ragged
from surpass.rollout.cache import Masks, SlotCache


class Decoder:
    """Hidden states of a policy over a `SlotCache` of `rows` slots and `columns` tokens each."""

    def __init__(self, policy: Policy, rows: int, columns: int) -> None:
        self.policy = policy
        self.cache = SlotCache(rows, columns)
        self.masks = Masks(policy, columns)

    def prefill(self, prompts: Ragged, slots: Tensor, source: Tensor) -> Tensor:
        """Read `P` prompts once, keep prompt `source[j]` in slot `slots[j]`; last hidden state of each `[P, D]`."""
        device, lengths = self.policy.device, prompts.lengths
        ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
        ids[prompts.owner, prompts.position] = prompts.values
        self.cache.prefill(slots, source)
        # Padded on the right: causal attention never sees it, and the columns are overwritten before they are read.
        hidden = self.policy.body(
            input_ids=ids.to(device),
            position_ids=torch.arange(ids.shape[1], device=device).expand_as(ids),
            past_key_values=self.cache,
            use_cache=True,
        )
        return hidden[torch.arange(len(ids), device=device), (lengths - 1).to(device)]

    def decode(self, token: Tensor, position: Tensor, width: int) -> Tensor:
        """Read `token` `[B]` at `position` `[B]` in the first `B` slots; their hidden states `[B, D]`.

        width: columns in use, the largest position of a row that matters plus one.
        """
        self.cache.decode(position, width)
        return self.policy.body(
            input_ids=token.unsqueeze(1),
            attention_mask=self.masks(position, width),
            position_ids=position.unsqueeze(1),
            past_key_values=self.cache,
            use_cache=True,
        )[:, 0]


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No gradient, every module in evaluation mode (which also keeps gradient checkpointing out); then as before.

    Tensors made within are for use within, or to be copied outside.
    """
    # Inference mode spares a small model an eighth of its time; sharded and quantised weights do not bear it.
    training = [module for module in model.modules() if module.training]
    plain = all(type(parameter) is torch.nn.Parameter for parameter in model.parameters())
    model.eval()
    try:
        with torch.inference_mode() if plain else torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        # Rotary embeddings that grow with the text rewrite their frequencies, which must not stay inference tensors.
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_inference():
                    setattr(module, name, buffer.clone())


def rotary_switch(policy: Policy) -> int | None:
    """The text length beyond which the model turns every position's angles another way, or None where it never does.

    Keys that were cached below that length do not fit queries above it ("longrope" and "dynamic" scaling).
    """
    rope = getattr(policy.config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):
        if isinstance(part, dict) and part.get("rope_type") in ("longrope", "dynamic"):
            original = part.get("original_max_position_embeddings")
            return original or getattr(policy.config, "original_max_position_embeddings", None)
    return None


def check_decoder(policy: Policy) -> None:
    """Raise ValueError unless reading through the cache gives what a plain forward over the whole text gives.

    Two short texts of different length, so that a model with recurrent state, with positions of its own
    counting, or with a cache of its own making is refused instead of writing subtly wrong text.
    """
    texts = [[1, 2, 3, 4, 5], [3, 1, 2]]
    texts = [[i % policy.vocabulary for i in text][: policy.max_length] for text in texts]
    slots = torch.arange(2, device=policy.device)
    last = torch.tensor([text[-1] for text in texts], device=policy.device)
    position = torch.tensor([len(text) - 1 for text in texts], device=policy.device)
    with evaluating(policy.model):
        decoder = Decoder(policy, 2, 5)
        try:
            decoder.prefill(Ragged.from_list([text[:-1] for text in texts]), slots, slots)
            ours = decoder.decode(last, position, int(position.max()) + 1)
        except (TypeError, AttributeError, ValueError, RuntimeError, KeyError, IndexError) as error:
            raise ValueError(f"{_refusal(policy)}: {error}") from error
        theirs = torch.stack(
            [
                policy.body(input_ids=torch.tensor([text], device=policy.device), use_cache=False)[0, -1]
                for text in texts
            ]
        )
    # Rounding alone stays far below; a mixture of experts in low precision may route one token differently.
    tolerance = 1e-3 if policy.dtype == torch.float32 else 0.2
    worst = ((ours - theirs).float().norm(dim=1) / theirs.float().norm(dim=1)).max()
    if decoder.cache.empty or not worst < tolerance:
        found = "it keeps no keys and values" if decoder.cache.empty else f"relative difference {worst:.1e}"
        raise ValueError(f"{_refusal(policy)}: {found}")


def _refusal(policy: Policy) -> str:
    return (
        f"{policy.name!r} ({type(policy.causal_lm).__name__}) does not give the same hidden states through a "
        "key/value cache with slots as in a plain forward, so the local engine cannot serve it. "
        "Use another engine for this model"
    )
