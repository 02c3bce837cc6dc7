"""A rollout batch on disk: tensors as safetensors, prompts as JSON. Nothing is pickled."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from surpass.records import Hidden, Prompt, Ragged, Rollouts, Scores

_COLUMNS = ("author", "sampler_logp", "group", "finish", "version", "turn", "reward")
_TABLES = ("components", "token", "sequence", "masks")


def save_rollouts(rollouts: Rollouts, directory: Path) -> None:
    """Write `rollouts.safetensors` and `rollouts.json`; `load_rollouts` gives them back bit for bit."""
    tensors: dict[str, Tensor] = {
        "prompt_ids/values": rollouts.prompt_ids.values,
        "prompt_ids/offsets": rollouts.prompt_ids.offsets,
        "response/values": rollouts.response.values,
        "response/offsets": rollouts.response.offsets,
    }
    for name in _COLUMNS:
        if getattr(rollouts, name) is not None:
            tensors[f"column/{name}"] = getattr(rollouts, name)
    for table in _TABLES:
        for key, value in getattr(rollouts, table).items():
            tensors[f"{table}/{key}"] = value
    hidden_roles: list[list[Any]] = []
    for role, scores in rollouts.scores.items():
        for column in fields(scores):
            value = getattr(scores, column.name)
            if column.name != "hidden" and value is not None:
                tensors[f"scores/{role}/{column.name}"] = value
        for i, part in enumerate(scores.hidden):
            tensors[f"hidden/{role}/{i}/tokens"] = part.tokens
            tensors[f"hidden/{role}/{i}/states"] = part.states
            hidden_roles.append([role, i, part.role])
    text = {
        "prompts": [asdict(p) for p in rollouts.prompts],
        "temperature": rollouts.temperature,
        "feedback": rollouts.feedback,
        "hidden": hidden_roles,
        "roles": list(rollouts.scores),
    }
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, directory / "rollouts.safetensors")
    (directory / "rollouts.json").write_text(json.dumps(text))


def load_rollouts(directory: Path) -> Rollouts | None:
    """The batch that `save_rollouts` wrote there, or None where there is none."""
    if not (directory / "rollouts.json").exists():
        return None
    tensors = load_file(directory / "rollouts.safetensors")
    text = json.loads((directory / "rollouts.json").read_text())

    def table(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    columns: dict[str, Any] = dict(table("column/"))
    scores = {}
    for role in text["roles"]:
        parts = tuple(
            Hidden(tensors[f"hidden/{role}/{i}/tokens"], tensors[f"hidden/{role}/{i}/states"], name)
            for owner, i, name in text["hidden"]
            if owner == role
        )
        scored: dict[str, Any] = dict(table(f"scores/{role}/"))
        scores[role] = Scores(**scored, hidden=parts)
    return Rollouts(
        prompts=tuple(_prompt(p) for p in text["prompts"]),
        prompt_ids=Ragged(tensors["prompt_ids/values"], tensors["prompt_ids/offsets"]),
        response=Ragged(tensors["response/values"], tensors["response/offsets"]),
        temperature=text["temperature"],
        feedback=None if text["feedback"] is None else tuple(text["feedback"]),
        scores=scores,
        components=table("components/"),
        token=table("token/"),
        sequence=table("sequence/"),
        masks=table("masks/"),
        **columns,
    )


def _prompt(stored: dict[str, Any]) -> Prompt:
    messages = stored["messages"]
    return Prompt(
        **{
            **stored,
            "messages": messages if isinstance(messages, str) else tuple(messages),
            "tags": tuple(stored["tags"]),
            "parents": tuple(stored["parents"]),
        }
    )
