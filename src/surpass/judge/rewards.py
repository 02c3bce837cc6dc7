"""Reward functions with the ecosystem's signature, called the ecosystem's way.

    def f(prompts, completions, **columns) -> list[float | None]

Every argument is a list with one entry per completion. Prompts and completions of conversations arrive as message
lists, others as text. Columns are the fields of the data set, with `answer`, `domain`, `prompt_id`, and
`completion_ids` where token ids are known. None: does not apply to this completion. Functions may be async.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from surpass.records import Prompt

RewardFunction = Callable[..., Any]
Values = list[float | None]


class RewardError(RuntimeError):
    """A reward function raised, or returned something that is not one reward per completion."""


def call_reward(
    name: str,
    function: RewardFunction,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> Values:
    """`N` rewards of one function (None: not applicable).

    columns: further columns, `N` entries each. Raises RewardError naming the component and, where it can be told, the
    prompt and the completion at fault.
    """
    arguments = _arguments(name, function, prompts, completions, columns)
    try:
        values = _call(function, arguments)
    except Exception as error:
        i = _culprit(function, arguments) if len(prompts) > 1 else 0
        where = "" if i is None else f" on prompt {prompts[i].id!r}, completion {_excerpt(completions[i])}"
        raise RewardError(
            f"reward function {name!r} raised {type(error).__name__}{where}: {error}"
        ) from error
    return _checked(name, values, prompts, completions)


def columns_of(
    prompts: Sequence[Prompt], completion_ids: Sequence[Sequence[int]] | None = None
) -> dict[str, list[Any]]:
    """The columns reward functions get: one list of `N` per field, None where a row lacks it."""
    names = dict.fromkeys(name for prompt in prompts for name in (*prompt.privileged, *prompt.columns))
    columns = {
        name: [prompt.columns.get(name, prompt.privileged.get(name)) for prompt in prompts]
        for name in names
        if name not in ("prompts", "completions")
    }
    columns["answer"] = [prompt.answer for prompt in prompts]
    columns["domain"] = [prompt.domain for prompt in prompts]
    columns["prompt_id"] = [prompt.id for prompt in prompts]
    if completion_ids is not None:
        columns["completion_ids"] = [list(ids) for ids in completion_ids]
    return columns


def _arguments(
    name: str,
    function: RewardFunction,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> dict[str, list[Any]]:
    """All there is, or what the function asks for by name where it does not take everything."""
    plain = [isinstance(prompt.messages, str) for prompt in prompts]
    asked = [p.messages if isinstance(p.messages, str) else [dict(m) for m in p.messages] for p in prompts]
    written = [
        c if text else [{"role": "assistant", "content": c}]
        for c, text in zip(completions, plain, strict=True)
    ]
    everything = {"prompts": asked, "completions": written, **{k: list(v) for k, v in columns.items()}}
    parameters = inspect.signature(function).parameters.values()
    lacking = [
        p.name
        for p in parameters
        if p.default is p.empty
        and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        and p.name not in everything
    ]
    if lacking:
        raise RewardError(
            f"reward function {name!r} needs {lacking}, and there are only {sorted(everything)}; "
            "name its parameters like the columns of the data"
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return everything
    return {p.name: everything[p.name] for p in parameters if p.name in everything}


def _call(function: RewardFunction, arguments: Mapping[str, list[Any]]) -> Any:
    values = function(**arguments)
    return _await(values) if inspect.iscoroutine(values) else values


def _await(coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    # A notebook's thread runs a loop already, and loops do not nest.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


def _culprit(function: RewardFunction, arguments: Mapping[str, list[Any]]) -> int | None:
    """The first completion on which the function raises by itself; None where each passes alone."""
    for i in range(len(arguments.get("completions") or next(iter(arguments.values()), []))):
        try:
            _call(function, {name: [column[i]] for name, column in arguments.items()})
        except Exception:
            return i
    return None


def _checked(name: str, values: Any, prompts: Sequence[Prompt], completions: Sequence[str]) -> Values:
    try:
        listed = list(values)
    except TypeError:
        raise RewardError(
            f"reward function {name!r} returned {type(values).__name__}; expected a list of {len(prompts)} numbers or None"
        ) from None
    if len(listed) != len(prompts):
        raise RewardError(
            f"reward function {name!r} returned {len(listed)} rewards for {len(prompts)} completions; expected one each"
        )
    out: Values = []
    for value, prompt, completion in zip(listed, prompts, completions, strict=True):
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if number is not None and not math.isfinite(number):
            raise RewardError(
                f"reward function {name!r} returned {value!r} for prompt {prompt.id!r}, completion "
                f"{_excerpt(completion)}; expected a finite number, or None where it does not apply"
            )
        out.append(number)
    return out


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:60]} ... {text[-60:]}")
