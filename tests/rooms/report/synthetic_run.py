"""A small run folder with every file a run writes, for tests of reports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
TOKENS = ["Let", " 2", "+", "2", "\n", "\t", "", HOSTILE, " 4", "<|im_end|>"]


def sample(step: int = 10, index: int = 0, **changes: Any) -> dict[str, Any]:
    student = [-0.125 - 0.01 * i for i in range(len(TOKENS))]
    teacher = [-0.5 + 0.02 * i for i in range(len(TOKENS))]
    return {
        "step": step,
        "prompt_id": f"sum-{index}",
        "domain": "addition",
        "prompt": f"What is 2 + 2? {HOSTILE}",
        "answer": "4",
        "tokens": TOKENS,
        "signals": {
            "advantage": [0.25 * (-1) ** i for i in range(len(TOKENS))],
            "student": student,
            "teacher": teacher,
            "reference": [float("nan"), *[-1.0] * (len(TOKENS) - 1)],
        },
        "reward": 1.0 if index % 2 == 0 else None,
        "components": {"correct": 1.0, "format": None},
        "finish": "EOS",
        **changes,
    }


def write_run(
    folder: Path,
    *,
    steps: int = 50,
    level: float = 0.5,
    config: Mapping[str, Any] | None = None,
    samples: int = 3,
) -> Path:
    folder.mkdir(parents=True)
    settings = {"student": "base", "output": str(folder.name), "seed": 0, "method": {"reward_scale": 1.0}}
    settings |= dict(config or {})
    (folder / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    metrics = [
        {
            "step": step,
            "loss": 1.0 / step,
            "reward": level * step / steps,
            "reward/format": 1.0,
            "kl/teacher": 0.5 / step,
            "kl/reference": float("nan") if step == 1 else 0.1,
            "entropy": 1.0,
            "completions/mean_length": 20.0,
            "completions/clipped_ratio": 0.1,
            "grad_norm": 0.3,
            "tokens/generated": 100,
            "tokens/trained": 90,
            "step_time": 0.5,
        }
        for step in range(1, steps + 1)
    ]
    evaluations = [
        {
            "step": step,
            "domain": domain,
            "mean_length": 12.0,
            **{
                f"pass@{k}{end}": min(1.0, value + shift)
                for k, value in ((1, level * step / steps), (8, level * step / steps + 0.1))
                for end, shift in (("", 0.0), ("/low", -0.05), ("/high", 0.05))
            },
        }
        for step in (steps // 2, steps)
        for domain in ("addition", "overall")
    ]
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "evaluations.jsonl", evaluations)
    (folder / "samples").mkdir()
    write_lines(folder / "samples" / "step_000010.jsonl", [sample(10, i) for i in range(samples)])
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def results(**levels: tuple[float, float]) -> dict[str, Any]:
    """`results.json` of models by their pass@1 on addition and reversal, with intervals of ±0.02."""
    rows = [
        {
            "model": name.replace("_", "-"),
            "domain": domain,
            "pass@1": value,
            "low": round(value - 0.02, 6),
            "high": round(value + 0.02, 6),
            "pass@8": min(1.0, value + 0.1),
            "mean_length": 20.0,
            "tokens_generated": 1_920_000,
            "tokens_trained": 1_500_000,
        }
        for name, pair in levels.items()
        for domain, value in zip(("addition", "reversal"), pair, strict=True)
    ]
    return {"seeds": [0, 1], "rows": rows}
