"""What a method can ask of the house: write, judge, score, and read the student with gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from surpass.judge.judge import Judge
from surpass.learn.divergence import Divergence
from surpass.learn.vocabulary import TargetTerm, VocabularyDivergence, log_linear_divergence, token_logp
from surpass.methods.writing import Writing
from surpass.models.forward import micro_batches, response_hidden
from surpass.prompts.difficulty import pass_rates
from surpass.prompts.views import View
from surpass.records import Prompt, Rollouts, Scores
from surpass.roles.distribution import blocks
from surpass.roles.role import Role, route
from surpass.roles.scoring import Want, merge, score
from surpass.roles.sync import Frozen, Live
from surpass.rollout.episodes import last_action

Weight = float | Tensor


@dataclass
class Run(Writing):
    """One training run as a method sees it; how answers are written is in `Writing`.

    temperature: of the loss. off_policy: the batch is used for more than one optimiser update, so the log-probs of
    the weights before the first one are needed. critic: says in words what is wrong with an answer.
    """

    judge: Judge | None = None
    reference: Role | None = None
    roles: dict[str, Role] = field(default_factory=dict)
    temperature: float = 1.0
    token_budget: int = 16384
    off_policy: bool = False
    critic: Callable[[Prompt, str], str] | None = None

    # -- how good ---------------------------------------------------------------------------------------------------

    def reward(self, rollouts: Rollouts) -> Rollouts:
        """Judge every answer (of several turns: the last): adds `reward` `[N]` (NaN: not judged) and its components."""
        if self.judge is None:
            raise ValueError("this method needs rewards: set judge.verifier or judge.rewards")
        answers = last_action(rollouts).tolist()
        texts = self.student.tokenizer.batch_decode(answers, skip_special_tokens=True)
        verdict = self.judge(rollouts.prompts, texts, completion_ids=answers)
        self.metrics.update(verdict.metrics)
        return rollouts.with_(reward=verdict.reward, components=verdict.components)

    def pass_rates(
        self, prompts: Sequence[Prompt], samples: int, above: float, smooth: bool = False, chunk: int = 64
    ) -> dict[str, float]:
        """How often the present student answers each prompt right, by prompt id (see `difficulty.pass_rates`).

        above: an answer is right where its reward is above this. chunk: prompts asked at a time.
        """
        ids: list[str] = []
        rewards: list[Tensor] = []
        for start in range(0, len(prompts), chunk):
            judged = self.reward(self.generate(prompts[start : start + chunk], samples))
            assert judged.reward is not None
            ids += [prompt.id for prompt in judged.prompts]
            rewards.append(judged.reward)
        return pass_rates(ids, torch.cat(rewards).tolist(), above, smooth)

    def feedback(self, rollouts: Rollouts) -> Rollouts:
        """Adds what the critic says of every answer; unchanged where the run has no critic."""
        if self.critic is None:
            return rollouts
        texts = self.student.tokenizer.batch_decode(rollouts.response.tolist(), skip_special_tokens=True)
        notes = [self.critic(prompt, str(text)) for prompt, text in zip(rollouts.prompts, texts, strict=True)]
        return rollouts.with_(feedback=tuple(notes))

    # -- what the others would have said ----------------------------------------------------------------------------

    def score(
        self,
        rollouts: Rollouts,
        role: str,
        want: Want | None = None,
        support: Tensor | None = None,
        view: View | None = None,
    ) -> Rollouts:
        """Adds `scores[role]`. `teacher` is routed by domain; `reference`; `old`: the student's weights as they are now.

        view: the context the role reads; None: its own.
        """
        want = want or Want()
        if role == "teacher":
            if not self.teachers:
                raise ValueError(
                    "this method needs a teacher: --teacher PATH, or --teachers.DOMAIN PATH for several"
                )
            parts = []
            for teacher, rows in route(self.teachers, rollouts):
                index = torch.tensor(rows)
                tokens = rollouts.response.tokens_of(index)
                chosen = None if support is None else support[tokens]
                asked = teacher.reading(view)
                parts.append((tokens, self._score(asked, rollouts.select(index), want, chosen)))
            scores = merge(parts, len(rollouts.response.values))
        else:
            scores = self._score(self.role(role).reading(view), rollouts, want, support)
        return rollouts.with_(scores={role: scores})

    @property
    def shared_vocabulary(self) -> int:
        """Tokens that the student, every teacher and the reference have (vocabularies may be padded)."""
        roles = [*self.teachers.values(), *([self.reference] if self.reference else [])]
        return min([self.student.vocabulary, *(role.policy.vocabulary for role in roles)])

    def _score(self, role: Role, rollouts: Rollouts, want: Want, support: Tensor | None) -> Scores:
        if want.hidden and self.off_policy and not isinstance(role.sync, Frozen):
            raise ValueError(
                f"role {role.name!r} moves with every update, so its stored hidden states would be read with a later head; "
                "use one update per batch (train.epochs 1, train.minibatches 1), a frozen role, or estimator sampled"
            )
        self.tokens["scored"] += len(rollouts.response.values)
        return score(
            role,
            rollouts,
            want,
            temperature=self.temperature,
            token_budget=self.token_budget,
            support=support,
        )

    def role(self, name: str) -> Role:
        """A role by name. Raises ValueError with the known ones."""
        if name == "old":
            return Role("old", self.student, sync=Live())
        if name == "reference":
            if self.reference is None:
                raise ValueError(
                    "this setting needs a reference, and there is none: set --reference student (its initial weights) "
                    "or --reference PATH (for example the teacher's checkpoint before its RL)"
                )
            return self.reference
        if name in self.roles:
            return self.roles[name]
        for teacher in self.teachers.values():
            if teacher.name == name:
                return teacher
        raise ValueError(
            f"unknown role {name!r}; this run has {sorted(self.roles)} beside teacher, reference and old"
        )

    # -- the student, with gradient ---------------------------------------------------------------------------------

    def student_hidden(self, batch: Rollouts) -> Tensor:
        """`[T, D]` last hidden states of the student on the batch's own prompts, with gradient."""
        return response_hidden(self.student, batch.prompt_ids, batch.response)

    def student_logp(self, batch: Rollouts, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-prob `[T]` of each response token, with gradient, and entropy `[T]` in nats, detached."""
        hidden = self.student_hidden(batch) if hidden is None else hidden
        ids = batch.response.values.to(hidden.device)
        return token_logp(hidden, self.student.head, ids, self.temperature)

    def divergence(
        self,
        batch: Rollouts,
        hidden: Tensor,
        weights: dict[str, Weight],
        divergence: Divergence,
        tokens: Tensor | None = None,
        loss_weight: Tensor | None = None,
    ) -> VocabularyDivergence:
        """Full-vocabulary divergence `[T]` between the student and `log q = sum_i w_i log p_i + const`.

        weights: by role, a number or `[T]`. A role whose weight is the number 0 is never read.
        tokens: `[t]` flat indices, ascending; the result is then `[t]`, and the states of all other tokens never
        reach the head. None: all. loss_weight: `[T]`, what the loss will multiply each value by, up to a factor
        (`Method.loss_weight`); it spares a product in backward and never changes the result.
        """
        if not len(hidden if tokens is None else tokens):  # nothing to compare, but still part of the graph
            nothing = hidden[:0].sum(-1)
            return VocabularyDivergence(nothing, *[nothing.detach()] * 5)
        head, parts, order = self.student.head, [], []
        for block in blocks(batch, weights, tokens):
            terms = []
            for name, states, weight in block.terms:
                moved = weight.to(hidden.device) if isinstance(weight, Tensor) else weight
                terms.append(TargetTerm(states.to(hidden.device), self.role(name).head, moved))
            chosen = block.tokens.to(hidden.device)
            foreseen = None if loss_weight is None else loss_weight.to(hidden.device)[chosen]
            found = log_linear_divergence(
                hidden[chosen], head, terms, divergence, self.temperature, loss_weight=foreseen
            )
            parts.append(found)
            order.append(chosen)
        back = torch.argsort(torch.cat(order))
        return VocabularyDivergence(*(torch.cat(column)[back] for column in zip(*parts, strict=True)))

    @torch.no_grad()
    def measure(
        self, rollouts: Rollouts, weights: dict[str, Weight], divergence: Divergence
    ) -> VocabularyDivergence:
        """`divergence` `[T]` of the present student on a batch of any size, without gradient; columns on the CPU."""
        model = self.student.model
        was_training = model.training
        model.eval()
        parts, order = [], []
        for rows in micro_batches(rollouts.prompt_ids.lengths + rollouts.lengths, self.token_budget):
            part = rollouts.select(rows)
            tokens = rollouts.response.tokens_of(rows)
            cut: dict[str, Weight] = {
                name: weight[tokens] if isinstance(weight, Tensor) else weight
                for name, weight in weights.items()
            }
            parts.append(self.divergence(part, self.student_hidden(part), cut, divergence))
            order.append(tokens)
        model.train(was_training)
        back = torch.argsort(torch.cat(order))
        return VocabularyDivergence(*(torch.cat(column).cpu()[back] for column in zip(*parts, strict=True)))
