"""Two short digit tasks a tiny model learns steadily; the domains of the quickstart."""

from __future__ import annotations

import random

from surpass.tasks.task import Problem, Task, final_line


def _digits(rng: random.Random, count: int) -> str:
    return "".join(str(rng.randrange(10)) for _ in range(count))


def _sort(rng: random.Random, difficulty: int) -> Problem:
    digits = _digits(rng, 5 + 2 * difficulty)
    steps = tuple(f"{d}: {digits.count(d)} times" for d in sorted(set(digits)))
    return Problem(f"sort {digits}", "".join(sorted(digits)), steps, f"The smallest digit is {min(digits)}.")


def _missing(rng: random.Random, difficulty: int) -> Problem:
    while True:
        digits = _digits(rng, 7 + difficulty)
        absent = "".join(d for d in "0123456789" if d not in digits)
        if absent:
            break
    steps = tuple(f"{d}: {'there' if d in digits else 'missing'}" for d in "0123456789")
    return Problem(f"missing {digits}", absent, steps, f"{len(absent)} digits are missing.")


def _first_wrong(question: str, answer: str, completion: str) -> str | None:
    """Both tasks write one digit after the other, so the first differing digit is the first wrong step."""
    del question
    written = final_line(completion)
    for i, (mine, right) in enumerate(zip(written, answer, strict=False)):
        if mine != right:
            return f"Digit {i + 1} is wrong: it is {mine!r} and should be {right!r}."
    if len(written) < len(answer):
        return f"The answer stops after {len(written)} digits; {len(answer)} are needed."
    if len(written) > len(answer):
        return f"The answer goes on after digit {len(answer)}, where it should end."
    return None


SORT = Task("sort", "write the digits in ascending order", _sort, _first_wrong)
MISSING = Task("missing", "write the digits that do not occur, in ascending order", _missing, _first_wrong)
