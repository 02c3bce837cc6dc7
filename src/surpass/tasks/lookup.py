"""A key-value table and an expression over it: the answer needs a look-up for every name, then arithmetic."""

from __future__ import annotations

import random
import re

from surpass.tasks.task import Problem, Task

NAMES = "abcdefgh"


def _draw(rng: random.Random, difficulty: int) -> Problem:
    names = rng.sample(NAMES, min(len(NAMES), 2 + difficulty))
    table = {name: rng.randrange(10, 100) for name in names}
    asked = rng.sample(names, min(len(names), 1 + difficulty))
    rows = ", ".join(f"{name}={value}" for name, value in table.items())
    total = sum(table[name] for name in asked)
    steps = [f"lookup({name}) -> {table[name]}" for name in asked]
    steps.append(f"calc({' + '.join(str(table[n]) for n in asked)}) -> {total}")
    return Problem(
        f"table: {rows}. what is {' + '.join(asked)}?",
        str(total),
        tuple(steps),
        f"{asked[0]} is {table[asked[0]]}.",
    )


def _first_wrong(question: str, answer: str, completion: str) -> str | None:
    """Checks every `lookup(name) -> value` against the table, then the calculation."""
    table = dict(re.findall(r"(\w)=(\d+)", question))
    for i, (name, value) in enumerate(re.findall(r"lookup\((\w)\) -> (\d+)", completion), start=1):
        if table.get(name) != value:
            return f"Step {i} is wrong: lookup({name}) gives {table.get(name, 'no such name')}, not {value}."
    return f"The final value should be {answer}."


LOOKUP = Task("lookup", "look names up in a table and add their values", _draw, _first_wrong)
