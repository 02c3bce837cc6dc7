"""What an embedded task is: a generator with verifier, worked solution, hint and step-level critique. No download."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from surpass.records import Prompt


@dataclass(frozen=True)
class Problem:
    """One drawn problem. answer: what a right completion ends in; steps: the worked solution, line by line."""

    question: str
    answer: str
    steps: tuple[str, ...]
    hint: str


@dataclass(frozen=True)
class Task:
    """A family of problems.

    draw: `(random, difficulty) -> Problem`; difficulty 1 is the task's usual size. first_wrong: `(question, answer,
    completion) -> str | None`, a sentence naming the first wrong step of a completion, None where there is none.
    """

    name: str
    about: str
    draw: Callable[[random.Random, int], Problem]
    first_wrong: Callable[[str, str, str], str | None]


def final_line(completion: str) -> str:
    """What is taken as the answer: the last non-empty line, without surrounding blanks."""
    lines = [line.strip() for line in completion.strip().splitlines() if line.strip()]
    return lines[-1] if lines else ""


def make_prompt(task: Task, seed: int, split: str, index: int, difficulty: int = 1) -> Prompt:
    """Problem number `index` of a split: equal wherever and whenever it is drawn.

    The two splits never share a question: a question belongs to the split its own hash says, and is drawn again until
    it falls into the wanted one.
    """
    rng = random.Random(f"{task.name}/{seed}/{split}/{index}/{difficulty}")
    problem = task.draw(rng, difficulty)
    while split_of(problem.question) != split:
        problem = task.draw(rng, difficulty)
    solution = "\n".join([*problem.steps, problem.answer])
    return Prompt(
        id=f"{task.name}{difficulty}-{split}-{seed}-{index}",
        messages=({"role": "user", "content": problem.question},),
        answer=problem.answer,
        domain=task.name,
        response=problem.answer,
        tags=(f"embedded:{task.name}", f"difficulty:{difficulty}"),
        privileged={"solution": solution, "hint": problem.hint, "demonstration": problem.answer},
    )


def split_of(question: str) -> str:
    """`eval` for one question in eight, else `train`."""
    return "eval" if hashlib.blake2b(question.encode(), digest_size=2).digest()[0] % 8 == 0 else "train"


def verify(completion: str, prompt: Prompt) -> float:
    """1.0 where the completion's last line is the answer, letter by letter; else 0.0."""
    return float(final_line(completion) == prompt.answer)


def critique(task: Task, prompt: Prompt, completion: str) -> str:
    """What is wrong with a completion, naming its first wrong step; or that it is right."""
    if verify(completion, prompt):
        return "The answer is right."
    question = (
        str(prompt.messages[-1]["content"]) if not isinstance(prompt.messages, str) else prompt.messages
    )
    return (
        task.first_wrong(question, str(prompt.answer), completion)
        or "The answer is not in the form asked for."
    )
