"""Verifiers by name: is this completion's answer right?

`math`, `code` and `module:function` run in worker processes (they may hang); the others compare texts and run here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from surpass.judge.answers import chosen_letter, final_answer, marked_answer, normalised
from surpass.judge.functions import is_target
from surpass.prompts.presets import preset_named
from surpass.records import Prompt


@dataclass(frozen=True)
class Verifier:
    """One way to tell right from wrong.

    verify: `(completion, prompt) -> reward`, usually 0 or 1; raises ValueError for a gold answer it cannot use.
    isolated: `module:function` of `f(completion, answer) -> float` to be run in a worker in place of `verify`.
    vote: the answer a completion gives, alike for equal answers (None: none found), for majority votes.
    """

    name: str
    verify: Callable[[str, Prompt], float]
    isolated: str | None = None
    vote: Callable[[str], str | None] | None = None


def verifier_named(name: str) -> Verifier:
    """`math`, `code`, `exact`, `choice`, `contains`, `embedded`, `embedded:TASK`, or `module:function` / `file.py:function`.

    Raises ValueError for unknown names, and for `code` where no sandbox works.
    """
    if name.startswith("embedded:"):
        return _embedded_task(name)
    if name == "code":
        _check_sandbox()
    if name in VERIFIERS:
        return VERIFIERS[name]
    if is_target(name):
        return Verifier(name, _only_isolated, isolated=name, vote=final_answer)
    raise ValueError(
        f"unknown verifier {name!r}; there are {sorted(VERIFIERS)}, embedded:TASK, and functions given as module:function "
        "or path/file.py:function"
    )


def verifier_for(prompts: Sequence[Prompt], preset: str | None = None) -> dict[str, str]:
    """Which verifier judges each domain of `prompts`: domain -> name.

    First of: the prompts' own `verifier` column (embedded tasks have it), the preset's, and the domain's own name where
    a verifier is called like it (`math`, `choice`). Raises ValueError for domains nobody verifies, or that ask for two.
    """
    named: dict[str, set[str]] = {}
    for prompt in prompts:
        own = prompt.columns.get("verifier")
        fallback = preset_named(preset).verifier if preset else prompt.domain
        named.setdefault(prompt.domain, set()).add(own if isinstance(own, str) else fallback)
    several = {domain: sorted(names) for domain, names in named.items() if len(names) > 1}
    if several:
        raise ValueError(f"one domain, several verifiers: {several}; give their prompts different domains")
    found = {domain: names.pop() for domain, names in named.items()}
    unknown = [d for d, name in found.items() if name == d and name not in VERIFIERS]
    if unknown:
        raise ValueError(
            f"no verifier is known for prompts of domain {unknown}; set judge.verifier (one of {sorted(VERIFIERS)}, or a "
            "function), or data.preset for a known data set"
        )
    return found


def _math(completion: str, prompt: Prompt) -> float:
    from surpass.judge.math_answer import verify

    return verify(completion, prompt.answer)


def _code(completion: str, prompt: Prompt) -> float:
    from surpass.judge.code import verify

    return verify(completion, prompt.answer)


def _check_sandbox() -> None:
    """Said before anything is written, not for every answer."""
    from surpass.judge.sandbox import SandboxUnavailable, check_sandbox

    try:
        check_sandbox()
    except SandboxUnavailable as error:
        raise ValueError(
            f"verifier 'code' would run programs a model wrote, and there is no sandbox verifier here: {error}. Or use "
            "prompts with checkable answers, a method that needs no reward, or your own judge.verifier "
            "path/file.py:function that runs them in a sandbox of yours"
        ) from None


def _exact(completion: str, prompt: Prompt) -> float:
    """The marked answer, or the whole completion, is one of the gold answers up to case and spacing."""
    return float(_text_vote(completion) in {normalised(gold) for gold in _golds(prompt)})


def _contains(completion: str, prompt: Prompt) -> float:
    """A gold answer occurs in the completion as whole words."""
    text = normalised(completion)
    found = (re.search(rf"(?<!\w){re.escape(normalised(gold))}(?!\w)", text) for gold in _golds(prompt))
    return float(any(found))


def _choice(completion: str, prompt: Prompt) -> float:
    gold = str(prompt.answer).strip().strip("()").upper()
    if not re.fullmatch("[A-E]", gold):
        raise ValueError(
            f"expected a letter A-E as gold answer of prompt {prompt.id!r}, found {prompt.answer!r}"
        )
    return float(chosen_letter(completion) == gold)


def _golds(prompt: Prompt) -> list[str]:
    several = isinstance(prompt.answer, (list, tuple))
    golds = [str(gold) for gold in (prompt.answer if several else [prompt.answer])]
    if not golds or not all(gold.strip() for gold in golds):
        raise ValueError(f"the gold answer of prompt {prompt.id!r} is blank: {prompt.answer!r}")
    return golds


def _text_vote(completion: str) -> str:
    marked = marked_answer(completion)
    return normalised(completion if marked is None else marked)


def _number_vote(completion: str) -> str | None:
    found = final_answer(completion)
    return None if found is None else normalised(found.strip("$")).replace(",", "").replace(" ", "")


def _only_isolated(completion: str, prompt: Prompt) -> float:
    raise NotImplementedError(
        "a verifier given as a function runs in a worker process only; use it through Judge"
    )


def _embedded(completion: str, prompt: Prompt) -> float:
    """As the task the prompt came from would have it."""
    from surpass.tasks import verify

    task = prompt.columns.get("verifier")
    if not isinstance(task, str) or not task.startswith("embedded:"):
        raise ValueError(
            f"prompt {prompt.id!r} comes from no embedded task; set judge.verifier embedded:TASK"
        )
    return verify(task.removeprefix("embedded:"), completion, prompt)


def _embedded_task(name: str) -> Verifier:
    from surpass.tasks import task_named
    from surpass.tasks import verify as verify_task

    tasks = name.removeprefix("embedded:")
    for task in tasks.split("+"):
        task_named(task)

    def verify(completion: str, prompt: Prompt) -> float:
        return verify_task(tasks, completion, prompt)

    return Verifier(name, verify, vote=_line_vote)


def _line_vote(completion: str) -> str:
    from surpass.tasks import final_line

    return final_line(completion)


VERIFIERS = {
    verifier.name: verifier
    for verifier in (
        Verifier("math", _math, isolated="surpass.judge.math_answer:verify", vote=_number_vote),
        Verifier("code", _code, isolated="surpass.judge.code:verify"),
        Verifier("exact", _exact, vote=_text_vote),
        Verifier("contains", _contains, vote=_text_vote),
        Verifier("choice", _choice, vote=chosen_letter),
        Verifier("embedded", _embedded, vote=_line_vote),
    )
}
