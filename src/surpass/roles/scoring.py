"""What would the others have said? Log-probs, top-k and hidden states of a role on given tokens, detached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from surpass.learn.vocabulary import support_logp, token_logp, top_k
from surpass.models.forward import micro_batches, response_hidden
from surpass.records import Hidden, Rollouts, Scores
from surpass.roles.role import Role


@dataclass(frozen=True)
class Want:
    """What to ask a role for. top_k: its `K` most likely tokens at each position; 0 asks for none."""

    logp: bool = True
    entropy: bool = False
    top_k: int = 0
    hidden: bool = False


@torch.no_grad()
def score(
    role: Role,
    rollouts: Rollouts,
    want: Want,
    *,
    temperature: float,
    token_budget: int,
    support: Tensor | None = None,
) -> Scores:
    """Scores of `role` on all `T` response tokens.

    support: `[T, K]` token ids to give log-probs of, instead of the role's own top-k. temperature divides logits.
    token_budget: prompt + response tokens (padding included) of one forward.
    Raises ValueError for tokens beyond the role's vocabulary and for a top-k larger than it.
    """
    prompt_ids, response = role.prompt_ids(rollouts), rollouts.response
    _check_vocabulary(
        role, want, [response.values, prompt_ids.values, *([] if support is None else [support])]
    )
    batches = micro_batches(prompt_ids.lengths + response.lengths, token_budget)
    model = role.policy.model
    was_training = model.training
    model.eval()
    parts: list[tuple[Tensor, Scores]] = []
    with role.policy.adapter(role.adapter):
        for rows in batches:
            tokens = response.tokens_of(rows)
            hidden = response_hidden(role.policy, prompt_ids.select(rows), response.select(rows))
            wanted_ids = None if support is None else support[tokens]
            parts.append(
                (tokens, _read(role, hidden, response.values[tokens], want, temperature, wanted_ids))
            )
    model.train(was_training)
    return merge(parts, len(response.values))


def _check_vocabulary(role: Role, want: Want, ids: Sequence[Tensor]) -> None:
    vocabulary = role.policy.vocabulary
    largest = max((int(part.max()) for part in ids if part.numel()), default=0)
    if largest >= vocabulary:
        raise ValueError(
            f"role {role.name!r} has a vocabulary of {vocabulary} tokens and is asked about token {largest}; student "
            "and role must share a tokenizer, and tokens that only one of them has can not be scored"
        )
    if want.top_k > vocabulary:
        raise ValueError(
            f"role {role.name!r} has a vocabulary of {vocabulary} tokens, fewer than the top {want.top_k} asked for; "
            f"set method.top_k to at most {vocabulary}"
        )


def _read(
    role: Role, hidden: Tensor, ids: Tensor, want: Want, temperature: float, support: Tensor | None
) -> Scores:
    head = role.head
    logp = entropy = None
    if want.logp or want.entropy:
        logp, entropy = token_logp(hidden, head, ids.to(hidden.device), temperature)
    top1 = support_ids = support_values = None
    if want.entropy:
        top1 = top_k(hidden, head, 1, temperature)[1].squeeze(-1).exp()
    if support is not None:
        support_ids = support.to(hidden.device)
        support_values = support_logp(hidden, head, support_ids, temperature)
    elif want.top_k:
        support_ids, support_values = top_k(hidden, head, want.top_k, temperature)
    # Hidden states keep the model's dtype; everything is stored where rollouts live.
    kept = (Hidden(torch.arange(len(ids)), hidden.detach().cpu(), role.name),) if want.hidden else ()
    return Scores(
        logp=_cpu(logp) if want.logp else None,
        entropy=_cpu(entropy) if want.entropy else None,
        top1=_cpu(top1),
        support=_cpu(support_ids),
        support_logp=_cpu(support_values),
        hidden=kept,
    )


def _cpu(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().cpu()


def merge(parts: Sequence[tuple[Tensor, Scores]], total: int) -> Scores:
    """Put scores of token subsets (indices `[t]`, scores) together into scores of all `total` tokens.

    Columns must be present in every part or in none. Tokens of no part get NaN.
    """
    columns: dict[str, Tensor] = {}
    for column in fields(Scores):
        if column.name == "hidden":
            continue
        values = [getattr(scores, column.name) for _, scores in parts]
        if not values or values[0] is None:
            continue
        first: Tensor = values[0]
        fill = 0 if first.dtype == torch.int64 else float("nan")
        out = torch.full((total, *first.shape[1:]), fill, dtype=first.dtype)
        for (tokens, _), value in zip(parts, values, strict=True):
            out[tokens] = value
        columns[column.name] = out
    hidden: dict[str, list[Hidden]] = {}
    for tokens, scores in parts:
        for piece in scores.hidden:
            hidden.setdefault(piece.role, []).append(Hidden(tokens[piece.tokens], piece.states, piece.role))
    joined = tuple(
        Hidden(torch.cat([h.tokens for h in pieces]), torch.cat([h.states for h in pieces]), name)
        for name, pieces in hidden.items()
    )
    return Scores(**columns, hidden=joined)


def join(parts: Sequence[Rollouts]) -> Rollouts:
    """`Rollouts.cat` of answers that were treated apart, with their scores and every column of any of them.

    Where a part lacks a column, or a role was not asked on it, it has NaN (0 for ids, False in masks). A role must
    have been asked for the same wherever it was asked.
    """
    tables = ("components", "sequence", "token", "masks")
    columns = {name: {k: v for part in parts for k, v in getattr(part, name).items()} for name in tables}
    filled = []
    for part in parts:
        length = {"components": len(part), "sequence": len(part)}
        missing = {
            name: {
                k: _nothing(length.get(name, len(part.response.values)), v)
                for k, v in table.items()
                if k not in getattr(part, name)
            }
            for name, table in columns.items()
        }
        filled.append(replace(part, scores={}).with_(**missing))
    whole = Rollouts.cat(filled)
    total = len(whole.response.values)
    tokens = torch.arange(total).split([len(part.response.values) for part in parts])
    asked = {
        role: [(t, part.scores[role]) for t, part in zip(tokens, parts, strict=True) if role in part.scores]
        for role in dict.fromkeys(role for part in parts for role in part.scores)
    }
    return whole.with_(scores={role: merge(found, total) for role, found in asked.items()})


def _nothing(length: int, like: Tensor) -> Tensor:
    fill = float("nan") if like.is_floating_point() else 0
    return like.new_full((length, *like.shape[1:]), fill)
