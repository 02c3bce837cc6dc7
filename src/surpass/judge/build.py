"""A judge from names, as a configuration gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from surpass.judge.functions import load_function
from surpass.judge.judge import Component, Judge, OnFailure
from surpass.judge.verifiers import verifier_named
from surpass.records import Prompt


def build_judge(
    prompts: Sequence[Prompt],
    verifiers: Mapping[str, str],
    rewards: Mapping[str, float] | None = None,
    *,
    on_failure: OnFailure = "skip",
    time_limit: float = 5.0,
    workers: int = 1,
) -> Judge:
    """One component per verifier, and one per reward function.

    verifiers: domain -> verifier (`default`: every domain); domains that share one share its component.
    rewards: `module:function` or `path/file.py:function` -> weight; the component is called like the function.
    Raises ValueError for unknown names, and for domains of `prompts` nothing would judge.
    """
    components = []
    for name in dict.fromkeys(verifiers.values()):
        domains = frozenset(domain for domain, verifier in verifiers.items() if verifier == name)
        source = verifier_named(name)
        components.append(Component(_short(name), source, domains=None if "default" in domains else domains))
    for target, weight in (rewards or {}).items():
        components.append(Component(_short(target), load_function(target), weight))
    if not rewards and "default" not in verifiers:
        unjudged = sorted({prompt.domain for prompt in prompts} - set(verifiers))
        if unjudged:
            raise ValueError(
                f"no verifier for prompts of domain {unjudged}; set judge.verifier, or add judge.rewards"
            )
    return Judge(components, on_failure=on_failure, time_limit=time_limit, workers=workers)


def _short(name: str) -> str:
    """The component's name in metrics: of `file.py:function` the function, of `embedded:TASK` the task."""
    return name.rpartition(":")[2]
