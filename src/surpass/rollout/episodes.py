"""Episodes as rollouts: one row per episode, or one row per action."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from surpass.records import Author, Finish, Prompt, Ragged, Rollouts
from surpass.rollout.turns import Episode


def joined(episodes: Sequence[Episode], group: Tensor, temperature: float) -> Rollouts:
    """One row per episode: actions and observations in the order they were read.

    Token `t` of action `k`, and of the observation that follows it, has `turn` k. The environment's own rewards, where
    it gave any, are the component `environment` (NaN where it gave none).
    """
    rows: list[list[Tensor]] = [[], [], [], []]
    for episode in episodes:
        parts: list[tuple[Tensor, Tensor, int, int]] = []
        for k, turn in enumerate(episode.turns):
            appended = torch.tensor(turn.appended, dtype=torch.int64)
            parts.append((turn.action, turn.logp, Author.STUDENT, k))
            parts.append((appended, torch.full((len(appended),), torch.nan), Author.TOOL, k))
        rows[0].append(torch.cat([ids for ids, *_ in parts]))
        rows[1].append(torch.cat([logp for _, logp, *_ in parts]))
        rows[2].append(
            torch.cat([torch.full((len(ids),), int(a), dtype=torch.int8) for ids, _, a, _ in parts])
        )
        rows[3].append(torch.cat([torch.full((len(ids),), k, dtype=torch.int64) for ids, _, _, k in parts]))
    response, logp, author, turn = (Ragged.from_list(column) for column in rows)
    rewards = torch.tensor([float("nan") if e.reward is None else e.reward for e in episodes])
    return Rollouts(
        prompts=tuple(e.prompt for e in episodes),
        prompt_ids=Ragged.from_list([e.prompt_ids for e in episodes], torch.int64),
        response=response,
        author=author.values,
        sampler_logp=logp.values,
        group=group,
        finish=torch.tensor([int(e.finish) for e in episodes]),
        version=torch.tensor([e.version for e in episodes]),
        temperature=temperature,
        turn=turn.values,
        components={} if bool(rewards.isnan().all()) else {"environment": rewards},
    )


def by_action(episodes: Sequence[Episode], group: Tensor, temperature: float) -> Rollouts:
    """One row per action, whose prompt is the state it was written in: the question and all turns before.

    The state's token ids are the very ones the model read; its messages are the same in words, for roles that read it
    in a context of their own. The first state keeps the prompt's id, which its episodes share; later ones have their own.
    `finish` is EOS but for the last action of an episode.
    """
    prompts: list[Prompt] = []
    rows: list[list[Any]] = [[], [], [], [], [], [], []]
    for e, episode in enumerate(episodes):
        state, read = episode.prompt, list(episode.prompt_ids)
        for k, turn in enumerate(episode.turns):
            prompts.append(replace(state, id=f"{episode.prompt.id}/{e}.{k}" if k else state.id))
            finish = episode.finish if k + 1 == len(episode.turns) else Finish.EOS
            columns = (read, turn.action, turn.logp, group[e], int(finish), episode.version, k)
            for column, value in zip(rows, columns, strict=True):
                column.append(value)
            read = [*read, *turn.action.tolist(), *turn.appended]
            state = replace(state, messages=_after(state, turn.text, turn.observation or ""))
    response = Ragged.from_list(rows[1])
    return Rollouts(
        prompts=tuple(prompts),
        prompt_ids=Ragged.from_list(rows[0], torch.int64),
        response=response,
        author=torch.full_like(response.values, int(Author.STUDENT), dtype=torch.int8),
        sampler_logp=torch.cat(rows[2]),
        group=torch.stack(rows[3]),
        finish=torch.tensor(rows[4]),
        version=torch.tensor(rows[5]),
        temperature=temperature,
        turn=response.expand(torch.tensor(rows[6])),
    )


def last_action(rollouts: Rollouts) -> Ragged:
    """`N` sequences: what the student wrote in the last turn of each row; the whole response where there are no turns."""
    if rollouts.turn is None:
        return rollouts.response
    final = rollouts.ragged(rollouts.turn).extreme(largest=True)
    mine = rollouts.mask("student") & (rollouts.turn == rollouts.response.expand(final))
    return Ragged.from_lengths(rollouts.response.values[mine], rollouts.ragged(mine).sum())


def _after(state: Prompt, action: str, observation: str) -> Any:
    if isinstance(state.messages, str):
        return f"{state.messages}{action}{observation}"
    said = {"role": "assistant", "content": action}
    return (*state.messages, said, {"role": "tool", "content": observation})
