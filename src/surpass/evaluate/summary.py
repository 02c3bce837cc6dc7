"""The numbers of an evaluation: samples, their summaries per domain and overall, and their files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surpass.evaluate.passk import Estimate, average, bootstrap, majority_at_k, pass_at_k
from surpass.records import Finish

OVERALL = "overall"


@dataclass(frozen=True)
class Sample:
    """One judged answer.

    reward: None where the verifier failed. length: in tokens. vote: the extracted answer.
    """

    prompt_id: str
    domain: str
    completion: str
    reward: float | None
    length: int
    finish: str
    vote: Any = None


@dataclass(frozen=True)
class Count:
    """Answers to one prompt: all of them, those the verifier could judge, and the correct ones."""

    domain: str
    samples: int
    judged: int
    correct: int


@dataclass(frozen=True)
class Summary:
    """One domain (or `overall`).

    estimates: `pass@k`, `avg@n`, `maj@k` and `reward`, with intervals over prompts. failures: answers the
    verifier could not judge, left out of every estimate. unmeasured: prompts without any judged answer.
    mean_length: tokens per answer. clipped_ratio: share of answers cut off at the length limit.
    """

    domain: str
    prompts: int
    samples: int
    failures: int
    unmeasured: int
    mean_length: float
    clipped_ratio: float
    tokens_generated: int
    estimates: dict[str, Estimate]

    def row(self) -> dict[str, Any]:
        """Flat numbers for `evaluations.jsonl`: `pass@1`, `pass@1/low`, `pass@1/high`, ... (NaN: None)."""
        row: dict[str, Any] = {
            "domain": self.domain,
            "prompts": self.prompts,
            "samples": self.samples,
            "failures": self.failures,
            "unmeasured": self.unmeasured,
            "mean_length": self.mean_length,
            "clipped_ratio": self.clipped_ratio,
            "tokens/generated": self.tokens_generated,
        }
        for name, estimate in self.estimates.items():
            row |= {
                name: number(estimate.value),
                f"{name}/low": number(estimate.low),
                f"{name}/high": number(estimate.high),
            }
        return row


@dataclass(frozen=True)
class Evaluation:
    """All answers of one model to one set of prompts, and their summaries.

    n: answers per prompt. solved_at: an answer is correct when its reward is at least this. level: of the
    intervals.
    """

    seed: int
    n: int
    ks: tuple[int, ...]
    solved_at: float
    level: float
    sampling: dict[str, Any]
    domains: dict[str, Summary]
    overall: Summary
    samples: tuple[Sample, ...]

    def counts(self) -> dict[str, Count]:
        """Per prompt id, in the order the prompts were asked."""
        answers: dict[str, list[Sample]] = {}
        for sample in self.samples:
            answers.setdefault(sample.prompt_id, []).append(sample)
        return {
            prompt_id: Count(
                domain=group[0].domain,
                samples=len(group),
                judged=sum(s.reward is not None for s in group),
                correct=sum(s.reward is not None and s.reward >= self.solved_at for s in group),
            )
            for prompt_id, group in answers.items()
        }

    def rows(self, **columns: Any) -> list[dict[str, Any]]:
        """One row per domain and one for all of them, each beginning with `columns` (`step=...`)."""
        return [{**columns, **summary.row()} for summary in (*self.domains.values(), self.overall)]

    def save(self, folder: Path) -> None:
        """Write `evaluation.json` and `samples.jsonl` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        head = {
            "seed": self.seed,
            "n": self.n,
            "ks": list(self.ks),
            "solved_at": self.solved_at,
            "level": self.level,
            "sampling": self.sampling,
            "rows": self.rows(),
        }
        (folder / "evaluation.json").write_text(
            json.dumps(head, indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
        with (folder / "samples.jsonl").open("w", encoding="utf-8") as out:
            for sample in self.samples:
                out.write(json.dumps(asdict(sample), ensure_ascii=False, allow_nan=False, default=str) + "\n")

    @staticmethod
    def load(folder: Path) -> Evaluation:
        """Read what `save` wrote; the summaries are computed again from the samples."""
        head = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        lines = (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")
        samples = tuple(Sample(**json.loads(line)) for line in lines if line)
        return summarise(
            samples,
            n=head["n"],
            ks=tuple(head["ks"]),
            seed=head["seed"],
            sampling=head["sampling"],
            solved_at=head["solved_at"],
            level=head["level"],
        )


def summarise(
    samples: Sequence[Sample],
    *,
    n: int,
    ks: Sequence[int],
    seed: int,
    sampling: dict[str, Any],
    solved_at: float,
    level: float,
) -> Evaluation:
    """All numbers of an `Evaluation` from its samples. `overall` weighs prompts alike, not domains."""
    by_domain: dict[str, list[Sample]] = {}
    for sample in samples:
        by_domain.setdefault(sample.domain, []).append(sample)

    def summary(name: str, part: Sequence[Sample]) -> Summary:
        groups: dict[str, list[Sample]] = {}
        for sample in part:
            groups.setdefault(sample.prompt_id, []).append(sample)
        judged = [[s for s in group if s.reward is not None] for group in groups.values()]
        verdicts = [[s.reward >= solved_at for s in group if s.reward is not None] for group in judged]
        counts, correct = [len(v) for v in verdicts], [sum(v) for v in verdicts]
        values = {f"pass@{k}": pass_at_k(counts, correct, k) for k in ks}
        values[f"avg@{n}"] = average(counts, correct)
        if any(s.vote is not None for s in part):
            votes = [majority_at_k([s.vote for s in g], v, ks) for g, v in zip(judged, verdicts, strict=True)]
            values |= {f"maj@{k}": np.array([vote[k] for vote in votes]) for k in ks}
        values["reward"] = np.array([np.mean([s.reward or 0.0 for s in g]) if g else np.nan for g in judged])
        return Summary(
            domain=name,
            prompts=len(groups),
            samples=len(part),
            failures=len(part) - sum(counts),
            unmeasured=sum(count == 0 for count in counts),
            mean_length=sum(s.length for s in part) / max(len(part), 1),
            clipped_ratio=sum(s.finish == Finish.LENGTH.name for s in part) / max(len(part), 1),
            tokens_generated=sum(s.length for s in part),
            estimates={
                name: bootstrap(per_prompt, level=level, seed=seed) for name, per_prompt in values.items()
            },
        )

    return Evaluation(
        seed=seed,
        n=n,
        ks=tuple(ks),
        solved_at=solved_at,
        level=level,
        sampling=sampling,
        domains={name: summary(name, part) for name, part in by_domain.items()},
        overall=summary(OVERALL, samples),
        samples=tuple(samples),
    )


def number(value: float) -> float | None:
    """None for NaN and infinities, which JSON does not have."""
    return float(value) if math.isfinite(value) else None
