"""Verifiers that misbehave, run in worker processes by the tests."""

import os
import time
from typing import Any


def verify(completion: str, answer: Any) -> float:
    """Does what the completion says; else compares."""
    print("noise on standard output must not be taken for an answer")
    match completion:
        case "hang":
            while True:
                pass
        case "sleep":
            time.sleep(600)
        case "die":
            os._exit(7)
        case "raise":
            raise KeyError("no such thing")
        case "nan":
            return float("nan")
        case "memory":
            return float(len(bytearray(1 << 34)))
        case "pid":
            return float(os.getpid())
    return float(completion == str(answer))


def rewards(prompts: list, completions: list, **columns: Any) -> list[float]:
    return [0.5] * len(completions)
