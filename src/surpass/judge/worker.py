"""A verifier process: reads tasks as JSON lines, answers with JSON lines. Started by `WorkerPool`, not by hand.

python -m surpass.judge.worker module:function TIME_LIMIT MEMORY_LIMIT
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from typing import IO

from surpass.judge.functions import load_function


def main(target: str, time_limit: float, memory_limit: int) -> None:
    """Serve until the input ends. The parent kills at the time limit; the alarm is for a worker whose parent died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The default action ends the process in the kernel, whatever the interpreter is busy with.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    answers = os.fdopen(os.dup(1), "wb")
    # What a verifier prints must not be taken for an answer.
    os.dup2(2, 1)
    _limit_memory(memory_limit)
    function = load_function(target)
    _send(answers, {"ready": True})
    for line in sys.stdin.buffer:
        task = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, 2 * time_limit + 5)
        try:
            score = float(function(task["completion"], task["answer"]))
            if not math.isfinite(score):
                raise ValueError(f"{target} returned {score}; expected a finite number")
            answer = {"score": score}
        except Exception:
            answer = {"error": traceback.format_exc(limit=20)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(answers, answer)


def _send(answers: IO[bytes], message: Mapping[str, object]) -> None:
    answers.write(json.dumps(message).encode() + b"\n")
    answers.flush()


def _limit_memory(limit: int) -> None:
    try:
        import resource
    except ImportError:
        return
    # Data, not address space: libraries map far more than they use.
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == -1 else min(limit, hard), hard))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
