"""From rows to prompts: field conventions, privileged contexts, ids."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from surpass.prompts.presets import Preset, preset_named
from surpass.prompts.rows import DataError, MissingSourceError, read_rows
from surpass.records import Prompt

__all__ = ["EMBEDDED_COUNT", "FIELDS", "PRIVILEGED", "DataError", "MissingSourceError", "load_prompts"]

PRIVILEGED = ("solution", "hint", "critique", "demonstration", "privileged_context")

# The house's fields and the columns they stand in by convention, first match wins. `a.b` looks inside `a`.
FIELDS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "messages", "question", "problem"),
    "answer": ("answer", "final_answer", "ground_truth", "reward_model.ground_truth"),
    "response": ("response", "completion"),
    # The teacher a row is routed to is more specific than the collection it came from.
    "domain": ("domain", "extra_info.opd_teacher", "data_source"),
    "id": ("id",),
    "tags": ("tags",),
    **{name: (name,) for name in PRIVILEGED},
}
# Columns whose text is a question to an assistant; `prompt` given as a string is plain text to continue.
ASKED = ("question", "problem", "Problem")
# Embedded tasks make as many prompts as they are asked for.
EMBEDDED_COUNT = 1024


def load_prompts(
    source: str,
    *,
    preset: str | None = None,
    fields: Mapping[str, str] | None = None,
    domain: str | None = None,
    split: str = "train",
    limit: int | None = None,
    instruction: str | None = None,
    seed: int = 0,
) -> list[Prompt]:
    """Read prompts from a JSONL, JSON or Parquet file, a folder, a hub id `owner/name[:config]`, or `embedded:NAME`.

    preset: a known data set (`surpass.prompts.presets`). fields: the house's field -> your column (`a.b` looks
    inside `a`), over the preset's and the conventions. domain: for every prompt, over any domain column.
    split, limit: which part, and at most how many. instruction: text appended to the question; None: the preset's.
    seed: of embedded tasks, which make `limit` prompts (EMBEDDED_COUNT where it is None).

    Raises DataError (a ValueError), MissingSourceError (also a FileNotFoundError) where there is nothing to read.
    """
    if source.startswith("embedded:"):
        return _embedded(source, limit or EMBEDDED_COUNT, seed, split, domain)
    chosen = preset_named(preset) if preset else None
    wanted = _check_fields(fields or {})
    if instruction is None:
        instruction = chosen.instruction if chosen else ""
    prompts = []
    for row in read_rows(source, split, limit):
        try:
            prompts.append(_prompt(row.values, chosen, wanted, domain, instruction))
        except DataError as error:
            raise DataError(f"{source}: {row.where}: {error}") from None
    return _with_unique_ids(source, prompts)


def _embedded(source: str, count: int, seed: int, split: str, domain: str | None) -> list[Prompt]:
    """Prompts of an embedded task; their `verifier` column says who judges them."""
    from surpass.tasks import task_prompts

    made = task_prompts(source.removeprefix("embedded:"), count, seed, split)
    return [replace(p, domain=domain or p.domain, columns={**p.columns, "verifier": source}) for p in made]


def _check_fields(fields: Mapping[str, str]) -> dict[str, str]:
    for name in fields:
        if name not in FIELDS:
            raise DataError(
                f"unknown field {name!r} in data.fields{_nearest(name, FIELDS)}; there are {list(FIELDS)}"
            )
    return dict(fields)


def _prompt(
    row: dict[str, Any], preset: Preset | None, wanted: dict[str, str], domain: str | None, instruction: str
) -> Prompt:
    found, used = _pick(row, preset, wanted)
    if preset:
        try:
            found = preset.refine(found)
        except ValueError as error:
            raise DataError(f"preset {preset.name}: {error}") from None
    messages, response = _conversation(found["prompt"], used["prompt"])
    response = _response(found.get("response")) if found.get("response") is not None else response
    if instruction:
        messages = _append(messages, instruction)
    default_domain = preset.domain if preset else "default"
    # Privileged texts stay among the columns too: reward functions may read them, the student never does.
    consumed = {
        used[name].split(".")[0] for name in ("prompt", "answer", "response", "id", "domain") if name in used
    }
    consumed -= {column for column in consumed if isinstance(row.get(column), dict)}
    return Prompt(
        id=str(found["id"]) if found.get("id") is not None else "",
        messages=messages,
        answer=found.get("answer"),
        domain=str(domain or found.get("domain") or default_domain),
        response=response,
        tags=_tags(found.get("tags")),
        privileged=_privileged(found, row, wanted),
        columns={name: value for name, value in row.items() if name not in consumed},
    )


def _pick(
    row: dict[str, Any], preset: Preset | None, wanted: dict[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The house's fields found in a row, and the column each was found in."""
    found: dict[str, Any] = {}
    used: dict[str, str] = {}
    for name, conventional in FIELDS.items():
        named = wanted.get(name)
        known = preset.fields.get(name) if preset else None
        for column in (named,) if named else known or conventional:
            value = _lookup(row, column)
            if value is not None:
                found[name], used[name] = value, column
                break
        else:
            if named or name in (preset.required if preset else ("prompt",)):
                columns = (named,) if named else known or conventional
                raise DataError(_missing(name, columns, row))
    return found, used


def _lookup(row: dict[str, Any], column: str) -> Any:
    value: Any = row
    for part in [column] if column in row else column.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value


def _missing(name: str, columns: tuple[str, ...], row: dict[str, Any]) -> str:
    empty = [column for column in columns if column in row]
    if empty:
        return f"the {name} field ({empty[0]}) is empty; fill it in or remove the row"
    return (
        f"no {name}: looked for {' or '.join(columns)}, found the fields {sorted(row)}{_nearest(columns[0], row)}; "
        f"name yours with data.fields.{name}"
    )


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _conversation(value: Any, column: str) -> tuple[tuple[dict[str, Any], ...] | str, str | None]:
    """Messages to answer, and the reference answer where `messages` ends in one."""
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"the prompt field ({column}) is blank; fill it in or remove the row")
        return (({"role": "user", "content": value},) if column in ASKED else value), None
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(
            f"expected the prompt ({column}) to be text or a list of messages, found {value!r:.80}"
        )
    for message in value:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or "content" not in message
        ):
            raise DataError(f"expected messages with role and content in {column}, found {message!r:.80}")
    # Columnar formats give every message every key; absent ones are None and templates would show them.
    messages = tuple({k: v for k, v in message.items() if v is not None} for message in value)
    if messages[-1]["role"] != "assistant":
        return messages, None
    if column != "messages":
        raise DataError(
            f"the conversation in {column} ends with the assistant's turn, so nothing is left to answer; end it with "
            "a user turn and give the answer as `completion`, or name the column `messages`"
        )
    if len(messages) == 1:
        raise DataError(
            "messages holds an answer but no question; expected a user turn before the assistant's"
        )
    return messages[:-1], str(messages[-1].get("content", ""))


def _response(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and "content" in value[0]:
        return str(value[0]["content"])
    raise DataError(f"expected the completion to be text or one assistant message, found {value!r:.80}")


def _append(messages: tuple[dict[str, Any], ...] | str, instruction: str) -> tuple[dict[str, Any], ...] | str:
    if isinstance(messages, str):
        return f"{messages}\n\n{instruction}"
    *before, last = messages
    if not isinstance(last.get("content"), str):
        raise DataError(
            f"cannot append an instruction to a message of parts: {last!r:.80}; set instruction ''"
        )
    return (*before, {**last, "content": f"{last['content']}\n\n{instruction}"})


def _tags(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(str(tag) for tag in value)


def _privileged(found: dict[str, Any], row: dict[str, Any], wanted: dict[str, str]) -> dict[str, str]:
    texts: dict[str, str] = {}
    given = row.get("privileged")
    if given is not None:
        if not isinstance(given, dict):
            raise DataError(f"expected `privileged` to map names to texts, found {given!r:.80}")
        # Columnar formats give every row every key; absent ones are None.
        texts.update({name: text for name, text in given.items() if text is not None})
    for name in PRIVILEGED:
        value = found.get(name)
        # A conventional name may hold something else in some data set; one that was asked for must be text.
        if isinstance(value, str) or (value is not None and name in wanted):
            texts[name] = value
    for name, text in texts.items():
        if not isinstance(text, str):
            raise DataError(f"expected the privileged {name} to be text, found {text!r:.80}")
    return texts


def _with_unique_ids(source: str, prompts: list[Prompt]) -> list[Prompt]:
    """Given ids must be unique; where a row has none, all get a hash of their content (repeats are numbered)."""
    if all(p.id for p in prompts):
        repeated = [name for name, count in Counter(p.id for p in prompts).items() if count > 1]
        if repeated:
            raise DataError(
                f"{source}: {len(repeated)} ids occur more than once, first {repeated[0]!r}; results are kept by id: "
                "make them unique, or name another column with data.fields.id"
            )
        return prompts
    seen: Counter[str] = Counter()
    named = []
    for prompt in prompts:
        content = json.dumps([prompt.messages, prompt.answer, prompt.domain], sort_keys=True, default=str)
        name = hashlib.sha256(content.encode()).hexdigest()[:16]
        seen[name] += 1
        named.append(replace(prompt, id=name if seen[name] == 1 else f"{name}-{seen[name]}"))
    return named
