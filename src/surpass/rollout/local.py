"""The embedded engine: continuous batching over a static key/value cache, for any decoder-only causal model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from surpass.models.policy import Policy
from surpass.records import Finish, Ragged
from surpass.rollout.decoder import Decoder, check_decoder, evaluating, rotary_switch
from surpass.rollout.engine import Completions, Sampling
from surpass.rollout.rows import WRITING, Rows
from surpass.rollout.sampling import draw, uniforms
from surpass.rollout.stop import StopStrings


class LocalEngine:
    """Writes with a policy's own weights through its plain forward.

    max_rows: most sequences decoded at once. max_tokens: most tokens the key/value cache may hold, which
    bounds its memory (one prompt besides); rows are taken away where the longest prompt plus response needs it
    (None: no bound).
    prefill_tokens: most prompt tokens read by one forward, padding included.
    Raises ValueError for a model that cannot be decoded with such a cache.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_rows: int = 256,
        max_tokens: int | None = None,
        prefill_tokens: int = 16384,
    ) -> None:
        for name, value in (
            ("max_rows", max_rows),
            ("max_tokens", max_tokens),
            ("prefill_tokens", prefill_tokens),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        check_decoder(policy)
        self.policy, self.version = policy, 0
        self.max_rows, self.max_tokens, self.prefill_tokens = max_rows, max_tokens, prefill_tokens
        self._stop: StopStrings | None = None

    def update(self, version: int) -> None:
        """The policy's weights changed (they are read in place): later completions carry this version."""
        self.version = version

    def generate(
        self,
        prompt_ids: Ragged,
        n: int,
        sampling: Sampling,
        seeds: Tensor,
        progress: Callable[[int, int], None] | None = None,
    ) -> Completions:
        """Write `n` answers to each of `P` prompts; seeds: `[P * n]` int64. Results are on the CPU.

        Raises ValueError for prompts that are empty or leave no room below the model's position limit, and
        FloatingPointError where the model gives logits that are not numbers.
        """
        prompt_ids, seeds = prompt_ids.to("cpu"), seeds.to("cpu")
        _check_request(self.policy, prompt_ids, n, seeds)
        if not len(seeds):
            nothing = torch.zeros(0, dtype=torch.int64)
            return Completions(Ragged.from_list([]), torch.zeros(0), nothing, nothing)
        columns = min(int(prompt_ids.lengths.max()) + sampling.max_new_tokens, self.policy.max_length)
        switch = rotary_switch(self.policy)
        if switch is not None and columns > switch:
            raise ValueError(
                f"texts may reach {columns} tokens (longest prompt + max_new_tokens), but {self.policy.name!r} changes "
                f"its rotary angles beyond {switch}, which a key/value cache cannot follow; stay at or below {switch}"
            )
        rows = min(self.max_rows, len(seeds))
        if self.max_tokens is not None:
            if columns > self.max_tokens:
                raise ValueError(
                    f"one sequence may need {columns} tokens of key/value cache (longest prompt + max_new_tokens), "
                    f"but max_tokens is {self.max_tokens}; raise it or lower max_new_tokens"
                )
            rows = min(rows, self.max_tokens // columns)
        with evaluating(self.policy.model):
            stop = self._stop_strings(sampling)
            batch = _Batch(
                self.policy, prompt_ids, n, sampling, seeds, stop, rows, columns, self.prefill_tokens
            )
            reported, going = 0, True
            while going:
                going = batch.work()
                if progress is not None and batch.finished > reported:
                    reported = batch.finished
                    progress(reported, len(seeds))
        return batch.completions(self.version)

    def _stop_strings(self, sampling: Sampling) -> StopStrings | None:
        if not sampling.stop:
            return None
        if self._stop is None or self._stop.stop != tuple(sampling.stop):
            self._stop = StopStrings(self.policy.tokenizer, sampling.stop, self.policy.vocabulary)
        return self._stop


class _Batch:
    """One call of `generate`: the waiting sequences, the running rows and what is finished.

    Slots `0 .. used - 1` are decoded; the rows of `writing` (ascending) still write. The cache has one slot more
    than there are rows: it holds the prompt of a group of which only a part has found a place yet.
    """

    def __init__(
        self,
        policy: Policy,
        prompt_ids: Ragged,
        n: int,
        sampling: Sampling,
        seeds: Tensor,
        stop: StopStrings | None,
        size: int,
        columns: int,
        prefill_tokens: int,
    ) -> None:
        self.sampling, self.n, self.seeds, self.stop, self.size = sampling, n, seeds, stop, size
        self.head, self.limit, self.prefill_tokens = policy.head, policy.max_length, prefill_tokens
        self.device = policy.device
        self.eos = torch.tensor(policy.eos_ids, dtype=torch.int64, device=self.device)
        # Longest prompts first: neighbours are alike in length, so little is padded.
        self.order = torch.argsort(prompt_ids.lengths, descending=True, stable=True)
        self.prompts = prompt_ids.select(self.order)
        self.admitted = 0
        self.finished = 0
        self.decoder = Decoder(policy, size + 1, columns)
        self.spare = torch.tensor([size], device=self.device)
        self.spare_hidden = torch.empty(0)
        self.rows = Rows.allocate(size, sampling.max_new_tokens, self.device)
        self.writing = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.used = 0
        self.width = 0
        self.parts: list[tuple[Tensor, ...]] = []

    def work(self) -> bool:
        """Refill or shrink where that pays, then write one token in every row; False when all is written."""
        if self.admitted < len(self.seeds):
            # Reading prompts costs about a decoding step: wait until an eighth of the rows is free.
            if self.size - len(self.writing) >= max(1, self.size // 8):
                self._refill()
        elif self.used - len(self.writing) >= max(1, self.used // 8):
            self._shrink()
        if len(self.writing):
            rows, used = self.rows, self.used
            hidden = self.decoder.decode(rows.token[:used], rows.position(used), self.width)
            self.width += 1
            writing = len(self.writing)
            self.writing = self._write(self.writing, hidden if writing == used else hidden[self.writing])
            if len(self.writing) < writing:
                self._measure()
        going = len(self.writing) > 0 or self.admitted < len(self.seeds)
        if not going:
            self._collect()
        return going

    def completions(self, version: int) -> Completions:
        """Everything written, in the order it was asked for."""
        sequence, length, ids, logp, finish = (torch.cat(column) for column in zip(*self.parts))
        if not logp.isfinite().all():
            raise FloatingPointError(
                "the model gave logits that are not numbers while writing; its weights have diverged or its dtype "
                "overflows (float16?)"
            )
        back = torch.argsort(sequence)
        response = Ragged.from_lengths(ids, length)
        return Completions(
            response.select(back),
            response.like(logp).select(back).values,
            finish[back],
            torch.full_like(sequence, version),
        )

    def _write(self, slots: Tensor, hidden: Tensor) -> Tensor:
        """Draw the next token of `slots` `[m]` from hidden states `[m, D]`; gives the slots that go on."""
        sampling, rows = self.sampling, self.rows
        logits = self.head.logits(hidden, sampling.temperature or 1.0)
        length = rows.length[slots]
        if sampling.min_new_tokens:
            early = (length + 1 < sampling.min_new_tokens).unsqueeze(1)
            logits[:, self.eos] = logits[:, self.eos].masked_fill(early, -torch.inf)
        token, logp = draw(logits, sampling, rows.uniform[slots, length])
        finish = rows.write(slots, length, token, logp, self.eos)
        if self.stop is not None:
            self._stop(self.stop, slots, token, finish)
        going = slots[finish == WRITING]
        self.finished += len(slots) - len(going)
        return going

    def _stop(self, stop: StopStrings, slots: Tensor, token: Tensor, finish: Tensor) -> None:
        """Mark in `finish` `[m]` the rows whose new `token` `[m]` completes a stop string."""
        for i in stop.candidates(token):
            slot = int(slots[i])
            length = int(self.rows.length[slot])
            if int(finish[i]) == Finish.EOS or length < self.sampling.min_new_tokens:
                continue
            if stop.ends(self.rows.ids[slot, max(0, length - stop.reach) : length].tolist()):
                finish[i] = self.rows.finish[slot] = int(Finish.STOP)

    def _refill(self) -> None:
        """Hand free slots to waiting sequences, until none is free or none waits."""
        self._collect()
        free = (self.rows.finish != WRITING).nonzero().squeeze(1)
        while len(free) and self.admitted < len(self.seeds):
            first, begun = divmod(self.admitted, self.n)
            prompts = 1 if begun else max(1, self.prefill_tokens // int(self.prompts.lengths[first]))
            until = min(self.admitted + len(free), (first + prompts) * self.n, len(self.seeds))
            waiting = torch.arange(self.admitted, until)
            group, sample = waiting // self.n, waiting % self.n
            slots, free = free[: len(waiting)], free[len(waiting) :]
            hidden = self._resume(slots, first) if begun else self._read(slots, group)
            sequence = self.order[group] * self.n + sample
            length = self.prompts.lengths[group]
            self.rows.admit(
                slots,
                sequence=sequence.to(self.device),
                prompt_length=length.to(self.device),
                limit=(self.limit - length).clamp(max=self.sampling.max_new_tokens).to(self.device),
                uniform=uniforms(
                    self.seeds[sequence].unsqueeze(1), torch.arange(self.sampling.max_new_tokens)
                ).to(self.rows.uniform),
            )
            self.writing = torch.cat([self.writing, self._write(slots, hidden)])
            self.admitted = until
        self.writing = self.writing.sort().values
        self.used = int(self.writing[-1]) + 1 if len(self.writing) else 0
        self._measure()

    def _read(self, slots: Tensor, group: Tensor) -> Tensor:
        """Read each prompt of `group` `[m]` once, into all its `slots` `[m]`; last hidden states `[m, D]`."""
        source = (group - group[0]).to(self.device)
        read = self.prompts.select(group.unique())
        # The last group may be cut by lack of room: its prompt is kept for those who come later.
        hidden = self.decoder.prefill(read, torch.cat([slots, self.spare]), torch.cat([source, source[-1:]]))
        self.spare_hidden = hidden[-1:].clone()
        return hidden[source]

    def _resume(self, slots: Tensor, prompt: int) -> Tensor:
        """The same for more samples of the group whose prompt is kept."""
        self.decoder.cache.copy(self.spare, slots, int(self.prompts.lengths[prompt]))
        return self.spare_hidden.expand(len(slots), -1)

    def _shrink(self) -> None:
        """Move the last rows into the holes, so that the decoded batch holds rows that write and no others."""
        self._collect()
        count = len(self.writing)
        source = self.writing[self.writing >= count]
        target = (self.rows.finish[:count] != WRITING).nonzero().squeeze(1)
        self.decoder.cache.copy(source, target, self.width)
        self.rows.move(source, target)
        self.writing = torch.arange(count, device=self.device)
        self.used = count

    def _collect(self) -> None:
        """Take the finished sequences out of their slots."""
        done = self.rows.finished().nonzero().squeeze(1)
        if len(done):
            self.parts.append(tuple(column.cpu() for column in self.rows.take(done)))

    def _measure(self) -> None:
        """The columns attention must look at: those of the longest sequence that still writes."""
        self.width = int(self.rows.position(self.used)[self.writing].max()) + 1 if len(self.writing) else 0


def _check_request(policy: Policy, prompt_ids: Ragged, n: int, seeds: Tensor) -> None:
    if n < 1:
        raise ValueError(f"n must be at least 1, found {n}")
    if seeds.shape != (len(prompt_ids) * n,):
        raise ValueError(
            f"expected one seed per answer, {len(prompt_ids)} prompts x {n} samples = {len(prompt_ids) * n}; "
            f"found seeds of shape {list(seeds.shape)}"
        )
    if not len(prompt_ids):
        return
    lengths = prompt_ids.lengths
    if int(lengths.min()) == 0:
        raise ValueError(
            f"prompt {int(lengths.argmin())} has no tokens: nothing predicts its first response token; "
            "give it a BOS token"
        )
    if int(lengths.max()) >= policy.max_length:
        raise ValueError(
            f"prompt {int(lengths.argmax())} has {int(lengths.max())} tokens, but {policy.name!r} reads at most "
            f"{policy.max_length} including the response; drop or shorten the prompt, or use a model with a "
            "longer context"
        )
