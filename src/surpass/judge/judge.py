"""The judge: components, each with a weight, make one reward per completion."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from surpass.judge.rewards import RewardFunction, call_reward, columns_of
from surpass.judge.verifiers import Verifier
from surpass.judge.workers import Outcome, WorkerPool
from surpass.records import Prompt

log = logging.getLogger(__name__)
OnFailure = Literal["skip", "zero", "raise"]


class VerifierError(RuntimeError):
    """A verifier timed out or raised, and the judge was told to stop then."""


@dataclass(frozen=True)
class Component:
    """One part of the reward. source: a verifier or a reward function. domains: which it speaks on; None: all."""

    name: str
    source: Verifier | RewardFunction
    weight: float = 1.0
    domains: frozenset[str] | None = None


@dataclass(frozen=True)
class Judgement:
    """What the judge says of `N` completions.

    reward: `[N]` float32, the weighted sum of the components that apply; NaN where none does, or where a verifier
    failed and failures are skipped. components: by name, `[N]` float32, unweighted, NaN where not applicable.
    metrics: `judge/<verifier>/timeouts` and `judge/<verifier>/errors`, counts of this call.
    failures: by verifier, the message of its first error (a traceback) or time-out.
    """

    reward: Tensor
    components: dict[str, Tensor]
    metrics: dict[str, float]
    failures: dict[str, str] = field(default_factory=dict)


class Judge:
    """Judges completions by its components. Worker processes start on first use, or with `start`; `close` ends them.

    on_failure: what becomes of a completion whose verifier times out or raises. `skip`: its reward is NaN, whatever
    other components say, so that it is left out and never taken as wrong. `zero`: that component is 0.
    `raise`: VerifierError. Failures are counted in the metrics in every case.
    time_limit: seconds for one verification in a worker. workers: processes per verifier that needs them.
    Raises ValueError for no components, repeated names and weights that are not finite.
    """

    def __init__(
        self,
        components: Sequence[Component],
        *,
        on_failure: OnFailure = "skip",
        time_limit: float = 5.0,
        workers: int = 1,
    ) -> None:
        names = [component.name for component in components]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a judge needs at least one component, each with its own name; found {names}")
        if on_failure not in ("skip", "zero", "raise"):
            raise ValueError(f"on_failure is skip, zero or raise; found {on_failure!r}")
        if bad := {c.name: c.weight for c in components if not math.isfinite(c.weight)}:
            raise ValueError(f"weights must be finite numbers, found {bad}")
        self.components, self.on_failure = tuple(components), on_failure
        self._pools = {
            c.source.isolated: WorkerPool(c.source.isolated, workers, time_limit)
            for c in components
            if isinstance(c.source, Verifier) and c.source.isolated
        }

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> Judgement:
        """Judge `N` completions, one per prompt. completion_ids: their tokens, for reward functions that want them.

        Raises RewardError (reward functions), VerifierError (`on_failure: raise`), and ValueError for prompts without
        the gold answer a verifier needs.
        """
        if len(prompts) != len(completions):
            raise ValueError(
                f"{len(prompts)} prompts but {len(completions)} completions; they must match one to one"
            )
        if completion_ids is not None and len(completion_ids) != len(completions):
            raise ValueError(f"{len(completion_ids)} lists of token ids for {len(completions)} completions")
        columns = columns_of(prompts, completion_ids)
        parts: dict[str, Tensor] = {}
        metrics: dict[str, float] = {}
        failures: dict[str, str] = {}
        failed = torch.zeros(len(prompts), dtype=torch.bool)
        for component in self.components:
            rows = [
                i for i, p in enumerate(prompts) if component.domains is None or p.domain in component.domains
            ]
            asked, written = [prompts[i] for i in rows], [completions[i] for i in rows]
            if isinstance(component.source, Verifier):
                outcomes = self._verify(component.source, asked, written)
                values = [
                    o.score if o.failure is None else self._failed(component, o, p)
                    for o, p in zip(outcomes, asked)
                ]
                failed[[i for i, o in zip(rows, outcomes, strict=True) if o.failure]] = True
                _count(component.name, outcomes, metrics, failures)
            else:
                own = {name: [column[i] for i in rows] for name, column in columns.items()}
                values = call_reward(component.name, component.source, asked, written, own) if rows else []
            part = torch.full((len(prompts),), math.nan)
            part[rows] = torch.tensor([math.nan if v is None else v for v in values])
            parts[component.name] = part
        reward = _total(self.components, parts)
        if self.on_failure == "skip":
            reward[failed] = math.nan
        return Judgement(reward, parts, metrics, failures)

    def start(self) -> None:
        """Start the worker processes now, so that their imports overlap with other work."""
        for pool in self._pools.values():
            pool.start()

    def close(self) -> None:
        """End the worker processes (they end with the program in any case)."""
        for pool in self._pools.values():
            pool.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _verify(self, verifier: Verifier, prompts: list[Prompt], completions: list[str]) -> list[Outcome]:
        for prompt in prompts:
            if prompt.answer is None:
                raise ValueError(
                    f"verifier {verifier.name!r} compares with the gold answer, and prompt {prompt.id!r} has none; "
                    "add an `answer` column, or name yours with data.fields.answer"
                )
        if verifier.isolated:
            tasks = [(text, prompt.answer) for text, prompt in zip(completions, prompts, strict=True)]
            return self._pools[verifier.isolated].run(tasks)
        return [_here(verifier, prompt, text) for prompt, text in zip(prompts, completions, strict=True)]

    def _failed(self, component: Component, outcome: Outcome, prompt: Prompt) -> float | None:
        if self.on_failure == "raise":
            raise VerifierError(
                f"verifier {component.name!r} failed on prompt {prompt.id!r} ({outcome.failure}): {outcome.message}"
            )
        return 0.0 if self.on_failure == "zero" else None


def _here(verifier: Verifier, prompt: Prompt, completion: str) -> Outcome:
    try:
        score = float(verifier.verify(completion, prompt))
    except Exception:
        return Outcome(failure="error", message=traceback.format_exc(limit=20))
    if not math.isfinite(score):
        return Outcome(failure="error", message=f"the verifier returned {score} for prompt {prompt.id!r}")
    return Outcome(score=score)


def _count(name: str, outcomes: list[Outcome], metrics: dict[str, float], failures: dict[str, str]) -> None:
    for plural, kind in (("timeouts", "timeout"), ("errors", "error")):
        metrics[f"judge/{name}/{plural}"] = float(sum(o.failure == kind for o in outcomes))
    # An error says more than a time-out, so it is the one kept.
    first = min((o for o in outcomes if o.failure), key=lambda o: o.failure != "error", default=None)
    if first is not None:
        failures[name] = first.message
        log.warning(
            "verifier %s failed on %d answers; first: %s", name, sum(map(_bad, outcomes)), first.message
        )


def _bad(outcome: Outcome) -> bool:
    return outcome.failure is not None


def _total(components: Sequence[Component], parts: dict[str, Tensor]) -> Tensor:
    values = torch.stack([parts[c.name] for c in components])
    weights = torch.tensor([c.weight for c in components])
    total = (values.nan_to_num() * weights[:, None]).sum(0)
    return total.masked_fill(values.isnan().all(0), math.nan)
