"""A key-value table and a sum over it: the answer needs a look-up for every name, then a calculation."""

from __future__ import annotations

import random
import re
from collections import Counter

from surpass.tasks.task import Problem, Task

NAMES = "abcdefgh"


def _draw(rng: random.Random, difficulty: int) -> Problem:
    names = rng.sample(NAMES, min(len(NAMES), 2 + difficulty))
    table = {name: rng.randrange(10, 100) for name in names}
    asked = rng.sample(names, min(len(names), 1 + difficulty))
    rows = ", ".join(f"{name}={value}" for name, value in table.items())
    total = sum(table[name] for name in asked)
    steps = [f"lookup({name}) -> {table[name]}" for name in asked]
    steps.append(f"calc({' + '.join(str(table[name]) for name in asked)}) -> {total}")
    return Problem(
        f"table: {rows}. what is {' + '.join(asked)}?",
        str(total),
        tuple(steps),
        f"{asked[0]} is {table[asked[0]]}.",
    )


def _first_wrong(question: str, answer: str, completion: str) -> str | None:
    """Follows the calls a completion writes: look-ups in any order, then the calculation."""
    table = dict(re.findall(r"(\w)=(\d+)", question))
    needed = question.rpartition("what is ")[2].removesuffix("?").split(" + ")
    calls = re.findall(r"(lookup|calc)\((.*?)\) *-> *(-?\w+)", completion)
    looked_up = set()
    for i, (call, argument, result) in enumerate(calls, start=1):
        if call == "lookup":
            right = table.get(argument, "no such name")
            looked_up.add(argument)
        else:
            numbers = re.findall(r"\d+", argument)
            if missing := [name for name in needed if name not in looked_up]:
                return f"Step {i} comes too early: {missing[0]} has not been looked up."
            if Counter(numbers) != Counter(table[name] for name in needed):
                wanted = " + ".join(table[name] for name in needed)
                return f"Step {i} is wrong: it should be calc({wanted}), not calc({argument})."
            right = str(sum(map(int, numbers)))
        if result != right:
            return f"Step {i} is wrong: {call}({argument}) gives {right}, not {result}."
    if calls and (missing := [name for name in needed if name not in looked_up]):
        return f"Step {len(calls) + 1} is missing: {missing[0]} has not been looked up."
    return f"The last line should be the final value, {answer}, alone."


LOOKUP = Task("lookup", "look names up in a table and add their values", _draw, _first_wrong)
