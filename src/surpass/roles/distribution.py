"""Which stored hidden states make up a target distribution, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from surpass.learn import targets
from surpass.learn.head import Head
from surpass.records import Rollouts


@dataclass(frozen=True)
class Block:
    """Tokens whose target is built from the same models.

    tokens: `[t]` flat indices. terms: (role name, hidden states `[t, D_i]`, weight: number or `[t]`).
    """

    tokens: Tensor
    terms: tuple[tuple[str, Tensor, float | Tensor], ...]


def roles_read(weights: dict[str, float | Tensor]) -> dict[str, float | Tensor]:
    """The roles a target reads: those whose weight is not the number 0."""
    return {name: w for name, w in weights.items() if not (isinstance(w, float | int) and w == 0)}


def blocks(batch: Rollouts, weights: dict[str, float | Tensor], asked: Tensor | None = None) -> list[Block]:
    """Cut a batch into blocks: with routed teachers, one per teacher that speaks in it.

    weights: by entry of `batch.scores`, the exponent of its distribution. A number 0 leaves the role unread.
    asked: `[t]` flat indices of the tokens to cut up, each once; None: all of them.
    Raises ValueError where a role has no hidden states on some token that is asked for.
    """
    total = len(batch.response.values)
    asked = torch.arange(total) if asked is None else asked.cpu()
    read = roles_read(weights)
    which = torch.zeros(len(read), total, dtype=torch.int64)
    row = torch.zeros(len(read), total, dtype=torch.int64)
    for r, name in enumerate(read):
        which[r] = -1
        for p, part in enumerate(batch.scores[name].hidden if name in batch.scores else ()):
            which[r, part.tokens] = p
            row[r, part.tokens] = torch.arange(len(part.tokens))
        missing = int((which[r, asked] < 0).sum())
        if missing:
            raise ValueError(
                f"role {name!r} has no hidden states on {missing} of {len(asked)} tokens; "
                "score it with Want(hidden=True) before a full-vocabulary divergence"
            )
    kinds, member = torch.unique(which[:, asked], dim=1, return_inverse=True)
    out = []
    for k in range(kinds.shape[1]):
        tokens = asked[member == k]
        terms = []
        for r, (name, weight) in enumerate(read.items()):
            part = batch.scores[name].hidden[int(kinds[r, k])]
            chosen = weight[tokens] if isinstance(weight, Tensor) else weight
            terms.append((part.role, part.states[row[r, tokens]], chosen))
        out.append(Block(tokens, tuple(terms)))
    return out


@torch.no_grad()
def log_normaliser(
    batch: Rollouts,
    weights: dict[str, float | Tensor],
    head_of: Callable[[str], Head],
    temperature: float,
    chunk: int = 256,
) -> Tensor:
    """`[T]` of `log sum_v prod_i p_i(v)^w_i`: 0 where one distribution has weight 1 and no other is read."""
    out = torch.zeros(len(batch.response.values))
    for block in blocks(batch, weights):
        vocabulary = min(head_of(name).vocabulary for name, _, _ in block.terms)
        for start in range(0, len(block.tokens), chunk):
            part = slice(start, start + chunk)
            logps = [
                head_of(name).cut(vocabulary).logits(states[part], temperature).log_softmax(-1)
                for name, states, _ in block.terms
            ]
            exponents = [w[part] if isinstance(w, Tensor) else w for _, _, w in block.terms]
            out[block.tokens[part]] = targets.log_normaliser(logps, exponents).cpu()
    return out
