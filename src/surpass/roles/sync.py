"""When a role's weights follow the student's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from surpass.models.policy import Policy


class Sync(Protocol):
    """A rule applied to a role's policy after every optimiser update of the student."""

    def after_update(self, role: Policy, student: Policy, update: int) -> None:
        """update: how many optimiser updates the student has had, counted from 1."""
        ...


@dataclass(frozen=True)
class Frozen:
    """The weights the role was loaded with, for the whole run."""

    def after_update(self, role: Policy, student: Policy, update: int) -> None:
        del role, student, update


@dataclass(frozen=True)
class Live:
    """The student's own current weights: the role shares its policy object, so there is nothing to copy."""

    def after_update(self, role: Policy, student: Policy, update: int) -> None:
        del update
        if role.model is not student.model:
            raise ValueError("a live role must be built on the student's own policy, not on a copy")


@dataclass(frozen=True)
class Ema:
    """Exponential moving average: `role = keep * role + (1 - keep) * student`."""

    keep: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.keep <= 1.0:
            raise ValueError(f"keep is the share of the old average that stays, in [0, 1]; found {self.keep}")

    @torch.no_grad()
    def after_update(self, role: Policy, student: Policy, update: int) -> None:
        del update
        for mine, theirs in zip(role.model.parameters(), student.model.parameters(), strict=True):
            mine.lerp_(theirs.to(mine.dtype), 1.0 - self.keep)


@dataclass(frozen=True)
class CopyEvery:
    """The student's weights, taken anew every `updates` optimiser updates."""

    updates: int

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise ValueError(f"updates must be at least 1, found {self.updates}")

    @torch.no_grad()
    def after_update(self, role: Policy, student: Policy, update: int) -> None:
        if update % self.updates:
            return
        for mine, theirs in zip(role.model.parameters(), student.model.parameters(), strict=True):
            mine.copy_(theirs)
