"""Data of the token viewer: completions with the numbers every role gave each of their tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from surpass.report.read import Row

STUDENT, REFERENCE = "student", "reference"
# Signals under these names are not log-probabilities, even if all of their values happen to be negative.
NOT_LOGP = ("advantage", "weight", "ratio", "kl", "entropy", "reward", "return", "value")
SHOWN = ("step", "prompt_id", "domain", "prompt", "answer", "reward", "components", "finish")


def viewer_data(runs: Mapping[str, Sequence[Row]], limit: int = 200) -> Row:
    """What the page embeds: at most `limit` samples (spread evenly) and the signals to colour by.

    runs: samples by run name. The answer holds `samples`, `views` (a signal, or the difference of two, by
    name), `logps` (the signals that are log-probabilities) and `omitted` (samples left out).
    """
    everything = [(run, row) for run, rows in runs.items() for row in rows]
    kept = _spread(everything, limit)
    samples = [
        {"run": run}
        | {key: _plain(row.get(key)) for key in SHOWN}
        | {"tokens": [str(token) for token in row["tokens"]]}
        | {"signals": {name: [_round(v) for v in values] for name, values in row.get("signals", {}).items()}}
        for run, row in kept
    ]
    names = list(dict.fromkeys(name for sample in samples for name in sample["signals"]))
    logps = [name for name in names if _is_logp(name, samples)]
    return {
        "samples": samples,
        "views": _views(names, logps),
        "logps": logps,
        "omitted": len(everything) - len(kept),
    }


def embed(data: Any) -> Markup:
    """JSON that may stand inside a `<script>`: no text in it can end the element or open a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _views(names: Sequence[str], logps: Sequence[str]) -> list[Row]:
    """Signals to choose from: everything logged that is no log-prob, differences of roles, then log-probs."""
    views = [{"name": name, "parts": [name]} for name in names if name not in logps]
    for base in (STUDENT, REFERENCE):
        # The student against the reference is shown once, in the direction in which a KL to it is taken.
        others = [role for role in logps if role != base and (base, role) != (STUDENT, REFERENCE)]
        views += [{"name": f"{role} − {base}", "parts": [role, base]} for role in others if base in logps]
    return views + [{"name": f"log-prob of {name}", "parts": [name]} for name in logps]


def _is_logp(name: str, samples: Sequence[Row]) -> bool:
    if any(part in name.lower() for part in NOT_LOGP):
        return False
    # Rounding of float32 log-softmax may leave a sure token slightly above 0.
    return all(value is None or value <= 1e-4 for s in samples for value in s["signals"].get(name, []))


def _spread(items: Sequence[Any], limit: int) -> list[Any]:
    if len(items) <= limit:
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def _round(value: float | None) -> float | None:
    """Five digits: more cannot be seen, and the page stays small."""
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """JSON without NaN, whatever was nested."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return _round(value)
    return value if value is None or isinstance(value, str | int) else str(value)
