"""Arithmetic chains modulo a prime: several steps, each of which can be checked."""

from __future__ import annotations

import random
import re

from surpass.tasks.task import Problem, Task

PRIME = 97


def _apply(value: int, operation: str, operand: int) -> int:
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operation] % PRIME


def _draw(rng: random.Random, difficulty: int) -> Problem:
    start = rng.randrange(PRIME)
    operations = [(rng.choice("+-*"), rng.randrange(2, 10)) for _ in range(difficulty + 1)]
    question = f"start with {start}; " + "; ".join(f"{o} {n}" for o, n in operations) + f"; modulo {PRIME}"
    value, steps = start, []
    for operation, operand in operations:
        result = _apply(value, operation, operand)
        steps.append(f"{value} {operation} {operand} = {result}")
        value = result
    first = steps[0].split(" = ")[1]
    return Problem(question, str(value), tuple(steps), f"After the first step the value is {first}.")


def _first_wrong(question: str, answer: str, completion: str) -> str | None:
    """Follows the steps a completion writes (`a op b = c`), one line each, against the right chain."""
    del answer
    value = int(re.findall(r"start with (\d+)", question)[0])
    for i, (operation, operand) in enumerate(re.findall(r"; ([+*-]) (\d+)", question), start=1):
        value = _apply(value, operation, int(operand))
        written = re.findall(rf"{re.escape(operation)} {operand} = (\d+)", completion)
        if written and int(written[0]) != value:
            return f"Step {i} is wrong: the value after {operation} {operand} is {value}, not {written[0]}."
    return f"The last line should be the final value, {value}."


CHAIN = Task("chain", f"follow a chain of operations modulo {PRIME}", _draw, _first_wrong)
