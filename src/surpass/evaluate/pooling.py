"""One model measured with several seeds: a mean with its interval and spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from surpass.evaluate.summary import Summary


def pooled_row(summaries: Sequence[Summary], k: int) -> dict[str, Any]:
    """Mean over seeds of pass@1 and pass@k, mean length, and an interval of the mean.

    With one seed the interval is that seed's own (bootstrap over prompts). With several it is the mean of the seeds'
    bootstrap intervals, and `seed_values` gives each seed's pass@1, whose spread contains training noise too.
    """
    first = [s.estimates["pass@1"] for s in summaries]
    many = [s.estimates[f"pass@{k}"] for s in summaries]
    count = len(summaries)
    return {
        "pass@1": round(sum(e.value for e in first) / count, 4),
        "low": round(sum(e.low for e in first) / count, 4),
        "high": round(sum(e.high for e in first) / count, 4),
        f"pass@{k}": round(sum(e.value for e in many) / count, 4),
        "mean_length": round(sum(s.mean_length for s in summaries) / count, 2),
        "seed_values": [round(e.value, 4) for e in first],
    }
