"""Whole runs so small that each takes a second: one-layer checkpoints, short digit tasks, a few steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from surpass.config import (
    DataConfig,
    EvalConfig,
    JudgeConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from surpass.methods.base import Method
from surpass.models.zoo import save_tiny
from surpass.train.loop import train

SECTIONS: dict[str, Any] = {
    "model": ModelConfig,
    "data": DataConfig,
    "rollout": RolloutConfig,
    "judge": JudgeConfig,
    "loss": LossConfig,
    "optimiser": OptimiserConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
}
# Small, and visibly learning: a few steps move the weights well beyond rounding.
BASE: dict[str, Any] = {
    "prompts": "embedded:sort",
    "data.limit": 24,
    "rollout.max_new_tokens": 6,
    "optimiser.learning_rate": 1e-2,
    "train.steps": 4,
    "train.prompts_per_step": 4,
    "train.sample_every": 0,
    "train.threads": 1,
}


@dataclass(frozen=True)
class Checkpoints:
    """Tiny Qwen3 checkpoints with one vocabulary and different weights; `wide` is a larger one of the same kind."""

    student: str
    teacher: str
    other: str
    wide: str


def make_checkpoints(folder: Path) -> Checkpoints:
    """initializer_range 0.3 makes them decided enough to differ in what they write."""
    for seed, name in enumerate(("student", "teacher", "other")):
        save_tiny(folder / name, hidden=16, heads=2, layers=1, seed=seed, initializer_range=0.3)
    save_tiny(folder / "wide", hidden=32, heads=2, layers=1, seed=3, initializer_range=0.3)
    return Checkpoints(*(str(folder / f.name) for f in fields(Checkpoints)))


def config(student: str, output: Path, **changes: Any) -> RunConfig:
    """`BASE` with changes; a section's field is written `train__steps` or given as `{"train.steps": 1}` by `**`."""
    settings = {**BASE, **{key.replace("__", "."): value for key, value in changes.items()}}
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    top: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        if section:
            sections[section][name] = value
        else:
            top[key] = value
    built = {name: SECTIONS[name](**values) for name, values in sections.items()}
    return RunConfig(student=student, output=str(output), **top, **built)


def arguments(student: str, output: Path, **changes: Any) -> list[str]:
    """The same settings as `config` gives, for the command line."""
    settings = {**BASE, **{key.replace("__", "."): value for key, value in changes.items()}}
    given = {"student": student, "output": str(output), **settings}
    return [part for key, value in given.items() for part in (f"--{key}", str(value))]


class Watching:
    """A progress bar that shows nothing; `on_update` is called with every metrics row, after it was written."""

    def __init__(self, on_update: Callable[[Mapping[str, float]], None] | None = None) -> None:
        self.on_update = on_update

    def advance_to(self, step: int) -> None: ...
    def doing(self, what: str) -> None: ...

    def show(self, row: Mapping[str, float]) -> None:
        if self.on_update is not None:
            self.on_update(row)


def run(
    settings: RunConfig,
    method: Method,
    on_update: Callable[[Mapping[str, float]], None] | None = None,
    **options: bool,
) -> Path:
    """Train in this process, quietly; gives the run's folder."""

    @contextmanager
    def bar(steps: int, title: str) -> Iterator[Watching]:
        del steps, title
        yield Watching(on_update)

    train(settings, method, console=Console(quiet=True), bar=bar, **options)
    return Path(settings.output)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> bytes:
    """The finished model's weights as they lie on disk (of a LoRA student: the adapter's)."""
    (file,) = (folder / "model").glob("*.safetensors")
    return file.read_bytes()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def distance(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> float:
    """Euclidean distance of two sets of weights."""
    return sum(float((value - second[name]).pow(2).sum()) for name, value in first.items()) ** 0.5


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
