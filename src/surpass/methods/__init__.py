"""How the student learns: one file per method, each readable next to its paper. `registry` knows them by name.

The classes of all methods are attributes of this package (`methods.ExOPD`), imported when first asked for: a method's
own file imports this package, so it cannot import them in turn.
"""

from __future__ import annotations

import importlib
from typing import Any


def _classes() -> dict[str, Any]:
    known = importlib.import_module("surpass.methods.registry").METHODS
    return {method.__name__: method for method in known.values()}


def __getattr__(name: str) -> Any:
    # Submodules are asked for by lower-case names, some of them while the registry itself is still being imported.
    if name[:1].isupper() and name in (classes := _classes()):
        return classes[name]
    hint = f"; its methods are {', '.join(_classes())}" if name[:1].isupper() else ""
    raise AttributeError(f"module 'surpass.methods' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_classes()})
