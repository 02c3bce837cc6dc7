"""Short digit tasks a tiny model learns in a minute; two of them are the domains of the quickstart."""

from __future__ import annotations

import random
from itertools import accumulate

from surpass.tasks.task import Problem, Task, final_line

MODULUS = 5


def _digits(rng: random.Random, count: int, base: int = 10) -> str:
    return "".join(str(rng.randrange(base)) for _ in range(count))


def _sort(rng: random.Random, difficulty: int) -> Problem:
    digits = _digits(rng, 5 + 2 * difficulty)
    steps = tuple(f"{d} occurs {digits.count(d)} times" for d in sorted(set(digits)))
    return Problem(f"sort {digits}", "".join(sorted(digits)), steps, f"The smallest digit is {min(digits)}.")


def _missing(rng: random.Random, difficulty: int) -> Problem:
    while len(set(digits := _digits(rng, 7 + difficulty))) == 10:
        continue
    absent = "".join(d for d in "0123456789" if d not in digits)
    steps = tuple(f"{d} is {'there' if d in digits else 'missing'}" for d in "0123456789")
    return Problem(f"missing {digits}", absent, steps, f"The number of missing digits is {len(absent)}.")


def _sums(rng: random.Random, difficulty: int) -> Problem:
    digits = _digits(rng, 6 + difficulty, MODULUS)
    sums = list(accumulate(map(int, digits), lambda total, d: (total + d) % MODULUS))
    steps = tuple(
        f"{total} + {d} = {after}" for total, d, after in zip(sums, digits[1:], sums[1:], strict=False)
    )
    return Problem(
        f"sums {digits}", "".join(map(str, sums[1:])), steps, f"The first sum is {sums[1]}, modulo {MODULUS}."
    )


def _first_wrong(question: str, answer: str, completion: str) -> str | None:
    """These tasks write one digit after the other, so the first differing digit is the first wrong step."""
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
SUMS = Task("sums", f"write the running sums of the digits modulo {MODULUS}", _sums, _first_wrong)
