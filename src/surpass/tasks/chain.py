"""Arithmetic chains modulo a prime: several steps, each of which can be checked."""

from __future__ import annotations

import random
import re

from surpass.tasks.task import Problem, Task

PRIME = 97


def _draw(rng: random.Random, difficulty: int) -> Problem:
    operations = [f"{rng.choice('+-*')} {rng.randrange(2, 10)}" for _ in range(difficulty + 1)]
    question = "; ".join([f"start with {rng.randrange(PRIME)}", *operations, f"modulo {PRIME}"])
    steps = _steps(question)
    first, last = (step.split(" = ")[1] for step in (steps[0], steps[-1]))
    return Problem(question, last, steps, f"After the first step the value is {first}.")


def _steps(question: str) -> tuple[str, ...]:
    """The worked lines `value operation operand = result`."""
    start, *operations, _ = question.split("; ")
    value, steps = int(start.removeprefix("start with ")), []
    for operation, operand in (text.split() for text in operations):
        number = int(operand)
        result = {"+": value + number, "-": value - number, "*": value * number}[operation] % PRIME
        steps.append(f"{value} {operation} {number} = {result}")
        value = result
    return tuple(steps)


def _first_wrong(question: str, answer: str, completion: str) -> str | None:
    """Compares the steps a completion writes, in order, with the only right ones."""
    written = [" ".join(found) for found in re.findall(r"(\d+) *([+*-]) *(\d+) *(=) *(\d+)", completion)]
    steps = _steps(question)
    for i, step in enumerate(steps[: len(written)]):
        if written[i] != step:
            return f"Step {i + 1} is wrong: it says {written[i]!r} and should say {step!r}."
    if written and len(written) < len(steps):
        return f"Step {len(written) + 1} is missing: {steps[len(written)]!r}."
    return f"The last line should be the final value, {answer}, alone."


CHAIN = Task("chain", f"follow a chain of operations modulo {PRIME}", _draw, _first_wrong)
