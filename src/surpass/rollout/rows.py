"""The rows of the running batch: what each sequence has written so far and where it stands."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surpass.records import Finish
from surpass.rollout.sampling import accumulator

WRITING = -1
EMPTY = -1


@dataclass
class Rows:
    """One entry per slot of the cache, `R` of them, all on the device of the model.

    sequence: `[R]` which of the `N` answers the slot holds, or `EMPTY`. token: `[R]` the last token, which the
    model has not read yet. prompt_length: `[R]`. length: `[R]` tokens written. limit: `[R]` tokens it may write.
    finish: `[R]` of `Finish`, or `WRITING`. ids, logp, uniform: `[R, L]` of the response, `L` = max_new_tokens.
    """

    sequence: Tensor
    token: Tensor
    prompt_length: Tensor
    length: Tensor
    limit: Tensor
    finish: Tensor
    ids: Tensor
    logp: Tensor
    uniform: Tensor

    @staticmethod
    def allocate(rows: int, longest: int, device: torch.device) -> Rows:
        """`rows` empty slots for responses of up to `longest` tokens."""

        def integers(*shape: int, value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=torch.int64, device=device)

        return Rows(
            sequence=integers(rows, value=EMPTY),
            token=integers(rows),
            prompt_length=integers(rows),
            length=integers(rows),
            limit=integers(rows),
            finish=integers(rows, value=int(Finish.ABORTED)),
            ids=integers(rows, longest),
            logp=torch.zeros(rows, longest, device=device),
            uniform=torch.zeros(rows, longest, dtype=accumulator(device), device=device),
        )

    def admit(
        self, slots: Tensor, sequence: Tensor, prompt_length: Tensor, limit: Tensor, uniform: Tensor
    ) -> None:
        """Give `slots` `[m]` to new sequences whose prompts were read; their first token comes next."""
        self.sequence[slots] = sequence
        self.prompt_length[slots] = prompt_length
        self.length[slots] = 0
        self.limit[slots] = limit
        self.finish[slots] = WRITING
        self.uniform[slots] = uniform

    def position(self, used: int) -> Tensor:
        """`[used]`: the column where the last token of the first `used` slots belongs."""
        return self.prompt_length[:used] + self.length[:used] - 1

    def write(self, slots: Tensor, length: Tensor, token: Tensor, logp: Tensor, eos: Tensor) -> Tensor:
        """Append `token` `[m]` to `slots` `[m]`, which hold `length` `[m]`; gives `[m]` why each ended, or `WRITING`.

        eos: `[E]` ids.
        """
        self.ids[slots, length] = token
        self.logp[slots, length] = logp
        length = length + 1
        self.token[slots] = token
        self.length[slots] = length
        finish = torch.where(length >= self.limit[slots], int(Finish.LENGTH), WRITING)
        finish = finish.masked_fill_((token.unsqueeze(1) == eos).any(1), int(Finish.EOS))
        self.finish[slots] = finish
        return finish

    def finished(self) -> Tensor:
        """`[R]` bool: slots with a finished sequence that was not taken yet."""
        return (self.finish != WRITING) & (self.sequence >= 0)

    def take(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Empty `slots` `[m]`; gives sequence `[m]`, length `[m]`, ids and logp laid end to end, finish `[m]`."""
        length, sequence = self.length[slots], self.sequence[slots]
        written = torch.arange(self.ids.shape[1], device=length.device) < length.unsqueeze(1)
        self.sequence[slots] = EMPTY
        return sequence, length, self.ids[slots][written], self.logp[slots][written], self.finish[slots]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Give the empty slots `target` `[m]` what slots `source` `[m]` hold, and empty those."""
        for column in vars(self).values():
            column[target] = column[source]
        self.sequence[source] = EMPTY
        self.finish[source] = int(Finish.ABORTED)
