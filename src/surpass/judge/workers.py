"""Verifiers in processes that can be killed.

A worker is `python -m surpass.judge.worker` talking JSON lines over pipes: no fork of a process with threads or a GPU,
no pickles, no re-import of the user's main script, and it works from any thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal

START_LIMIT = 120.0  # seconds for a worker to import its verifier


@dataclass(frozen=True)
class Outcome:
    """What became of one task: a score, or a failure with its message (the traceback, for an error)."""

    score: float | None = None
    failure: Literal["timeout", "error"] | None = None
    message: str = ""


class _Worker:
    """One process. task: index of the task it works on; deadline: when it must have answered, monotonic seconds."""

    def __init__(self, target: str, time_limit: float, memory_limit: int) -> None:
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by `kill`
        self.process = subprocess.Popen(
            [sys.executable, "-m", "surpass.judge.worker", target, str(time_limit), str(memory_limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        self.ready = False
        self.task: int | None = None
        self.deadline = time.monotonic() + START_LIMIT
        self._read = b""

    def give(self, task: int, completion: str, answer: Any, time_limit: float) -> None:
        line = json.dumps({"completion": completion, "answer": answer}, default=str).encode() + b"\n"
        assert self.process.stdin is not None
        self.task, self.deadline = task, time.monotonic() + time_limit
        rest = memoryview(line)
        # A worker that died just now has closed its end; the end of its output will say so to `take`.
        with contextlib.suppress(BrokenPipeError):
            while rest:
                rest = rest[self.process.stdin.write(rest) or 0 :]

    def take(self) -> dict[str, Any] | None:
        """The next message if it is complete, else None. Raises EOFError where the process has ended."""
        assert self.process.stdout is not None
        chunk = os.read(self.process.stdout.fileno(), 1 << 16)
        if not chunk:
            raise EOFError
        self._read += chunk
        line, newline, rest = self._read.partition(b"\n")
        if not newline:
            return None
        self._read = rest
        return json.loads(line)

    def last_words(self) -> str:
        """The end of what it wrote to stderr."""
        self.errors.seek(0, os.SEEK_END)
        self.errors.seek(max(0, self.errors.tell() - 4000))
        return self.errors.read().decode(errors="replace").strip()

    def end(self) -> int:
        """The exit status of a process that closed its output (negative: the signal that ended it)."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=5)
        self.process.kill()
        return self.process.wait()

    def kill(self) -> None:
        """End it now."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                stream.close()


class WorkerPool:
    """`workers` processes that call one verifier, kept between calls and ended with the program.

    target: `module:function` or `path/file.py:function` of signature `f(completion: str, answer) -> float`; the answer
    arrives as JSON has it. time_limit: seconds for each task, counted from when a running worker gets it.
    memory_limit: bytes of data each worker may hold; beyond, the task is an error (MemoryError).
    """

    def __init__(
        self, target: str, workers: int = 1, time_limit: float = 5.0, memory_limit: int = 4 << 30
    ) -> None:
        if workers < 1:
            raise ValueError(f"expected at least one worker, found {workers}")
        if time_limit <= 0:
            raise ValueError(f"the time limit must be positive, found {time_limit} seconds")
        self.target, self.workers = target, workers
        self.time_limit, self.memory_limit = time_limit, memory_limit
        self._pool: list[_Worker] = []
        self._lock = threading.Lock()
        # The owner's process id: a forked child inherits this object, and must not end its parent's workers.
        self._finalizer = weakref.finalize(self, _end, self._pool, os.getpid())

    def start(self) -> None:
        """Start missing workers and return at once; their imports go on beside other work."""
        while len(self._pool) < self.workers:
            self._pool.append(self._new())

    def run(self, tasks: Sequence[tuple[str, Any]]) -> list[Outcome]:
        """Outcomes of `(completion, answer)` tasks, in order. A worker that is stuck or dies is replaced.

        Raises RuntimeError where the verifier cannot even be imported.
        """
        outcomes: list[Outcome | None] = [None] * len(tasks)
        waiting = deque(range(len(tasks)))
        with self._lock:
            try:
                while waiting or any(w.task is not None for w in self._pool):
                    self.start()
                    for place, worker in enumerate(self._pool):
                        if waiting and worker.ready and worker.task is None:
                            if worker.process.poll() is not None:
                                worker = self._replace(place)
                                continue
                            index = waiting.popleft()
                            worker.give(index, *tasks[index], self.time_limit)
                    self._listen(outcomes)
            finally:
                # An interrupted call must not leave answers behind for the next one to read.
                for place, worker in enumerate(self._pool):
                    if worker.task is not None:
                        self._replace(place)
        return [outcome for outcome in outcomes if outcome is not None]

    def close(self) -> None:
        """End all workers. The pool starts new ones when it is used again."""
        with self._lock:
            _end(self._pool, os.getpid())

    def _listen(self, outcomes: list[Outcome | None]) -> None:
        """Wait for the next message or deadline, and settle what is due."""
        expected = {p: w for p, w in enumerate(self._pool) if w.task is not None or not w.ready}
        with selectors.DefaultSelector() as selector:
            for place, worker in expected.items():
                assert worker.process.stdout is not None
                selector.register(worker.process.stdout, selectors.EVENT_READ, place)
            patience = min((w.deadline for w in expected.values()), default=0.0) - time.monotonic()
            heard = {key.data for key, _ in selector.select(max(0.0, patience))} if expected else set()
        for place, worker in expected.items():
            if place in heard:
                self._hear(place, worker, outcomes)
            elif time.monotonic() >= worker.deadline:
                self._expire(place, worker, outcomes)

    def _hear(self, place: int, worker: _Worker, outcomes: list[Outcome | None]) -> None:
        try:
            message = worker.take()
        except EOFError:
            status = worker.end()
            words = worker.last_words()
            worker.kill()
            if worker.task is None:
                self._fail_to_start(f"ended with exit status {status}:\n{words}")
            report = f"the verifier's process ended with exit status {status}\n{words}".strip()
            outcomes[worker.task] = Outcome(failure="error", message=report)  # type: ignore[index]
            self._pool[place] = self._new()
            return
        if message is None:
            return
        if worker.task is None:
            worker.ready = True
            return
        score = message.get("score")
        outcomes[worker.task] = (
            Outcome(score=score) if score is not None else Outcome(failure="error", message=message["error"])
        )
        worker.task = None

    def _expire(self, place: int, worker: _Worker, outcomes: list[Outcome | None]) -> None:
        if worker.task is None:
            self._fail_to_start(f"was not ready after {START_LIMIT:.0f} seconds")
            return
        outcomes[worker.task] = Outcome(
            failure="timeout", message=f"no verdict within {self.time_limit} seconds"
        )
        self._replace(place)

    def _fail_to_start(self, how: str) -> None:
        _end(self._pool, os.getpid())
        raise RuntimeError(f"the worker of verifier {self.target!r} {how}")

    def _new(self) -> _Worker:
        return _Worker(self.target, self.time_limit, self.memory_limit)

    def _replace(self, place: int) -> _Worker:
        self._pool[place].kill()
        self._pool[place] = self._new()
        return self._pool[place]


def _end(pool: list[_Worker], owner: int) -> None:
    if os.getpid() == owner:
        for worker in pool:
            worker.kill()
    pool.clear()
