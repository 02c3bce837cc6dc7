"""What travels between the rooms: `Prompt`, `Rollouts`, and `Ragged` (in its own file), the flat layout they are stored in.

Shapes: `N` sequences, `T` response tokens of the whole batch laid end to end, `K` support entries,
`V` vocabulary, `D` hidden width. There are no padding masks here: a per-token quantity is `[T]`, a
per-sequence one `[N]`, and `Ragged` goes between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from surpass.ragged import Ragged as Ragged  # travels with the others: import it from here


@dataclass(frozen=True)
class Prompt:
    """One question.

    messages: a chat (tuple of `{"role", "content"}`) or plain text, as the student is asked it.
    answer: the reference answer that verifiers read. response: a written answer from a data set, for
    methods that learn from data. privileged: contexts that only teachers may read (`solution`, `hint`,
    `critique`, `demonstration`, ...); they never reach the student's prompt or evaluation.
    columns: every other field of the source row, handed to reward functions. parents: ids of the prompts
    this one was made from.
    """

    id: str
    messages: tuple[dict[str, Any], ...] | str
    answer: Any = None
    domain: str = "default"
    response: str | None = None
    tags: tuple[str, ...] = ()
    privileged: dict[str, str] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)
    parents: tuple[str, ...] = ()


class Author(IntEnum):
    """Who wrote a response token. Only tokens of the author a loss names are trained by it."""

    STUDENT = 0
    TEACHER = 1
    TOOL = 2
    DATA = 3


class Finish(IntEnum):
    """Why a sequence ended. EOS: the model ended it; STOP: a stop string; LENGTH: cut off; ABORTED: by us."""

    EOS = 0
    LENGTH = 1
    STOP = 2
    ABORTED = 3


@dataclass(frozen=True)
class Hidden:
    """Last hidden states of one model on some tokens: `states` `[t, D]` at flat `tokens` `[t]`, read by `role`'s head."""

    tokens: Tensor
    states: Tensor
    role: str


@dataclass(frozen=True)
class Scores:
    """What one role says of every response token, detached. Parts nobody asked for are None.

    logp: `[T]` log-prob of the token. entropy: `[T]` nats. top1: `[T]` largest probability.
    support, support_logp: `[T, K]` ids and log-probs under the role's full distribution.
    hidden: the states its full distribution can be rebuilt from, one part per model that was routed to.
    """

    logp: Tensor | None = None
    entropy: Tensor | None = None
    top1: Tensor | None = None
    support: Tensor | None = None
    support_logp: Tensor | None = None
    hidden: tuple[Hidden, ...] = ()


@dataclass(frozen=True)
class Rollouts:
    """A batch of `N` answers and everything later rooms learnt about them.

    prompts: `N`, one per sequence. prompt_ids: as the student is trained to see them.
    response: `[T]` token ids, EOS included where it was written. author: `[T]` of `Author`.
    sampler_logp: `[T]` log-prob under the law that really drew the token; NaN for tokens nobody drew.
    temperature: of that law. group: `[N]` int64, equal for answers to one prompt. finish: `[N]` of `Finish`.
    version: `[N]` update count of the weights that wrote the answer. turn: `[T]`, where there are turns.
    reward: `[N]`; components: its parts by name `[N]` (NaN: not applicable); feedback: `N` texts.
    scores: by role. token: further per-token columns `[T]` a method computed in `collect` (advantage, weight, ...).
    sequence: the same per sequence `[N]`. masks: `[T]` bool, the streams a loss may average over.
    """

    prompts: tuple[Prompt, ...]
    prompt_ids: Ragged
    response: Ragged
    author: Tensor
    sampler_logp: Tensor
    group: Tensor
    finish: Tensor
    version: Tensor
    temperature: float = 1.0
    turn: Tensor | None = None
    reward: Tensor | None = None
    components: dict[str, Tensor] = field(default_factory=dict)
    feedback: tuple[str, ...] | None = None
    scores: dict[str, Scores] = field(default_factory=dict)
    token: dict[str, Tensor] = field(default_factory=dict)
    sequence: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> Tensor:
        """`[N]` response lengths in tokens."""
        return self.response.lengths

    def by(self, author: Author) -> Tensor:
        """`[T]` bool: the tokens `author` wrote."""
        return self.author == int(author)

    def mask(self, stream: str) -> Tensor:
        """`[T]` bool of a named stream. `student`, `teacher`, `tool`, `data` exist always: the tokens each wrote."""
        if stream in self.masks:
            return self.masks[stream]
        if stream.upper() in Author.__members__:
            return self.by(Author[stream.upper()])
        known = sorted({*self.masks, *(a.name.lower() for a in Author)})
        raise KeyError(f"unknown token stream {stream!r}; this batch has {known}")

    def ragged(self, values: Tensor) -> Ragged:
        """A per-token column `[T, ...]` as sequences."""
        return self.response.like(values)

    def with_(self, **changes: Any) -> Rollouts:
        """A copy with some fields replaced; dictionaries are merged into the present ones."""
        for name in ("components", "scores", "token", "sequence", "masks"):
            if name in changes:
                changes[name] = {**getattr(self, name), **changes[name]}
        return replace(self, **changes)

    def select(self, rows: Tensor) -> Rollouts:
        """The sequences `rows` `[M]` (indices, repeats allowed) in that order, with every column cut alike."""
        tokens = self.response.tokens_of(rows)

        def cut_hidden(part: Hidden) -> Hidden:
            # From flat token to its place in the part, then read at the new tokens: a repeated row keeps its states.
            place = torch.full((len(self.response.values),), -1, dtype=torch.int64, device=part.tokens.device)
            place[part.tokens] = torch.arange(len(part.tokens), device=part.tokens.device)
            source = place[tokens.to(place.device)]
            kept = source >= 0
            return Hidden(kept.nonzero().squeeze(-1), part.states[source[kept]], part.role)

        def cut_scores(score: Scores) -> Scores:
            columns = {
                f.name: value[tokens]
                for f in fields(score)
                if f.name != "hidden" and (value := getattr(score, f.name)) is not None
            }
            parts = [cut_hidden(part) for part in score.hidden]
            return Scores(**columns, hidden=tuple(part for part in parts if len(part.tokens)))

        index = rows.tolist()
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in index),
            prompt_ids=self.prompt_ids.select(rows),
            response=self.response.select(rows),
            author=self.author[tokens],
            sampler_logp=self.sampler_logp[tokens],
            group=self.group[rows],
            finish=self.finish[rows],
            version=self.version[rows],
            turn=None if self.turn is None else self.turn[tokens],
            reward=None if self.reward is None else self.reward[rows],
            components={k: v[rows] for k, v in self.components.items()},
            feedback=None if self.feedback is None else tuple(self.feedback[i] for i in index),
            scores={k: cut_scores(v) for k, v in self.scores.items()},
            token={k: v[tokens] for k, v in self.token.items()},
            sequence={k: v[rows] for k, v in self.sequence.items()},
            masks={k: v[tokens] for k, v in self.masks.items()},
        )

    @staticmethod
    def cat(parts: Sequence[Rollouts]) -> Rollouts:
        """All sequences of all parts. Groups are renumbered so that parts never share one. Scores are not carried."""
        if any(p.scores for p in parts):
            raise ValueError(
                "concatenate rollouts before they are scored: scores of different parts may not match"
            )
        temperatures = sorted({p.temperature for p in parts})
        if len(temperatures) != 1:
            raise ValueError(
                f"expected rollouts sampled at one temperature, found {temperatures}; keep them apart"
            )
        groups, next_group = [], 0
        for part in parts:
            groups.append(part.group + next_group)
            next_group += int(part.group.max()) + 1 if len(part) else 0
        first = parts[0]
        shared = {
            name: [k for k in getattr(first, name) if all(k in getattr(p, name) for p in parts)]
            for name in ("components", "token", "sequence", "masks")
        }
        joined = {
            name: {k: torch.cat([getattr(p, name)[k] for p in parts]) for k in keys}
            for name, keys in shared.items()
        }
        return Rollouts(
            prompts=tuple(prompt for p in parts for prompt in p.prompts),
            prompt_ids=Ragged.cat([p.prompt_ids for p in parts]),
            response=Ragged.cat([p.response for p in parts]),
            author=torch.cat([p.author for p in parts]),
            sampler_logp=torch.cat([p.sampler_logp for p in parts]),
            group=torch.cat(groups),
            finish=torch.cat([p.finish for p in parts]),
            version=torch.cat([p.version for p in parts]),
            temperature=first.temperature,
            turn=_cat_or_none([p.turn for p in parts]),
            reward=_cat_or_none([p.reward for p in parts]),
            feedback=None
            if any(p.feedback is None for p in parts)
            else tuple(f for p in parts for f in p.feedback or ()),
            components=joined["components"],
            token=joined["token"],
            sequence=joined["sequence"],
            masks=joined["masks"],
        )


def _cat_or_none(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [t for t in tensors if t is not None]
    return torch.cat(present) if present and len(present) == len(tensors) else None
