"""Where commands print their tables."""

from __future__ import annotations

import sys

from rich.console import Console


def output() -> Console:
    """Standard output: as wide as the terminal, and wide enough for whole tables where it is a file or a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=160)
