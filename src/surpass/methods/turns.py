"""What a method with an environment asks of the house: episodes, their rollouts and their rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from surpass.judge.environments import environment_of, environments_for
from surpass.methods.run import Run
from surpass.records import Prompt, Rollouts
from surpass.rollout.episodes import joined
from surpass.rollout.turns import Episode, Reader, write_turns


def write_episodes(
    run: Run,
    prompts: Sequence[Prompt],
    samples: int,
    max_turns: int,
    environment: str | None = None,
    time_limit: float = 10.0,
) -> list[Episode]:
    """`samples` episodes of each of `P` prompts by the student, those of prompt `i` at `i * samples` and on.

    environment: by name, for every prompt; None: each prompt's own, and a single turn where it has none.
    `run.sampling.max_new_tokens` bounds the whole answer, observations included. time_limit: seconds for one step.
    """
    student = run.student
    reader = Reader(student.tokenizer, student.eos_ids, student.max_length, run.template_args)
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    with student.adapter(True):
        episodes = write_turns(
            run.engine,
            prompts,
            run.prompt_ids(prompts),
            samples,
            environments_for(repeated, environment),
            reader=reader,
            sampling=run.sampling,
            seeds=run.seeds(prompts, samples),
            max_turns=max_turns,
            time_limit=time_limit,
            progress=run.progress,
        )
    turns = [len(e.turns) for e in episodes]
    run.tokens["generated"] += sum(len(turn.action) for e in episodes for turn in e.turns)
    run.metrics["turns/mean"] = sum(turns) / max(len(turns), 1)
    run.metrics["turns/max"] = float(max(turns, default=0))
    return episodes


def generate_turns(
    run: Run,
    prompts: Sequence[Prompt],
    samples: int,
    max_turns: int,
    environment: str | None = None,
    time_limit: float = 10.0,
    rows: Callable[[Sequence[Episode], Tensor, float], Rollouts] = joined,
) -> Rollouts:
    """Episodes as rollouts; where no prompt has an environment, plain answers of `run.generate`.

    rows: `joined`, one row per episode, or `by_action`, one row per action in the state it was written in.
    """
    if environment is None and not any(environment_of(prompt) for prompt in prompts):
        return run.generate(prompts, samples)
    episodes = write_episodes(run, prompts, samples, max_turns, environment, time_limit)
    groups = torch.arange(len(prompts)).repeat_interleave(samples)
    return rows(episodes, groups, run.sampling.temperature)


def reward_turns(run: Run, rollouts: Rollouts) -> Rollouts:
    """The environment's reward where it gave one, else the judge's of the last turn."""
    own = rollouts.components.get("environment")
    if own is None:
        return run.reward(rollouts)
    if not bool(own.isnan().any()):
        return rollouts.with_(reward=own)
    judged = run.reward(rollouts)
    assert judged.reward is not None
    return replace(judged, reward=torch.where(own.isnan(), judged.reward, own))
