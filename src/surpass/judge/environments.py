"""Environments: what a model acts upon, turn by turn, and what it gets to read in return.

An environment is one episode: it is reset to a prompt, then steps with every action the model writes. What goes wrong
in it is told to the model in words; only an environment that hangs ends its episode.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from surpass.judge.functions import is_target, load_function
from surpass.judge.tools import Tool, Toolbox
from surpass.records import Prompt


@dataclass(frozen=True)
class Step:
    """What one action led to.

    observation: what the model reads next. done: the episode is over, and nobody reads the observation.
    reward: of this step, summed over the episode; None: the judge decides.
    """

    observation: str = ""
    done: bool = False
    reward: float | None = None


class Environment(Protocol):
    """One episode."""

    def reset(self, prompt: Prompt) -> str | None:
        """Begin. What the model reads after the question; None: the question alone."""
        ...

    def step(self, action: str) -> Step:
        """Act: `action` is the text of one turn, without special tokens."""
        ...


@dataclass
class ToolEnvironment:
    """Answers tool calls until a turn makes none: that turn is the final answer, and the judge's.

    announce: tell the model about the tools, after the question.
    """

    toolbox: Toolbox
    announce: bool = False

    def reset(self, prompt: Prompt) -> str | None:
        del prompt
        return self.toolbox.instructions() if self.announce else None

    def step(self, action: str) -> Step:
        answer = self.toolbox.answer(action)
        return Step(done=True) if answer is None else Step(answer)


def environment_named(name: str) -> Callable[[], Environment]:
    """What makes the episodes of `embedded:TASK`, `python` (programs in the sandbox), or one's own `module:function`.

    Raises ValueError for unknown names, and SandboxUnavailable for `python` where nothing can isolate programs.
    """
    if name.startswith("embedded:"):
        from surpass.tasks import ENVIRONMENTS

        task = name.removeprefix("embedded:")
        if task not in ENVIRONMENTS:
            raise ValueError(
                f"embedded task {task!r} has no environment; those that have: {sorted(ENVIRONMENTS)}"
            )
        return ENVIRONMENTS[task]
    if name == "python":
        return _python()
    if is_target(name):
        return load_function(name)
    raise ValueError(
        f"unknown environment {name!r}; there are embedded:TASK, python, and your own as module:function or "
        "path/file.py:function, which gives a new episode at every call"
    )


def environment_of(prompt: Prompt) -> str | None:
    """The environment a prompt is meant for: its `environment` column, or its embedded task's; None: it has none."""
    from surpass.tasks import ENVIRONMENTS

    own = prompt.columns.get("environment")
    if isinstance(own, str) and own:
        return own
    return next((tag for tag in prompt.tags if tag.removeprefix("embedded:") in ENVIRONMENTS), None)


def environments_for(prompts: Sequence[Prompt], name: str | None = None) -> list[Environment | None]:
    """A new episode for each of `N` prompts; None where a prompt has no environment. name: one for all."""
    makers: dict[str, Callable[[], Environment]] = {}
    found: list[Environment | None] = []
    for prompt in prompts:
        wanted = name or environment_of(prompt)
        if wanted is not None and wanted not in makers:
            makers[wanted] = environment_named(wanted)
        found.append(None if wanted is None else makers[wanted]())
    return found


def step_all(
    environments: Sequence[Environment], actions: Sequence[str], time_limit: float, threads: int = 8
) -> list[Step | None]:
    """One step of each environment, several at a time; the results in order.

    time_limit: seconds for one step. An exception becomes an observation. None: the step took longer; Python cannot
    end a thread, so that environment must be left alone from then on.
    """
    results: list[Step | None] = []
    for start in range(0, len(actions), threads):
        part = zip(environments[start : start + threads], actions[start : start + threads], strict=True)
        waiting = [_Stepping(environment, action) for environment, action in part]
        deadline = time.monotonic() + time_limit
        results += [each.result(deadline) for each in waiting]
    return results


class _Stepping:
    """A step under way in a thread of its own, which does not keep the program alive."""

    def __init__(self, environment: Environment, action: str) -> None:
        self.found: Step | None = None
        self.thread = threading.Thread(target=self._run, args=(environment, action), daemon=True)
        self.thread.start()

    def _run(self, environment: Environment, action: str) -> None:
        try:
            self.found = environment.step(action)
        except Exception as error:
            self.found = Step(f"error: {type(error).__name__}: {error}")

    def result(self, deadline: float) -> Step | None:
        self.thread.join(max(0.0, deadline - time.monotonic()))
        return self.found


def _python() -> Callable[[], Environment]:
    from surpass.judge.sandbox import check_sandbox, run_python

    def run(code: str) -> str:
        return run_python(code).report()

    check_sandbox()
    tool = Tool("python", "run a program; gives what it prints", ("code",), run)

    def make() -> Environment:
        return ToolEnvironment(Toolbox((tool,)), announce=True)

    return make
