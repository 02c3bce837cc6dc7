"""Answers drawn token by token from a mixture of two policies (teacher-mixed sampling, arXiv 2306.08543).

Both models read every token, each after its own prompt, and the next one is drawn from
`share * teacher + (1 - share) * student`. Rows run side by side until the last one ends; each model keeps a cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache

from surpass.learn.targets import mixture
from surpass.models.policy import Policy
from surpass.records import Finish, Ragged
from surpass.rollout.engine import Completions, Sampling
from surpass.rollout.sampling import draw, uniforms
from surpass.rollout.stop import StopStrings


class _Reader:
    """One policy with a cache: reads prompts `[B]`, then one token per row at a time."""

    def __init__(self, policy: Policy, prompt_ids: Ragged) -> None:
        self.policy, self.head, self.cache = policy, policy.head, DynamicCache()
        lengths = prompt_ids.lengths
        width = int(lengths.max())
        # Padded on the left, so that every row's last token is in the last column.
        column = prompt_ids.position + prompt_ids.expand(width - lengths)
        ids = torch.zeros(len(prompt_ids), width, dtype=torch.int64)
        ids[prompt_ids.owner, column] = prompt_ids.values
        self.ids = ids.to(policy.device)
        self.mask = (torch.arange(width) >= (width - lengths).unsqueeze(1)).to(torch.int64).to(policy.device)
        self.position = (self.mask.cumsum(-1) - 1).clamp(min=0)

    def logits(self, temperature: float) -> Tensor:
        """`[B, V]` of the next token, after reading what has not been read yet."""
        hidden = self.policy.body(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        )
        return self.head.logits(hidden[:, -1], temperature)

    def append(self, ids: Tensor) -> None:
        """The token `[B]` to be read next."""
        self.ids = ids.to(self.policy.device).unsqueeze(1)
        self.mask = torch.cat([self.mask, torch.ones_like(self.ids)], dim=1)
        self.position = self.position[:, -1:] + 1


@torch.no_grad()
def generate_mixed(
    student: Policy,
    teacher: Policy,
    share: float,
    prompt_ids: Ragged,
    teacher_prompt_ids: Ragged,
    n: int,
    sampling: Sampling,
    seeds: Tensor,
    version: int = 0,
    progress: Callable[[int, int], None] | None = None,
    max_rows: int = 256,
) -> Completions:
    """`n` answers to each of `P` prompts, every token drawn from `share * teacher + (1 - share) * student`.

    prompt_ids, teacher_prompt_ids: the same `P` prompts as either model reads them. seeds: `[P * n]`. logp of the
    completions is that of the mixture. Temperature is applied to both models before they are mixed; their common
    vocabulary alone is used. Raises ValueError where sampling is greedy or truncated, or a prompt is too long.
    """
    if sampling.temperature == 0 or sampling.top_p < 1 or sampling.top_k or sampling.min_p:
        raise ValueError(
            "a mixture of two policies is sampled as it is: set rollout.temperature above 0 and leave rollout.top_p 1, "
            f"rollout.top_k 0 and rollout.min_p 0; found {sampling}"
        )
    for policy, ids in ((student, prompt_ids), (teacher, teacher_prompt_ids)):
        longest = int(ids.lengths.max()) + sampling.max_new_tokens
        if longest > policy.max_length:
            raise ValueError(
                f"a prompt and rollout.max_new_tokens make {longest} tokens, and {policy.name!r} reads at most "
                f"{policy.max_length}; shorten rollout.max_new_tokens or drop the prompt"
            )
    rows = torch.arange(len(prompt_ids)).repeat_interleave(n)
    training = [(policy.model, policy.model.training) for policy in (student, teacher)]
    for model, _ in training:
        model.eval()
    parts: list[tuple[list[list[int]], list[list[float]], list[int]]] = []
    for chunk in torch.arange(len(rows)).split(max_rows):
        readers = (
            _Reader(student, prompt_ids.select(rows[chunk])),
            _Reader(teacher, teacher_prompt_ids.select(rows[chunk])),
        )
        parts.append(_write(*readers, share, sampling, seeds[chunk]))
        if progress is not None:
            progress(sum(len(part[2]) for part in parts), len(rows))
    for model, was_training in training:
        model.train(was_training)
    return Completions(
        Ragged.from_list([ids for part in parts for ids in part[0]], torch.int64),
        torch.tensor([value for part in parts for row in part[1] for value in row]),
        torch.tensor([reason for part in parts for reason in part[2]]),
        torch.full((len(rows),), version, dtype=torch.int64),
    )


def _write(
    student: _Reader, teacher: _Reader, share: float, sampling: Sampling, seeds: Tensor
) -> tuple[list[list[int]], list[list[float]], list[int]]:
    """Token ids, log-probs under the mixture and `Finish` of each row."""
    eos = torch.tensor(student.policy.eos_ids, dtype=torch.int64)
    ids: list[list[int]] = [[] for _ in seeds]
    logps: list[list[float]] = [[] for _ in seeds]
    finish = [int(Finish.LENGTH)] * len(seeds)
    running = torch.ones(len(seeds), dtype=torch.bool)
    stop = StopStrings(student.policy.tokenizer, sampling.stop, 0) if sampling.stop else None
    shared = min(student.head.vocabulary, teacher.head.vocabulary)
    for position in range(sampling.max_new_tokens):
        parts = [r.logits(sampling.temperature)[:, :shared].log_softmax(-1).cpu() for r in (teacher, student)]
        mixed = mixture(parts, [share, 1 - share])
        if position < sampling.min_new_tokens:
            mixed[:, eos] = -torch.inf
        token, logp = draw(mixed, sampling, uniforms(seeds, torch.full_like(seeds, position)))
        for row in torch.nonzero(running).squeeze(1).tolist():
            ids[row].append(int(token[row]))
            logps[row].append(float(logp[row]))
            if bool((eos == token[row]).any()):
                running[row], finish[row] = False, int(Finish.EOS)
            elif stop is not None and position + 1 >= sampling.min_new_tokens and stop.ends(ids[row]):
                running[row], finish[row] = False, int(Finish.STOP)
        if not bool(running.any()):
            break
        student.append(token)
        teacher.append(token)
    return ids, logps, finish
