"""Environments answer in words, whatever happens in them; only one that hangs ends its episode."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from surpass.judge.environments import Environment, Step, environment_named, environments_for, step_all
from surpass.judge.sandbox import SandboxUnavailable
from surpass.records import Prompt
from surpass.tasks import task_prompts
from surpass.tasks.tools import page_of

OWN = """
from surpass.judge.environments import Step

class Echo:
    def reset(self, prompt):
        return None

    def step(self, action):
        return Step(action, done=True, reward=1.0)
"""


class Acting:
    """Steps as told by the action itself."""

    def __init__(self) -> None:
        self.steps = 0
        self.released = threading.Event()

    def reset(self, prompt: Prompt) -> str | None:
        del prompt
        return None

    def step(self, action: str) -> Step:
        self.steps += 1
        if action == "raise":
            raise KeyError("door")
        if action == "hang":
            self.released.wait(30)
        return Step(f"saw {action}")


def test_the_embedded_task_is_solved_by_its_own_steps():
    for prompt in task_prompts("tools", 20, 3, difficulty=2):
        (environment,) = environments_for([prompt])
        assert environment is not None and environment.reset(prompt) is None
        *calls, answer = prompt.privileged["solution"].splitlines()
        for call in calls:
            action, _, result = call.partition(" -> ")
            assert environment.step(action) == Step(result)
        assert answer == prompt.answer
        assert environment.step(answer) == Step(done=True)


def test_the_embedded_task_does_not_show_its_values():
    for prompt in task_prompts("tools", 20, 4):
        question = str(prompt.messages[0]["content"])  # type: ignore[index]
        assert question.startswith("page ") and "=" not in question
    pages = [tuple(page_of(f"page {i}.").values()) for i in range(50)]
    assert len(set(pages)) == 50
    with pytest.raises(ValueError, match=r"begins with 'page NUMBER\.'"):
        page_of("what is a?")


def test_episodes_do_not_share_anything():
    first, second = task_prompts("tools", 2, 0)
    one, two = environments_for([first, second])
    assert one is not None and two is not None
    one.reset(first)
    two.reset(second)
    found = [environment.step("lookup(a)").observation for environment in (one, two)]
    wanted = [page_of(str(p.messages[0]["content"]))["a"] for p in (first, second)]  # type: ignore[index]
    assert found == wanted and wanted[0] != wanted[1]


def test_which_environment_a_prompt_has(tmp_path: Path):
    (tmp_path / "own.py").write_text(OWN)
    own = f"{tmp_path / 'own.py'}:Echo"
    (tools,), (sort,) = task_prompts("tools", 1, 0), task_prompts("sort", 1, 0)
    kinds = [
        type(e).__name__ for e in environments_for([tools, sort, replace(sort, columns={"environment": own})])
    ]
    assert kinds == ["ToolsEpisode", "NoneType", "Echo"]
    assert [type(e).__name__ for e in environments_for([tools, sort], own)] == ["Echo", "Echo"]


def test_unknown_environments_are_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"'sort' has no environment; those that have: \['tools'\]"):
        environment_named("embedded:sort")
    with pytest.raises(ValueError, match="unknown environment 'pyhton'; there are embedded:TASK, python"):
        environment_named("pyhton")

    def refuse() -> str:
        raise SandboxUnavailable("nothing here can isolate them")

    monkeypatch.setattr("surpass.judge.sandbox.check_sandbox", refuse)
    with pytest.raises(SandboxUnavailable, match="nothing here can isolate"):
        environment_named("python")


def test_errors_are_told_and_a_step_that_hangs_is_left_behind():
    environments: list[Environment] = [Acting() for _ in range(4)]
    begun = time.monotonic()
    results = step_all(environments, ["a", "raise", "hang", "b"], time_limit=0.3, threads=2)
    assert results == [Step("saw a"), Step("error: KeyError: 'door'"), None, Step("saw b")]
    assert time.monotonic() - begun < 10  # far below the 30 s that one of them would have taken
    environments[2].released.set()  # type: ignore[attr-defined]


def test_steps_run_side_by_side():
    """Two steps that wait for each other both end, so they cannot have been taken one after the other."""
    barrier = threading.Barrier(2)

    class Meeting(Acting):
        def step(self, action: str) -> Step:
            barrier.wait(10)
            return Step(action)

    assert step_all([Meeting(), Meeting()], ["a", "b"], time_limit=20) == [Step("a"), Step("b")]
