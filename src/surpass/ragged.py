"""Sequences of different lengths laid end to end, and the ways between per-token and per-sequence quantities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """`N` sequences of different lengths laid end to end.

    values: `[T, ...]`; offsets: `[N + 1]` int64, sequence `i` is `values[offsets[i]:offsets[i + 1]]`.
    """

    values: Tensor
    offsets: Tensor

    @staticmethod
    def from_list(
        sequences: Sequence[Tensor] | Sequence[Sequence[int]], dtype: torch.dtype | None = None
    ) -> Ragged:
        """Lay `N` sequences (tensors `[L_i, ...]` or lists of numbers) end to end."""
        # An empty list says nothing of its type (torch takes it for floats); token ids are the usual case.
        tensors = [
            torch.as_tensor(s, dtype=dtype or (None if isinstance(s, Tensor) or len(s) else torch.int64))
            for s in sequences
        ]
        lengths = torch.tensor([len(t) for t in tensors], dtype=torch.int64)
        if not tensors:
            return Ragged.from_lengths(torch.zeros(0, dtype=dtype or torch.int64), lengths)
        filled = [t for t in tensors if len(t)]
        return Ragged.from_lengths(torch.cat(filled) if filled else tensors[0], lengths)

    @staticmethod
    def from_lengths(values: Tensor, lengths: Tensor) -> Ragged:
        """Cut `values` `[T, ...]` into sequences of `lengths` `[N]`; raises ValueError if they do not sum to `T`."""
        if len(lengths) and int(lengths.min()) < 0:
            raise ValueError(f"lengths must be >= 0, found {int(lengths.min())}")
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=values.device)
        torch.cumsum(lengths.to(values.device), 0, out=offsets[1:])
        if int(offsets[-1]) != len(values):
            raise ValueError(f"lengths sum to {int(offsets[-1])}, but there are {len(values)} values")
        return Ragged(values, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> Tensor:
        return self.values[int(self.offsets[i]) : int(self.offsets[i + 1])]

    @property
    def lengths(self) -> Tensor:
        """`[N]` int64."""
        return self.offsets.diff()

    @property
    def owner(self) -> Tensor:
        """`[T]` int64: the sequence each token belongs to (`seq[T]` of the design)."""
        return torch.repeat_interleave(torch.arange(len(self), device=self.offsets.device), self.lengths)

    @property
    def position(self) -> Tensor:
        """`[T]` int64: the index of each token inside its own sequence."""
        return torch.arange(len(self.values), device=self.offsets.device) - self.expand(self.offsets[:-1])

    def like(self, values: Tensor) -> Ragged:
        """Other values over the same sequences."""
        if len(values) != len(self.values):
            raise ValueError(f"expected {len(self.values)} values, found {len(values)}")
        return Ragged(values, self.offsets)

    def expand(self, per_sequence: Tensor) -> Tensor:
        """`[N, ...]` -> `[T, ...]`: every token gets its sequence's value."""
        return torch.repeat_interleave(per_sequence, self.lengths, dim=0)

    def sum(self) -> Tensor:
        """`[N, ...]`; an empty sequence sums to 0, booleans are counted."""
        values = self.values.to(torch.int64) if self.values.dtype == torch.bool else self.values
        out = values.new_zeros((len(self), *values.shape[1:]))
        return out.index_add(0, self.owner, values)

    def mean(self) -> Tensor:
        """`[N, ...]`; an empty sequence has mean 0."""
        lengths = self.lengths.clamp(min=1).view(-1, *[1] * (self.values.ndim - 1))
        return self.sum() / lengths

    def extreme(self, largest: bool, empty: float = 0.0) -> Tensor:
        """`[N]` maximum (or minimum) of each sequence; `empty` where a sequence has no token."""
        out = self.values.new_full((len(self),), empty)
        return out.scatter_reduce(
            0, self.owner, self.values, reduce="amax" if largest else "amin", include_self=False
        )

    def suffix_sum(self, discount: float = 1.0) -> Tensor:
        """`[T]`: at each token `sum_{t' >= t} discount^(t' - t) * value_t'` within its own sequence."""
        if discount == 0.0 or not len(self.values):
            return self.values.clone()
        dtype = torch.result_type(self.values, float(discount))  # discounted integers are fractions
        padded = torch.zeros(len(self), int(self.lengths.max()), dtype=dtype, device=self.values.device)
        owner, position = self.owner, self.position
        padded[owner, position] = self.values.to(dtype)
        for t in range(padded.shape[1] - 2, -1, -1):
            padded[:, t] += discount * padded[:, t + 1]
        return padded[owner, position]

    def tokens_of(self, rows: Tensor) -> Tensor:
        """Flat token indices of the sequences `rows` `[M]`, in that order."""
        lengths = self.lengths[rows]
        starts = self.offsets[:-1][rows]
        within = torch.arange(int(lengths.sum()), device=self.offsets.device)
        within = within - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        return torch.repeat_interleave(starts, lengths) + within

    def select(self, rows: Tensor) -> Ragged:
        """The sequences `rows` `[M]` (indices, repeats allowed) in that order."""
        return Ragged.from_lengths(self.values[self.tokens_of(rows)], self.lengths[rows])

    def tolist(self) -> list[list[int]]:
        return [part.tolist() for part in self.values.split(self.lengths.tolist())]

    def to(self, device: torch.device | str) -> Ragged:
        return Ragged(self.values.to(device), self.offsets.to(device))

    @staticmethod
    def cat(parts: Sequence[Ragged]) -> Ragged:
        """All sequences of all parts, in order."""
        return Ragged.from_lengths(
            torch.cat([p.values for p in parts]), torch.cat([p.lengths for p in parts])
        )
