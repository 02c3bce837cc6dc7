"""Checkpoints: everything a killed run needs to go on to the same weights, written atomically, nothing pickled.

A checkpoint folder `step_000010` holds `model/` (Hugging Face format; loads directly in transformers and vLLM),
`optimiser.safetensors`, `rng.safetensors`, `roles/NAME.safetensors` for roles whose weights move, `state.json`
(counters, data position, method state) and, when it was taken inside a rollout batch, the batch itself.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from surpass.models.policy import Policy, save_policy
from surpass.records import Rollouts
from surpass.train.buffer import load_rollouts, save_rollouts


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what is safe and what to do."""


@dataclass
class Position:
    """Where a run stands. step: rollout batches finished; update: optimiser updates done inside the present batch.

    metrics: what was measured while that batch was collected.
    """

    step: int = 0
    update: int = 0
    updates: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    stream: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    root: Path,
    policy: Policy,
    optimiser: torch.optim.Optimizer,
    position: Position,
    roles: dict[str, Policy],
    buffer: Rollouts | None,
    keep: int,
) -> Path:
    """Write one checkpoint under `root` and remove all but the newest `keep`.

    Raises CheckpointError when it cannot be written; older ones are then as they were.
    """
    suffix = f"_update_{position.update:04d}" if position.update else ""
    final = root / f"step_{position.step:06d}{suffix}"
    with _whole(final, root) as folder:
        save_policy(policy, folder / "model")
        _save_optimiser(optimiser, folder)
        if roles:
            (folder / "roles").mkdir()
        for name, role in roles.items():
            weights = {k: v.contiguous().clone() for k, v in role.model.state_dict().items()}
            save_file(weights, folder / "roles" / f"{name}.safetensors")
        if buffer is not None:
            save_rollouts(buffer, folder)
        (folder / "state.json").write_text(json.dumps(position.__dict__))
    for old in checkpoints(root)[:-keep] if keep > 0 else []:
        shutil.rmtree(old, ignore_errors=True)
    return final


def save_model(policy: Policy, directory: Path, root: Path) -> Path:
    """Write the finished model to `directory`. Raises CheckpointError, naming the newest checkpoint under `root`."""
    with _whole(directory, root) as folder:
        save_policy(policy, folder)
    return directory


@contextmanager
def _whole(final: Path, root: Path) -> Iterator[Path]:
    """A folder that is renamed to `final` once everything is in it, so that an interruption or a full disk harms nothing."""
    unfinished = final.with_name(f".{final.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
    except Exception as error:  # every library has its own exception for a disk that is full
        shutil.rmtree(unfinished, ignore_errors=True)
        older = latest_checkpoint(root)
        full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error)
        raise CheckpointError(
            f"could not write {final}: {'the disk is full' if full else error}. "
            + (
                f"The previous checkpoint is whole: {older}. Free some space and go on with --resume."
                if older
                else "There is no earlier checkpoint. Free some space and start again."
            )
        ) from error


def checkpoints(root: Path) -> list[Path]:
    """Whole checkpoints under `root`, oldest first."""
    return sorted(p for p in root.glob("step_*") if (p / "state.json").exists())


def latest_checkpoint(root: Path) -> Path | None:
    """The newest whole checkpoint under `root`, or None."""
    found = checkpoints(root)
    return found[-1] if found else None


def load_position(directory: Path) -> Position:
    """Raises CheckpointError where `directory` is no checkpoint."""
    try:
        return Position(**json.loads((directory / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{directory} is not a checkpoint of a run: {error}") from error


def restore(
    directory: Path, policy: Policy, optimiser: torch.optim.Optimizer, roles: dict[str, Policy]
) -> tuple[Position, Rollouts | None]:
    """Put weights, optimiser and roles back as they were; gives the position and the unfinished batch, if any."""
    position = load_position(directory)
    load_student(directory / "model", policy)
    _load_optimiser(optimiser, directory)
    for name, role in roles.items():
        role.model.load_state_dict(load_file(directory / "roles" / f"{name}.safetensors"))
    return position, load_rollouts(directory)


def load_student(directory: Path, policy: Policy) -> None:
    """Read weights (or the LoRA adapter) saved by `save_policy` into a policy that is already built."""
    adapter = directory / "adapter_model.safetensors"
    if adapter.exists():
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(policy.model, load_file(adapter))
        return
    stored = {}
    for part in sorted(directory.glob("*.safetensors")):
        stored.update(load_file(part))
    mine = policy.model.state_dict()
    tied = set(getattr(policy.causal_lm, "all_tied_weights_keys", None) or {})
    missing = [name for name in mine if name not in stored and name not in tied]
    unexpected = [name for name in stored if name not in mine]
    reshaped = [name for name in stored if name in mine and stored[name].shape != mine[name].shape]
    if missing or unexpected or reshaped:
        raise CheckpointError(
            f"{directory} does not hold this student: missing {missing[:3]}, unexpected {unexpected[:3]}, of another "
            f"shape {reshaped[:3]}; the student's checkpoint is not the one the run was started from"
        )
    policy.model.load_state_dict(stored, strict=False)


def _save_optimiser(optimiser: torch.optim.Optimizer, directory: Path) -> None:
    tensors = {}
    for index, entries in optimiser.state_dict()["state"].items():
        for name, value in entries.items():
            tensors[f"{index}.{name}"] = torch.as_tensor(value).contiguous().clone()
    save_file(tensors, directory / "optimiser.safetensors")
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng |= {f"cuda.{i}": value for i, value in enumerate(torch.cuda.get_rng_state_all())}
    save_file(rng, directory / "rng.safetensors")


def _load_optimiser(optimiser: torch.optim.Optimizer, directory: Path) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(directory / "optimiser.safetensors").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    # Rates and decays come from the configuration; only the moments are restored.
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    rng = load_file(directory / "rng.safetensors")
    torch.set_rng_state(rng.pop("cpu"))
    for name, value in rng.items():
        torch.cuda.set_rng_state(value, int(name.removeprefix("cuda.")))
