"""Functions named in a configuration: `module:function` or `path/file.py:function`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def is_target(name: str) -> bool:
    """Whether `name` has the form `module:function`."""
    module, _, function = name.rpartition(":")
    return bool(module) and function.isidentifier()


def load_function(target: str) -> Callable[..., Any]:
    """Import the function `target` names. A file is run once per process.

    Raises ValueError where the form is wrong, or file, module or function do not exist.
    """
    place, _, name = target.rpartition(":")
    if not is_target(target):
        raise ValueError(f"expected 'module:function' or 'path/file.py:function', found {target!r}")
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place, target)
    function = getattr(module, name, None)
    if not callable(function):
        known = sorted(k for k, v in vars(module).items() if callable(v) and not k.startswith("_"))
        raise ValueError(f"{place} has no function {name!r}; it has {known}")
    return function


def _load_module(name: str, target: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"cannot import {target!r}: {error}; give a file as path/file.py:function"
        ) from error


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"there is no file {path}; expected path/file.py:function")
    name = f"surpass_file_{path.stem}_{abs(hash(path.resolve())):x}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
