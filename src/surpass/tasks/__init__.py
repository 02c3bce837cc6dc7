"""Embedded tasks: problems with verifier, worked solution, hint and critique, made on the spot."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from surpass.judge.environments import Environment
from surpass.records import Prompt
from surpass.tasks.chain import CHAIN
from surpass.tasks.digits import MISSING, SORT, SUMS
from surpass.tasks.lookup import LOOKUP
from surpass.tasks.task import Task, critique, final_line, make_prompt
from surpass.tasks.task import verify as verify_prompt
from surpass.tasks.tools import TOOLS, ToolsEpisode

TASKS: dict[str, Task] = {task.name: task for task in (SORT, SUMS, MISSING, CHAIN, LOOKUP, TOOLS)}
# What acts on the answers of a task whose answers take several turns, by task.
ENVIRONMENTS: dict[str, Callable[[], Environment]] = {TOOLS.name: ToolsEpisode}

__all__ = [
    "ENVIRONMENTS",
    "TASKS",
    "Task",
    "critique",
    "final_line",
    "make_prompt",
    "task_named",
    "task_prompts",
    "verify",
]


def task_named(name: str) -> Task:
    """Raises ValueError with the known names."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1)
        raise ValueError(
            f"unknown embedded task {name!r}{f', did you mean {near[0]!r}?' if near else ''}; there are {list(TASKS)}"
        )
    return TASKS[name]


def task_prompts(name: str, count: int, seed: int, split: str = "train", difficulty: int = 1) -> list[Prompt]:
    """`count` prompts of a task; several tasks joined by `+` take turns. The same call gives the same prompts anywhere.

    split: `train` or `eval`; they share no question. Raises ValueError for unknown tasks and splits.
    """
    tasks = [task_named(part) for part in name.split("+")]
    if split not in ("train", "eval"):
        raise ValueError(f"embedded tasks have the splits train and eval, found {split!r}")
    if difficulty < 1:
        raise ValueError(f"difficulty must be at least 1, found {difficulty}")
    return [make_prompt(tasks[i % len(tasks)], seed, split, i, difficulty) for i in range(count)]


def verify(name: str, completion: str, prompt: Prompt) -> float:
    """Reward of a completion of an embedded task: 1.0 right, 0.0 wrong."""
    for part in name.split("+"):
        task_named(part)
    return verify_prompt(completion, prompt)
