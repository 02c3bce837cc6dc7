"""A static key/value cache whose rows are slots: each holds one sequence and moves on at its own pace.

Row `i` keeps token `t` of its sequence in column `t`, so positions, columns and rotary angles agree, and a
slot can be handed to another sequence without touching its neighbours. Whatever lies beyond a row's last
column is left over from earlier tenants and hidden by the mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from surpass.models.policy import Policy

ATTENTION = ("sdpa", "eager")


class SlotCache(Cache):
    """Keys and values of `rows` sequences of at most `columns` tokens, per layer `[rows, heads, columns, width]`.

    Layers allocate at their first use, so layers without keys and values cost nothing and each may have its
    own number of heads and width.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(layers=[])
        self.rows, self.columns = rows, columns
        self._store: dict[int, tuple[Tensor, Tensor]] = {}
        self._slots: Tensor | None = None
        self._source: Tensor | None = None
        self._position = torch.empty(0, dtype=torch.int64)
        self._row = torch.arange(0)
        self._width = 0

    def prefill(self, slots: Tensor, source: Tensor) -> None:
        """The next forward reads whole prompts: prompt `source[j]` of its batch is kept in slot `slots[j]`."""
        self._slots, self._source = slots, source

    def decode(self, position: Tensor, width: int) -> None:
        """The next forward reads one token for each of the first `B` slots, kept in column `position` `[B]`.

        Attention is over the first `width` columns.
        """
        self._slots, self._source = None, None
        if len(position) != len(self._row) or position.device != self._row.device:
            self._row = torch.arange(len(position), device=position.device)
        self._position, self._width = position, width

    def copy(self, source: Tensor, target: Tensor, width: int) -> None:
        """Copy the first `width` columns of slots `source` `[m]` (or one for all, `[1]`) to slots `target` `[m]`."""
        for keys, values in self._store.values():
            keys[target, :, :width] = keys[source, :, :width]
            values[target, :, :width] = values[source, :, :width]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by every attention layer; keys and values of the new tokens `[B, heads, L, width]`."""
        if layer_idx not in self._store:
            self._store[layer_idx] = (self._allocate(key_states), self._allocate(value_states))
        keys, values = self._store[layer_idx]
        if self._slots is not None:
            length = key_states.shape[2]
            keys[self._slots, :, :length] = key_states[self._source]
            values[self._slots, :, :length] = value_states[self._source]
            return key_states, value_states
        keys[self._row, :, self._position] = key_states[:, :, 0]
        values[self._row, :, self._position] = value_states[:, :, 0]
        rows = len(self._row)
        return keys[:rows, :, : self._width], values[:rows, :, : self._width]

    def _allocate(self, states: Tensor) -> Tensor:
        # Zeros, for masked columns are multiplied by 0 and must be finite.
        return states.new_zeros(self.rows, states.shape[1], self.columns, states.shape[3])

    @property
    def empty(self) -> bool:
        return not self._store

    # What transformers asks to build its own masks, which is left to it while prompts are read.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


class Masks:
    """Attention masks for decoding, in the form the architecture takes them.

    One four-dimensional mask where all layers are alike, else one for each layer type. Raises ValueError for
    layers that do not read all of their past from keys and values, and for attention kernels without masks.
    """

    def __init__(self, policy: Policy, columns: int) -> None:
        config = policy.config
        window = getattr(config, "sliding_window", None)
        uniform = "sliding_attention" if window else "full_attention"
        self.types = tuple(dict.fromkeys(getattr(config, "layer_types", None) or [uniform]))
        self.window = int(window or 0)
        self.column = torch.arange(columns, device=policy.device)
        # Additive, which both kernels take; a finite number, for -inf minus -inf is none.
        self.hidden = torch.tensor(torch.finfo(policy.dtype).min, dtype=policy.dtype, device=policy.device)
        unknown = sorted(set(self.types) - {"full_attention", "sliding_attention"})
        if unknown:
            raise ValueError(
                f"{policy.name!r} has layers of type {', '.join(unknown)}; the local engine decodes full and "
                "sliding-window attention only. Use another engine for this model"
            )
        kernel = getattr(config, "_attn_implementation", None) or "eager"
        if kernel not in ATTENTION:
            raise ValueError(
                f"{policy.name!r} was loaded with attention {kernel!r}; the local engine needs explicit "
                f"masks, which {' and '.join(ATTENTION)} take. Load it with one of them"
            )

    def __call__(self, position: Tensor, width: int) -> Tensor | dict[str, Tensor]:
        """For one new token at column `position` `[B]`: masks `[B, 1, 1, width]`."""
        column = self.column[:width]
        position = position.unsqueeze(1)
        seen = column <= position
        masks = {}
        for kind in self.types:
            allowed = seen if kind == "full_attention" else seen & (column > position - self.window)
            masks[kind] = self.hidden.where(~allowed, 0.0)[:, None, None]
        return masks if len(masks) > 1 else masks[self.types[0]]
