"""A role: a policy, the context it reads, and the rule by which its weights follow the student.

Teacher, reference, old policy, self-teacher, oracle and anchor are all roles; nothing else distinguishes them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from surpass.learn.head import Head
from surpass.models.policy import Policy
from surpass.prompts.templates import render
from surpass.prompts.views import View
from surpass.records import Prompt, Ragged, Rollouts
from surpass.roles.sync import Frozen, Live, Sync


@dataclass
class Role:
    """Who is asked for an opinion on the student's tokens.

    name: as it appears in `Rollouts.scores` and metrics. view: the context it reads; None reads the very prompt ids
    the student was given. adapter: False reads the policy with its LoRA adapter switched off.
    """

    name: str
    policy: Policy
    view: View | None = None
    sync: Sync = field(default_factory=Frozen)
    adapter: bool = True
    template_args: dict[str, Any] = field(default_factory=dict)

    def prompt_ids(self, rollouts: Rollouts) -> Ragged:
        """The context of each sequence as this role reads it, `N` sequences of token ids."""
        if self.view is None:
            return rollouts.prompt_ids
        texts = [
            self.policy.tokenizer.decode(ids, skip_special_tokens=True) for ids in rollouts.response.tolist()
        ]
        feedback = rollouts.feedback or (None,) * len(rollouts)
        contexts = [
            Prompt(id=prompt.id, messages=self.view.prompt_for(prompt, str(text), note))
            for prompt, text, note in zip(rollouts.prompts, texts, feedback, strict=True)
        ]
        rendered = [render(c, self.policy.tokenizer, template_args=self.template_args) for c in contexts]
        return Ragged.from_list(rendered)

    @property
    def head(self) -> Head:
        """The output head its hidden states are read with; without the adapter where the role is."""
        with self.policy.adapter(self.adapter):
            return self.policy.head

    def reading(self, view: View | None) -> Role:
        """The same role with another context; as it is where `view` is None."""
        return self if view is None else replace(self, view=view)

    @property
    def shares_student(self) -> bool:
        """True where the role has no weights of its own to store."""
        return isinstance(self.sync, Live) or not self.adapter


def snapshot(policy: Policy) -> Policy:
    """A frozen copy of a policy's present weights."""
    model = copy.deepcopy(policy.model).eval().requires_grad_(False)
    return Policy(model, policy.tokenizer, policy.name)


def route(teachers: dict[str, Role], rollouts: Rollouts) -> list[tuple[Role, list[int]]]:
    """Which teacher speaks on which sequences, by the domain of each prompt.

    A single teacher named `default` speaks on everything. Raises ValueError for a domain no teacher knows.
    """
    if set(teachers) == {"default"}:
        return [(teachers["default"], list(range(len(rollouts))))]
    rows: dict[str, list[int]] = {domain: [] for domain in teachers}
    for i, prompt in enumerate(rollouts.prompts):
        if prompt.domain not in rows:
            raise ValueError(
                f"prompt {prompt.id!r} has domain {prompt.domain!r}, but there are teachers for {sorted(teachers)} only; "
                "name a teacher for it (--teachers.DOMAIN PATH) or correct the prompt's domain"
            )
        rows[prompt.domain].append(i)
    return [(teachers[domain], index) for domain, index in rows.items() if index]
