"""The resolved configuration of a run: written once, compared on resume."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from surpass.config import RunConfig
from surpass.methods.base import Method

# A run may be resumed with other values of these: they do not change what is learnt up to a given step.
FREE = (
    "output",
    "train.token_budget",
    "train.save_every",
    "train.keep_checkpoints",
    "train.sample_every",
    "train.samples_kept",
    "train.threads",
    "train.trackers",
    "judge.workers",
)


def resolved(config: RunConfig, method: Method) -> dict[str, Any]:
    """Every setting, defaults included, as plain data."""
    return {"method_name": type(method).__name__, "method": asdict(method), **asdict(config)}


def write_config(folder: Path, settings: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


def same_run(stored: dict[str, Any], present: dict[str, Any]) -> None:
    """Raise ValueError naming the settings that differ between a checkpoint and the present command."""
    # A constant rate does not know how many steps follow, so a finished run may be given more.
    free = {*FREE, "train.steps"} if present.get("optimiser", {}).get("schedule") == "constant" else set(FREE)
    differing = {key: pair for key, pair in _differences(stored, present, "").items() if key not in free}
    if differing:
        lines = "\n".join(
            f"  {key}: was {old!r}, is {new!r}" for key, (old, new) in sorted(differing.items())
        )
        raise ValueError(
            f"the checkpoint belongs to a run with other settings:\n{lines}\nrepeat the settings it began with"
        )


def _differences(old: Any, new: Any, prefix: str) -> dict[str, tuple[Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted({*old, *new}):
            found |= _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    plain_old, plain_new = (list(v) if isinstance(v, tuple) else v for v in (old, new))
    return {} if plain_old == plain_new else {prefix: (old, new)}
