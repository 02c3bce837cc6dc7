"""What an engine is: prompts in, token sequences with the log-probs of the law that drew them out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from surpass.records import Ragged


@dataclass(frozen=True)
class Sampling:
    """The law tokens are drawn from and when a sequence ends. Raises ValueError for values without a meaning.

    The logits are divided by `temperature`, then cut by top-k, then by top-p of what top-k left, then by
    min-p, and what is left is renormalised. Tokens with equal logits are kept or cut together.
    """

    max_new_tokens: int = 256
    """Longest response, EOS included. A sequence also ends where the model's position limit is reached."""
    min_new_tokens: int = 0
    """Neither EOS nor a stop string ends a shorter response; until then EOS has probability 0."""
    temperature: float = 1.0
    """0 is greedy decoding: the most likely token, recorded with log-prob 0, for that law is deterministic."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose mass reaches this; 1 keeps all."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one; 0 keeps all."""
    stop: tuple[str, ...] = ()
    """A response ends with the token that completes one of these strings in its decoded text."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be between 0 and max_new_tokens = {self.max_new_tokens}, "
                f"found {self.min_new_tokens}"
            )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and at least 0, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], found {self.top_p}; 1 switches it off")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, found {self.top_k}; 0 switches it off")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], found {self.min_p}; 0 switches it off")
        if isinstance(self.stop, str) or "" in self.stop:
            raise ValueError(f"stop must be a tuple of non-empty strings, found {self.stop!r}")


@dataclass(frozen=True)
class Completions:
    """`N = P * n` answers; the samples of prompt `i` are rows `i * n .. i * n + n - 1`.

    response: token ids exactly as sampled, EOS included where it was written. logp: `[T]` float32 log-prob
    under the law that really sampled, after temperature and truncation, renormalised (0 where greedy).
    finish: `[N]` int64 of `records.Finish`. version: `[N]` int64 update count of the weights that wrote it.
    """

    response: Ragged
    logp: Tensor
    finish: Tensor
    version: Tensor


class Engine(Protocol):
    """Whoever writes the answers."""

    def generate(
        self,
        prompt_ids: Ragged,
        n: int,
        sampling: Sampling,
        seeds: Tensor,
        progress: Callable[[int, int], None] | None = None,
    ) -> Completions:
        """Write `n` answers to each of `P` prompts.

        seeds: `[P * n]` int64, one per answer. progress: called with (finished answers, all answers).
        """
        ...

    def update(self, version: int) -> None:
        """The weights changed: later completions carry this version."""
        ...
