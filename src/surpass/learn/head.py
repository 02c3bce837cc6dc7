"""From hidden states to logits: the last layer of a language model as plain tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """Output head of a language model.

    weight: `[V, D]`; bias: `[V]` or None; softcap: `logits = softcap * tanh(logits / softcap)` where set;
    scale: factor on the logits before soft-capping.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    def logits(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """`[t, D]` -> `[t, V]` float32 logits, divided by `temperature`."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if temperature == 1.0 else logits / temperature

    def cut(self, vocabulary: int) -> Head:
        """The head of the first `vocabulary` tokens, for models whose embedding is padded to another size."""
        if vocabulary == self.vocabulary:
            return self
        if vocabulary > self.vocabulary:
            raise ValueError(f"cannot cut a head of {self.vocabulary} tokens to {vocabulary}")
        bias = None if self.bias is None else self.bias[:vocabulary]
        return replace(self, weight=self.weight[:vocabulary], bias=bias)
