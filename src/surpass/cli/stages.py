"""Stages of an experiment, each kept in a folder and reused while nothing it depends on changes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import surpass
from surpass.config import RunConfig
from surpass.evaluate.summary import Evaluation
from surpass.methods.base import Method
from surpass.report.read import read_jsonl
from surpass.train.loop import train
from surpass.train.progress import RichBar, display
from surpass.train.settings import resolved


@dataclass(frozen=True)
class Stage:
    """What a stage depends on, as JSON-able values."""

    inputs: dict[str, Any]

    @property
    def key(self) -> str:
        text = json.dumps([self.inputs, source_hash()], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Stages:
    """Runs stages one after the other, saying which of how many, and skips those that stand already."""

    def __init__(self, folder: Path, total: int, console: Console, title: str) -> None:
        self.folder, self.total, self.console, self.title = folder, total, console, title
        self.count = 0

    def make(self, name: str, stage: Stage, action: Callable[[Path], Any]) -> Path:
        """A folder made by `action`; made anew only where `stage` differs from the one it was made with."""
        out, stamp = self.folder / name, self.folder / name / ".stage"
        if not (stamp.exists() and stamp.read_text() == stage.key):
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            action(out)
            stamp.write_text(stage.key)
        return out

    def train(self, name: str, config: RunConfig, method: Method) -> Path:
        """The model of a training run in folder `name`."""
        self.count += 1
        config.output = str(self.folder / name)
        inputs = resolved(config, method) | {"output": name}
        checkpoints = [config.student, *config.teachers.values()]
        inputs["inputs"] = [self.fingerprint(Path(p)) for p in checkpoints]
        if Path(str(config.prompts)).exists():
            inputs["prompts"] = hashlib.sha256(Path(str(config.prompts)).read_bytes()).hexdigest()
        stamp, key = self.folder / name / ".stage", Stage(inputs).key
        label = f"{self.title}, {self.count}/{self.total}: {name}"
        if stamp.exists() and stamp.read_text() == key:
            self.console.print(f"{label}: unchanged, reused", highlight=False, markup=False)
            return self.folder / name / "model"

        @contextmanager
        def bar(steps: int, title: str) -> Any:
            del title
            with display(self.console) as progress:
                yield RichBar(progress, steps, label)

        model = train(config, method, overwrite=True, console=Console(quiet=True), bar=bar)
        stamp.write_text(key)
        return model

    def evaluate(self, name: str, model: Path, action: Callable[[Path], Evaluation]) -> Evaluation:
        """The evaluation of a model, read back where it was measured before."""
        out = self.folder / "evaluations" / name
        stamp, key = out / ".stage", Stage({"model": self.fingerprint(model)}).key
        if stamp.exists() and stamp.read_text() == key:
            return Evaluation.load(out)
        with self.console.status(f"{self.title}: evaluating {name}"):
            result = action(model)
        shutil.rmtree(out, ignore_errors=True)
        result.save(out)
        stamp.write_text(key)
        return result

    def fingerprint(self, model: Path) -> str:
        """Hash of a checkpoint's weights."""
        return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()[:16]

    def tokens(self, name: str) -> dict[str, int]:
        """Tokens a stage generated and trained; zero for models that were not trained."""
        path = self.folder / name / "metrics.jsonl"
        rows = read_jsonl(path).rows if path.exists() else []
        return {kind: sum(int(row[f"tokens/{kind}"]) for row in rows) for kind in ("generated", "trained")}


def source_hash() -> str:
    """Hash of this package's own code: another version measures anew."""
    root = Path(surpass.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
