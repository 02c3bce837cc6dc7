"""Call a model on ragged sequences. Padding exists only in this file."""

from __future__ import annotations

import torch
from torch import Tensor

from surpass.models.policy import Policy
from surpass.records import Ragged


def micro_batches(lengths: Tensor, token_budget: int) -> list[Tensor]:
    """Split `N` sequences into batches whose padded size stays within `token_budget`.

    lengths: `[N]` tokens read by the model (prompt + response). Sequences are sorted by length, so little is
    padded; a sequence longer than the budget stands alone. Gives row indices; together they cover every row once.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    batches, start = [], 0
    while start < len(order):
        rows = max(1, token_budget // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def response_hidden(policy: Policy, prompt_ids: Ragged, response: Ragged) -> Tensor:
    """`[T, D]`: for each response token, the last hidden state at the position before it (the one that predicts it).

    One forward over all `N` sequences, padded on the right: causal attention never sees the padding.
    Raises ValueError for an empty prompt (nothing predicts the first token) and for sequences over the model's limit.
    """
    prompt_lengths, lengths = prompt_ids.lengths, response.lengths
    total = prompt_lengths + lengths
    if int(prompt_lengths.min()) == 0:
        raise ValueError(
            "a prompt of zero tokens: nothing predicts its first response token; give it a BOS token"
        )
    if int(total.max()) > policy.max_length:
        row = int(total.argmax())
        raise ValueError(
            f"sequence {row} has {int(prompt_lengths[row])} prompt and {int(lengths[row])} response tokens, but "
            f"{policy.name!r} reads at most {policy.max_length}; shorten rollout.max_new_tokens or drop the prompt"
        )
    width = int(total.max())
    ids = torch.zeros(len(prompt_ids), width, dtype=torch.int64)
    ids[prompt_ids.owner, prompt_ids.position] = prompt_ids.values
    column = response.position + response.expand(prompt_lengths)
    ids[response.owner, column] = response.values
    mask = (torch.arange(width) < total.unsqueeze(1)).to(torch.int64)
    full = bool(mask.all())
    hidden = policy.body(
        input_ids=ids.to(policy.device),
        attention_mask=None if full else mask.to(policy.device),
        use_cache=False,
    )
    return hidden[response.owner.to(policy.device), (column - 1).to(policy.device)]
