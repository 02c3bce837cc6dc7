"""The folder of a run: may it be used, and what stands in it from the start."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from surpass.prompts.templates import template_fingerprint
from surpass.train.build import Built
from surpass.train.checkpoint import latest_checkpoint, load_position
from surpass.train.settings import same_run


def starting_point(folder: Path, settings: dict[str, Any], resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to resume from, or None to start anew. Raises ValueError for a folder in use or another run."""
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if resume:
        if checkpoint is None:
            raise ValueError(
                f"--resume: there is no checkpoint in {folder / 'checkpoints'}; start without it"
            )
        same_run(load_position(checkpoint).config, settings)
        return checkpoint
    if (folder / "metrics.jsonl").exists():
        if not overwrite:
            raise ValueError(
                f"{folder} already holds a run: go on with --resume, replace it with --overwrite, or choose --output"
            )
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            (folder / name).unlink(missing_ok=True)
        for name in ("samples", "checkpoints", "evaluations", "model"):
            shutil.rmtree(folder / name, ignore_errors=True)
    return None


def describe(built: Built, folder: Path, console: Console) -> None:
    """Print the first rendered prompt and its fingerprint once, and keep both beside the environment."""
    run = built.run
    assert run.stream is not None
    ids = run.prompt_ids(run.stream.peek(1))
    text = run.student.tokenizer.decode(ids[0].tolist())
    console.print("first prompt as the student reads it:", style="bold")
    console.print(repr(text), markup=False, highlight=False)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "first_prompt": text,
        "template": template_fingerprint(run.student.tokenizer, run.template_args),
        "parameters": sum(p.numel() for p in run.student.model.parameters()),
        "trainable": sum(p.numel() for p in run.student.model.parameters() if p.requires_grad),
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=1))
