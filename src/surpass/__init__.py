"""Post-train language models by distillation and reinforcement learning, so that a student can outgrow its teachers.

    from surpass import RunConfig, methods, train

    train.run(RunConfig(student="base", teacher="expert", prompts="problems.jsonl"), methods.ExOPD(reward_scale=1.25))

Nothing heavy is imported before it is used, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surpass import methods, train
    from surpass.config import RunConfig

    __version__: str

__all__ = ["RunConfig", "__version__", "methods", "train"]


def __getattr__(name: str) -> Any:
    if name == "RunConfig":
        return importlib.import_module("surpass.config").RunConfig
    if name in ("methods", "train"):
        return importlib.import_module(f"surpass.{name}")
    if name == "__version__":
        return version("surpass")
    raise AttributeError(f"module 'surpass' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
