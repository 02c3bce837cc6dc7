"""The loop around a method: build, collect, update, write down, save, resume. `run(config, method)` is all of it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surpass.train.loop import train as run

__all__ = ["run"]


def __getattr__(name: str) -> Any:
    if name == "run":
        return importlib.import_module("surpass.train.loop").train
    raise AttributeError(f"module 'surpass.train' has no attribute {name!r}; it has {', '.join(__all__)}")
