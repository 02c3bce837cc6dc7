"""A progress bar with the figures worth watching and the time left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column


class Bar(Protocol):
    """What the loop tells about its progress."""

    def advance_to(self, step: int) -> None: ...
    def doing(self, what: str) -> None: ...
    def show(self, row: Mapping[str, float]) -> None: ...


class RichBar:
    """One task of a rich progress display."""

    def __init__(self, progress: Progress, steps: int, title: str) -> None:
        self.progress = progress
        self.task = progress.add_task(title, total=steps, figures="")

    def advance_to(self, step: int) -> None:
        self.progress.update(self.task, completed=step)

    def doing(self, what: str) -> None:
        self.progress.update(self.task, doing=what)

    def show(self, row: Mapping[str, float]) -> None:
        names = {"reward": "reward", "loss": "loss", "completions/mean_length": "length"}
        figures = "  ".join(f"{label} {row[name]:.2g}" for name, label in names.items() if name in row)
        self.progress.update(self.task, figures=figures)


def display(console: Console | None = None) -> Progress:
    """The progress display used everywhere: title, bar, count, time left (time taken when done), figures."""
    return Progress(
        TextColumn("{task.description:<28}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=8),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True)),
        TextColumn(
            "{task.fields[figures]}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=26)
        ),
        console=console or Console(stderr=True),
    )


@contextmanager
def training_bar(steps: int, title: str) -> Iterator[Bar]:
    """A display of its own for one run."""
    with display() as progress:
        yield RichBar(progress, steps, title)
