"""Ctrl-C and SIGTERM: finish the present update, save, and say how to go on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Interrupted(SystemExit):
    """The run was asked to stop (Ctrl-C or SIGTERM), saved its state, and says how to go on."""


class Stoppable(Protocol):
    """A loop that looks at `stop`, the number of the signal that asked it to end, after every update."""

    stop: int | None


@contextmanager
def interrupts(loop: Stoppable) -> Iterator[None]:
    """SIGINT and SIGTERM ask the loop to stop after the present update; a second one stops at once."""

    def ask(number: int, frame: Any) -> None:
        del frame
        if loop.stop is not None:
            raise KeyboardInterrupt
        loop.stop = number
        print("\nstopping after this update (once more: at once, without saving)", flush=True)

    try:
        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are somebody else's business
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
