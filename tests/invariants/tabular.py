"""Policies that are a table of logits, so that distributions worked out by hand can be trained and checked.

The state after `PROMPT` is the root; after a response token `v` it is `1 + v`, whatever came before. The
hidden state is one-hot, the output head is the table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from world import PROMPT, tokenizer

from surpass.learn.head import Head
from surpass.models.policy import Policy

# Float32 logits against numbers printed with six decimals.
PRINTED: dict[str, Any] = {"rtol": 0.0, "atol": 2e-6}
STUDENT, TEACHER, REFERENCE = [0.5, 0.3, 0.2], [0.7, 0.2, 0.1], [0.4, 0.4, 0.2]


class Table(nn.Module):
    """weight: `[V, 1 + V]`, one column of logits per state."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class TabularPolicy(Policy):
    """A policy for `PROMPT` alone."""

    @property
    def head(self) -> Head:
        return Head(self.model.weight)  # type: ignore[arg-type]

    @property
    def vocabulary(self) -> int:
        return self.head.vocabulary

    @property
    def max_length(self) -> int:
        return 1 << 30

    def body(self, **inputs: Any) -> Tensor:
        ids: Tensor = inputs["input_ids"]
        answered = torch.arange(ids.shape[1]) >= len(str(PROMPT.messages))
        state = torch.where(answered, 1 + ids, torch.zeros_like(ids))
        return torch.nn.functional.one_hot(state, 1 + self.vocabulary).float()


def tabular(root: list[float], after: list[list[float]] | None = None, name: str = "table") -> TabularPolicy:
    """root: `[V]` probabilities of the first token; after: `[V][V]`, of the next one after each token (uniform)."""
    uniform = [[1.0 / len(root)] * len(root)] * len(root)
    weight = torch.tensor([root, *(after or uniform)]).log().T.contiguous()
    return TabularPolicy(Table(weight), tokenizer(len(root)), name)  # type: ignore[arg-type]


def at_root(gradient: Tensor, vocabulary: int = 3) -> Tensor:
    """`[V]`: the part of a flat gradient that belongs to the logits of the first token."""
    return gradient.view(vocabulary, 1 + vocabulary)[:, 0]
