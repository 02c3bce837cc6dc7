"""Evaluate a model: `n` answers to every prompt, judged, then summarised per domain and overall."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from surpass.evaluate.summary import OVERALL, Evaluation, Sample, number, summarise
from surpass.records import Finish, Prompt, Ragged
from surpass.rollout.engine import Engine, Sampling
from surpass.rollout.sampling import sequence_seed

# Evaluation draws at a step no training run reaches, so it never repeats the numbers of a training rollout,
# and every evaluation of a run draws the same ones: differences between checkpoints are not sampling luck.
EVALUATION_STEP = -1
# Shorter privileged texts ("7", "yes") stand in many prompts by chance.
LEAK_LENGTH = 12


class Judged(Protocol):
    """What `evaluate` reads of a judgement: `reward` `[N]`, NaN where the verifier failed."""

    @property
    def reward(self) -> Tensor: ...


def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    prompt_ids: Ragged,
    judge: Callable[[Sequence[Prompt], Sequence[str]], Judged],
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int = 8,
    sampling: Sampling | None = None,
    ks: Sequence[int] = (1,),
    seed: int = 0,
    vote: Callable[[Prompt, str], Hashable | None] | None = None,
    solved_at: float = 0.5,
    level: float = 0.95,
    progress: Callable[[int, int], None] | None = None,
    out: Path | None = None,
) -> Evaluation:
    """Write `n` answers to each of `P` prompts, judge them and summarise.

    prompt_ids: `P` rendered prompts. vote: reads the answer out of a completion (None: nothing found);
    without it there is no maj@k. solved_at: an answer is correct when its reward is at least this.
    out: a folder to write `evaluation.json` and `samples.jsonl` to.

    Privileged contexts are taken off the prompts before they are judged, and a rendered prompt that contains
    one raises ValueError, as do repeated prompt ids and a `k` larger than `n`.
    """
    sampling = sampling or Sampling()
    _check(prompts, prompt_ids, tokenizer, n, ks)
    seeds = torch.tensor(
        [sequence_seed(seed, EVALUATION_STEP, prompt.id, i) for prompt in prompts for i in range(n)],
        dtype=torch.int64,
    )
    completions = engine.generate(prompt_ids, n, sampling, seeds, progress)
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in completions.response.tolist()]
    asked = [replace(prompt, privileged={}) for prompt in prompts for _ in range(n)]
    rewards = judge(asked, texts).reward.tolist()
    if len(rewards) != len(asked):
        raise ValueError(f"the judge returned {len(rewards)} rewards for {len(asked)} completions")
    lengths, finish = completions.response.lengths.tolist(), completions.finish.tolist()
    samples = tuple(
        Sample(
            prompt_id=prompt.id,
            domain=prompt.domain,
            completion=text,
            reward=number(reward),
            length=length,
            finish=Finish(code).name,
            vote=vote(prompt, text) if vote else None,
        )
        for prompt, text, reward, length, code in zip(asked, texts, rewards, lengths, finish, strict=True)
    )
    result = summarise(
        samples,
        n=n,
        ks=tuple(ks),
        seed=seed,
        sampling={**asdict(sampling), "stop": list(sampling.stop)},
        solved_at=solved_at,
        level=level,
    )
    if out is not None:
        result.save(out)
    return result


def _check(
    prompts: Sequence[Prompt],
    prompt_ids: Ragged,
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    ks: Sequence[int],
) -> None:
    if not prompts:
        raise ValueError("there is no prompt to evaluate on")
    if len(prompts) != len(prompt_ids):
        raise ValueError(
            f"{len(prompts)} prompts but {len(prompt_ids)} rendered prompts; they must match one to one"
        )
    if bad := [k for k in ks if not 1 <= k <= n]:
        raise ValueError(f"pass@k needs 1 <= k <= n; found k = {bad} with n = {n} answers per prompt")
    seen: set[str] = set()
    for prompt, ids in zip(prompts, prompt_ids.tolist(), strict=True):
        if prompt.id in seen:
            raise ValueError(
                f"prompt id {prompt.id!r} occurs twice; results are kept by id, so ids must be unique"
            )
        if prompt.domain == OVERALL:
            raise ValueError(
                f"prompt {prompt.id!r} has domain {OVERALL!r}, the name of the row over all domains"
            )
        seen.add(prompt.id)
        secrets = {name: text for name, text in prompt.privileged.items() if len(text.strip()) >= LEAK_LENGTH}
        if not secrets:
            continue
        shown, public = str(tokenizer.decode(ids)), _public_text(prompt)
        for name, text in secrets.items():
            if text.strip() in shown and text.strip() not in public:
                raise ValueError(
                    f"the rendered prompt {prompt.id!r} contains its privileged {name!r}; evaluation must "
                    "ask the plain prompt, so render it without any view"
                )


def _public_text(prompt: Prompt) -> str:
    if isinstance(prompt.messages, str):
        return prompt.messages
    return "\n".join(str(message.get("content", "")) for message in prompt.messages)
