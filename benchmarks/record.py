"""What stands beside every figure (versions, machine, command), how results are compared and tables printed."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "trl", "liger_kernel")


def environment() -> dict[str, Any]:
    """Package versions, processor, cores, load (runnable processes over the last minute) and the command."""
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.system()},
        "load": round(os.getloadavg()[0], 1),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def save(name: str, result: dict[str, Any]) -> None:
    """Write `results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths)] for row in [header, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Largest difference of each tensor, relative to the largest entry that was expected."""
    return [float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected)]


def _processor() -> str:
    """The model name and, because two processors may share it, family and model number; Linux, else the architecture."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return platform.machine()
    fields = dict(line.split(":", 1) for line in information.read_text().splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    if "model name" not in fields:
        return platform.machine()
    return (
        f"{fields['model name']} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"
    )
