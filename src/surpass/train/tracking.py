"""What a run writes down: metrics as JSON lines (always), completions with their signals, and trackers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from surpass.records import Finish, Rollouts


class Journal:
    """Appends to `metrics.jsonl`, `evaluations.jsonl` and `samples/` of a run folder, and to Accelerate's trackers."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder, self.accelerator = folder, accelerator
        folder.mkdir(parents=True, exist_ok=True)

    def rewind(self, updates: int, step: int) -> None:
        """Forget lines written after a checkpoint that is being resumed, so that none stands twice."""
        self._keep("metrics.jsonl", lambda row: row["update"] <= updates)
        self._keep("evaluations.jsonl", lambda row: row["step"] <= step)

    def _keep(self, name: str, wanted: Any) -> None:
        path = self.folder / name
        if not path.exists():
            return
        rows = []
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # the half line of a killed run
        path.write_text("".join(json.dumps(row) + "\n" for row in rows if wanted(row)))

    def metrics(self, row: Mapping[str, float]) -> None:
        """One optimiser update. Non-finite numbers are written as null."""
        self._append("metrics.jsonl", row)
        if self.accelerator.trackers:
            self.accelerator.log({k: v for k, v in row.items() if k != "update"}, step=int(row["update"]))

    def evaluation(self, row: Mapping[str, Any]) -> None:
        self._append("evaluations.jsonl", row)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with (self.folder / name).open("a") as file:
                file.write(json.dumps({k: _plain(v) for k, v in row.items()}) + "\n")

    def samples(
        self,
        step: int,
        rollouts: Rollouts,
        signals: Mapping[str, Tensor],
        tokenizer: PreTrainedTokenizerBase,
        kept: int,
    ) -> None:
        """The first `kept` completions of a batch, token by token with every signal known about them."""
        if not self.accelerator.is_main_process:
            return
        (self.folder / "samples").mkdir(exist_ok=True)
        columns = {name: rollouts.ragged(values) for name, values in signals.items()}
        for name, scores in rollouts.scores.items():
            if scores.logp is not None:
                columns[name] = rollouts.ragged(scores.logp)
        columns.setdefault("sampler", rollouts.ragged(rollouts.sampler_logp))
        prompts = tokenizer.batch_decode(rollouts.prompt_ids.tolist()[:kept], skip_special_tokens=False)
        with (self.folder / "samples" / f"step_{step:06d}.jsonl").open("w") as file:
            for i in range(min(kept, len(rollouts))):
                prompt = rollouts.prompts[i]
                row = {
                    "step": step,
                    "prompt_id": prompt.id,
                    "domain": prompt.domain,
                    "prompt": prompts[i],
                    "answer": prompt.answer,
                    "tokens": [tokenizer.decode([t]) for t in rollouts.response[i].tolist()],
                    "signals": {k: [_plain(v) for v in column[i].tolist()] for k, column in columns.items()},
                    "reward": None if rollouts.reward is None else _plain(float(rollouts.reward[i])),
                    "components": {k: _plain(float(v[i])) for k, v in rollouts.components.items()},
                    "finish": Finish(int(rollouts.finish[i])).name,
                }
                file.write(json.dumps(row, default=str) + "\n")


def batch_metrics(rollouts: Rollouts) -> dict[str, float]:
    """What can be said of a batch of answers before it is trained on; see docs/metrics.md."""
    lengths = rollouts.lengths.float()
    metrics = {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float((rollouts.finish == int(Finish.LENGTH)).float().mean()),
    }
    if rollouts.reward is not None:
        reward = rollouts.reward[~rollouts.reward.isnan()]
        metrics["reward"] = float(reward.mean()) if len(reward) else math.nan
        metrics["reward_std"] = float(reward.std(correction=0)) if len(reward) else math.nan
        for name, values in rollouts.components.items():
            known = values[~values.isnan()]
            metrics[f"reward/{name}"] = float(known.mean()) if len(known) else math.nan
    return metrics


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return round(value, 6) if isinstance(value, float) else value
