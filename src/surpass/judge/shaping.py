"""Rewards for the form of an answer: length and format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from surpass.judge.rewards import RewardFunction


def soft_overlong(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """`[N]` float32 soft overlong punishment (DAPO, arXiv 2503.14476).

    0 up to `limit - buffer` tokens, then falling linearly to -1 at `limit`, and -1 beyond.
    lengths: `[N]` response lengths in tokens. Raises ValueError unless 0 < buffer <= limit.
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"expected 0 < buffer <= limit, found buffer {buffer} and limit {limit} tokens")
    return -((lengths.float() - (limit - buffer)) / buffer).clamp(0.0, 1.0)


def overlong_reward(limit: int, buffer: int) -> RewardFunction:
    """`soft_overlong` as a reward function: reads the lengths of `completion_ids`."""
    soft_overlong(torch.zeros(0), limit, buffer)

    def overlong(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        return soft_overlong(torch.tensor([len(ids) for ids in completion_ids]), limit, buffer).tolist()

    return overlong


def format_reward(pattern: str) -> RewardFunction:
    """1.0 where the whole completion matches a regular expression (`.` matches newlines), else 0.0.

    Raises ValueError where `pattern` is not a regular expression.
    """
    try:
        expression = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"not a regular expression: {pattern!r} ({error})") from None

    def format(completions: Sequence[Any], **columns: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return [float(expression.fullmatch(text.strip()) is not None) for text in texts]

    return format
