"""How hard a prompt is for the student, and streams that are balanced by it."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence

from surpass.records import Prompt


def pass_rates(
    ids: Sequence[str], rewards: Sequence[float], above: float = 0.5, smooth: bool = False
) -> dict[str, float]:
    """Share of right answers by prompt id; the id and the reward of every answer are given.

    An answer is right where its reward is above `above`. A NaN reward (not judged) does not count, and a prompt
    without any judged answer is left out. smooth: `(right + 1/2) / (judged + 1)`, never exactly 0 or 1.
    """
    counted: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for prompt, reward in zip(ids, rewards, strict=True):
        if reward == reward:
            counted[prompt][0] += reward > above
            counted[prompt][1] += 1
    if smooth:
        return {prompt: (right + 0.5) / (judged + 1) for prompt, (right, judged) in counted.items()}
    return {prompt: right / judged for prompt, (right, judged) in counted.items()}


def flat_difficulty(
    prompts: Sequence[Prompt], rates: Mapping[str, float], bins: int = 5, seed: int = 0
) -> list[Prompt]:
    """Prompts repeated until every difficulty is as frequent as the most frequent one (Uni-OPD, arXiv 2605.03677).

    Pass rates fall into `bins` equal intervals of [0, 1]; every interval that has a prompt is filled up to the size
    of the fullest, each of its prompts as often as the others or once more (which ones is drawn from the seed). No
    prompt is dropped: those that are always or never solved help too (without them the paper loses 1 to 3 points).
    Raises ValueError for a prompt without a pass rate and for fewer than one bin.
    """
    if bins < 1:
        raise ValueError(f"expected at least 1 difficulty bin, found {bins}")
    unknown = [prompt.id for prompt in prompts if prompt.id not in rates]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(prompts)} prompts have no pass rate (first: {unknown[0]!r}); estimate them all first"
        )
    members: dict[int, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        members[min(int(rates[prompt.id] * bins), bins - 1)].append(prompt)
    size = max((len(pool) for pool in members.values()), default=0)
    balanced: list[Prompt] = []
    for index in sorted(members):
        pool = members[index]
        whole, more = divmod(size, len(pool))
        extra = random.Random(f"{seed}/{index}").sample(pool, more)
        balanced += pool * whole + extra
    return balanced
