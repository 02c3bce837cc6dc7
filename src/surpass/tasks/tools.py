"""A question that only tools can answer: values stand on numbered pages, which nobody has seen.

    page 417. what is b + e?
    lookup(b)          -> 31
    lookup(e)          -> 58
    calc(31 + 58)      -> 89
    89

Each turn of the model is one call, in the plain form; a turn without a call is the final answer.
"""

from __future__ import annotations

import hashlib
import random
import re

from surpass.judge.environments import ToolEnvironment
from surpass.judge.tools import CALCULATOR, Tool, Toolbox, lookup
from surpass.records import Prompt
from surpass.tasks.task import Problem, Task, final_line

NAMES = "abcdefgh"
PAGES = 1000


def page_of(question: str) -> dict[str, str]:
    """The values of all names on the page a question names: two digits each, fixed for ever."""
    found = re.search(r"page (\d+)\.", question)
    if found is None:
        raise ValueError(f"expected a question that begins with 'page NUMBER.', found {question!r}")
    drawn = {n: hashlib.blake2b(f"{found[1]}/{n}".encode(), digest_size=4).digest() for n in NAMES}
    return {name: str(10 + int.from_bytes(digest, "little") % 90) for name, digest in drawn.items()}


def _draw(rng: random.Random, difficulty: int) -> Problem:
    page = rng.randrange(PAGES)
    asked = rng.sample(NAMES, min(len(NAMES), 1 + difficulty))
    question = f"page {page}. what is {' + '.join(asked)}?"
    values = page_of(question)
    total = str(sum(int(values[name]) for name in asked))
    steps = [f"lookup({name}) -> {values[name]}" for name in asked]
    steps.append(f"calc({' + '.join(values[name] for name in asked)}) -> {total}")
    return Problem(question, total, tuple(steps), f"{asked[0]} is {values[asked[0]]}.")


def _first_wrong(question: str, answer: str, completion: str) -> str | None:
    """Calls with their results, as the worked solution writes them, are checked one by one."""
    values = page_of(question)
    for call, argument, result in re.findall(r"(lookup|calc)\((.*?)\) *-> *(-?\w+)", completion):
        if call == "lookup":
            right = values.get(argument, "no such name")
        else:
            right = str(sum(map(int, re.findall(r"\d+", argument))))
        if result != right:
            return f"{call}({argument}) gives {right}, not {result}."
    if re.fullmatch(r"\w+\(.*\)", final_line(completion)):
        return f"It ends with a call; the last line should be the final value, {answer}, alone."
    return f"The last line should be the final value, {answer}, alone."


TOOLS = Task("tools", "look values up with lookup(name), add them with calc(expression)", _draw, _first_wrong)


class ToolsEpisode(ToolEnvironment):
    """The two tools over the page of one question."""

    def __init__(self) -> None:
        super().__init__(Toolbox((CALCULATOR,), "plain"))

    def reset(self, prompt: Prompt) -> str | None:
        messages = prompt.messages
        values = page_of(messages if isinstance(messages, str) else str(messages[-1]["content"]))
        read = Tool("lookup", "the value of a name", ("name",), lambda name: lookup(values, name))
        self.toolbox = Toolbox((read, CALCULATOR), "plain")
        return None
