"""The order in which prompts are drawn: seeded, mixed over domains in exact proportion, resumable."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from surpass.records import Prompt

_ALL = ""


class PromptStream:
    """An endless sequence of prompts.

    prompts: all of them. seed: of the order; every epoch of every domain has its own. shuffle: False keeps file order.
    ratios: share of each domain, any positive scale; domains left out or at 0 are not drawn. None: one pool of all
    prompts, so that domains come as often as the file has them.

    With ratios, after `n` draws each domain was drawn `floor(n r)` or `ceil(n r)` times, whatever the batch sizes
    (the quota method of Balinski and Young). Raises ValueError for unknown domains and unusable ratios.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        seed: int = 0,
        ratios: Mapping[str, float] | None = None,
        shuffle: bool = True,
    ) -> None:
        if not prompts:
            raise ValueError("a prompt stream needs at least one prompt, found none")
        self.seed, self.shuffle = seed, shuffle
        self._pools, self._shares = _pools(prompts, ratios)
        self._drawn = dict.fromkeys(self._pools, 0)
        self._orders: dict[str, tuple[int, list[int]]] = {}

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts; a new epoch of a domain begins wherever its prompts run out."""
        prompts, self._drawn = self._draw(count)
        return prompts

    def peek(self, count: int) -> list[Prompt]:
        """What `next(count)` would give, without moving on."""
        return self._draw(count)[0]

    @property
    def prompts(self) -> list[Prompt]:
        """All prompts that can be drawn, in file order by domain."""
        return [prompt for pool in self._pools.values() for prompt in pool]

    @property
    def drawn(self) -> dict[str, int]:
        """Prompts drawn so far, by domain; without ratios under one name, the empty one."""
        return dict(self._drawn)

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON-able values."""
        return {**self._identity(), "drawn": dict(self._drawn)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved position. Raises ValueError if it is a position in other prompts or another order."""
        mine = self._identity()
        differing = [name for name, value in mine.items() if state.get(name) != value]
        if differing:
            raise ValueError(
                f"the saved position belongs to another stream: {', '.join(differing)} differ "
                f"(saved {[state.get(n) for n in differing]}, now {[mine[n] for n in differing]}); "
                "resume with the prompts, seed, ratios and shuffle of the first run"
            )
        self._drawn = {domain: int(state["drawn"][domain]) for domain in self._pools}

    def _identity(self) -> dict[str, Any]:
        ids = "\0".join(f"{domain}\0{p.id}" for domain, pool in self._pools.items() for p in pool)
        return {
            "prompts": hashlib.sha256(ids.encode()).hexdigest()[:16],
            "seed": self.seed,
            "shuffle": self.shuffle,
            "ratios": {domain: str(share) for domain, share in self._shares.items()},
        }

    def _draw(self, count: int) -> tuple[list[Prompt], dict[str, int]]:
        if count < 0:
            raise ValueError(f"cannot draw {count} prompts")
        drawn, prompts = dict(self._drawn), []
        for _ in range(count):
            domain = self._choose(drawn)
            prompts.append(self._at(domain, drawn[domain]))
            drawn[domain] += 1
        return prompts, drawn

    def _choose(self, drawn: Mapping[str, int]) -> str:
        upcoming = sum(drawn.values()) + 1
        # Only domains below their upper quota may be drawn: this is what keeps every count within one of n r.
        open_ = [d for d, share in self._shares.items() if drawn[d] < upcoming * share]
        return max(open_, key=lambda d: self._shares[d] / (drawn[d] + 1))

    def _at(self, domain: str, position: int) -> Prompt:
        pool = self._pools[domain]
        epoch, index = divmod(position, len(pool))
        if not self.shuffle:
            return pool[index]
        if self._orders.get(domain, (-1, []))[0] != epoch:
            order = list(range(len(pool)))
            # Text seeds are hashed by `random` itself, alike in every process.
            random.Random(f"{self.seed}/{domain}/{epoch}").shuffle(order)
            self._orders[domain] = (epoch, order)
        return pool[self._orders[domain][1][index]]


def _pools(
    prompts: Sequence[Prompt], ratios: Mapping[str, float] | None
) -> tuple[dict[str, list[Prompt]], dict[str, Fraction]]:
    if ratios is None:
        return {_ALL: list(prompts)}, {_ALL: Fraction(1)}
    known: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        known.setdefault(prompt.domain, []).append(prompt)
    unknown = sorted(set(ratios) - set(known))
    if unknown:
        raise ValueError(f"ratios name domains without prompts: {unknown}; the prompts have {sorted(known)}")
    bad = {d: r for d, r in ratios.items() if not 0 <= r < float("inf")}
    if bad or not any(ratios.values()):
        raise ValueError(f"ratios must be numbers >= 0 with at least one above 0, found {dict(ratios)}")
    # Fractions of the written numbers: 0.1 is a tenth, so that quotas are exact and resume is too.
    exact = {domain: Fraction(str(ratio)) for domain, ratio in ratios.items() if ratio > 0}
    total = sum(exact.values())
    return {d: known[d] for d in exact}, {d: share / total for d, share in exact.items()}
