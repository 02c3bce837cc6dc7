r"""Is a completion's final answer mathematically equal to the gold answer? (math-verify on SymPy)

May hang or eat memory on what a model wrote (`9^{9^{9^9}}`), so it runs in worker processes with their own limits;
math-verify's limits are off, since they need the main thread's SIGALRM.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from math_verify import parse
from math_verify import verify as equal

from surpass.judge.answers import marked_answer, normalised

logging.getLogger("math_verify").setLevel(logging.ERROR)
# Answers stand at the end, and the extraction patterns are slow on very long texts.
TAIL = 4000


def verify(completion: str, answer: Any) -> float:
    r"""1.0 if the final answer equals `answer`, else 0.0.

    Read from the completion, first found: the last `\boxed{}`; what follows the last `####`; what
    math-verify finds (formulas after "answer", the last formula, the last number).
    answer: text (`\frac{1}{2}`, `1,234`, `(3, 4)`, with or without `$`) or a number. Raises ValueError for an answer
    that is blank; errors of the algebra are raised as they are.
    """
    text = str(answer).strip().strip("$").strip()
    if not text:
        raise ValueError(f"the gold answer is blank: {answer!r}")
    tail = completion[-TAIL:]
    given = marked_answer(tail)
    if given is not None and normalised(given.strip("$ ")) == normalised(text):
        return 1.0
    found = tail if given is None else f"${given.strip('$ ')}$"
    predicted = parse(found, parsing_timeout=None, raise_on_error=True)  # type: ignore[arg-type]
    return float(equal(_gold(text), predicted, timeout_seconds=None, raise_on_error=True))


@lru_cache(maxsize=4096)
def _gold(text: str) -> Any:
    return parse(f"${text}$", parsing_timeout=None, raise_on_error=True)  # type: ignore[arg-type]
