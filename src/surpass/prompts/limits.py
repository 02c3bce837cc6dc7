"""Prompts longer than the model can read: an error or counted as dropped, never cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from surpass.records import Prompt


@dataclass(frozen=True)
class Fitting:
    """The prompts that fit, with their token ids, and the ids and lengths of those that did not."""

    prompts: list[Prompt]
    ids: list[list[int]]
    dropped: dict[str, int]
    limit: int

    def __str__(self) -> str:
        total = len(self.prompts) + len(self.dropped)
        if not self.dropped:
            return f"all {total} prompts have at most {self.limit} tokens"
        name, longest = max(self.dropped.items(), key=lambda item: item[1])
        return (
            f"dropped {len(self.dropped)} of {total} prompts longer than {self.limit} tokens "
            f"(longest: {name!r} with {longest})"
        )


def check_lengths(
    prompts: Sequence[Prompt],
    rendered: Sequence[Sequence[int]],
    limit: int,
    policy: Literal["error", "drop"] = "error",
) -> Fitting:
    """Keep prompts of at most `limit` tokens.

    rendered: token ids of each prompt. Raises ValueError where one is longer (`error`), where none is left, and for
    prompts without any token.
    """
    if len(prompts) != len(rendered):
        raise ValueError(f"{len(prompts)} prompts but {len(rendered)} renderings; they must match one to one")
    for prompt, ids in zip(prompts, rendered, strict=True):
        if not len(ids):
            raise ValueError(f"prompt {prompt.id!r} has no tokens at all; a model cannot continue nothing")
    kept = [i for i, ids in enumerate(rendered) if len(ids) <= limit]
    dropped = {p.id: len(ids) for p, ids in zip(prompts, rendered, strict=True) if len(ids) > limit}
    fitting = Fitting([prompts[i] for i in kept], [list(rendered[i]) for i in kept], dropped, limit)
    if dropped and (policy == "error" or not kept):
        name, longest = max(dropped.items(), key=lambda item: item[1])
        raise ValueError(
            f"{len(dropped)} of {len(prompts)} prompts are longer than {limit} tokens (longest: {name!r} with {longest}); "
            "raise data.max_prompt_tokens, lower rollout.max_new_tokens, or set data.overlong to drop"
        )
    return fitting
