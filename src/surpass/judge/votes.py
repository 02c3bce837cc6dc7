"""Majority votes: which answer a completion gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from surpass.judge.verifiers import verifier_named
from surpass.records import Prompt


def vote_of(verifiers: Mapping[str, str]) -> Callable[[Prompt, str], str | None]:
    """How the answer is read out of a completion, for majority votes.

    verifiers: domain -> name, as `verifier_for` gives it; a single `default` serves every domain.
    """
    known = {domain: verifier_named(name) for domain, name in verifiers.items()}

    def vote(prompt: Prompt, completion: str) -> str | None:
        verifier = known.get(prompt.domain, known.get("default"))
        return verifier.vote(completion) if verifier and verifier.vote else None

    return vote
