"""What a method can ask of the house: write, judge, score, and read the student with gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from surpass.judge.judge import Judge
from surpass.learn.divergence import Divergence
from surpass.learn.vocabulary import TargetTerm, VocabularyDivergence, log_linear_divergence, token_logp
from surpass.models.forward import micro_batches, response_hidden
from surpass.models.policy import Policy
from surpass.prompts.difficulty import pass_rates
from surpass.prompts.stream import PromptStream
from surpass.prompts.templates import render
from surpass.prompts.views import View
from surpass.records import Author, Finish, Prompt, Ragged, Rollouts, Scores
from surpass.roles.distribution import blocks
from surpass.roles.role import Role, route
from surpass.roles.scoring import Want, merge, score
from surpass.roles.sync import Frozen, Live
from surpass.rollout.engine import Completions, Engine, Sampling
from surpass.rollout.episodes import last_action
from surpass.rollout.mixture import generate_mixed
from surpass.rollout.sampling import sequence_seed

Weight = float | Tensor


@dataclass
class Run:
    """One training run as a method sees it.

    teachers: by domain (`default` alone: one for all). temperature: of the loss. off_policy: the batch is used for
    more than one optimiser update, so the log-probs of the weights before the first one are needed.
    tokens: how many tokens were generated, scored and trained so far. critic: says in words what is wrong with an
    answer. rendered: token ids of prompts by id, so that each is rendered once.
    """

    student: Policy
    engine: Engine
    sampling: Sampling
    judge: Judge | None = None
    teachers: dict[str, Role] = field(default_factory=dict)
    reference: Role | None = None
    roles: dict[str, Role] = field(default_factory=dict)
    stream: PromptStream | None = None
    template_args: dict[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    token_budget: int = 16384
    seed: int = 0
    off_policy: bool = False
    step: int = 0
    updates: int = 0
    steps: int = 1
    tokens: Counter[str] = field(default_factory=Counter)
    metrics: dict[str, float] = field(default_factory=dict)
    engine_for: Callable[[Policy], Engine] | None = None
    progress: Callable[[int, int], None] | None = None
    critic: Callable[[Prompt, str], str] | None = None
    rendered: dict[str, list[int]] = field(default_factory=dict)
    _engines: dict[str, Engine] = field(default_factory=dict)
    _asked: Counter[str] = field(default_factory=Counter)
    _asked_in: int = -1

    # -- who writes -------------------------------------------------------------------------------------------------

    def prompt_ids(self, prompts: Sequence[Prompt]) -> Ragged:
        """Token ids of the prompts as the student reads them."""
        for p in prompts:
            if p.id not in self.rendered:
                self.rendered[p.id] = render(p, self.student.tokenizer, template_args=self.template_args)
        return Ragged.from_list([self.rendered[p.id] for p in prompts], torch.int64)

    def seeds(self, prompts: Sequence[Prompt], samples: int, who: str = "") -> Tensor:
        """`[P * samples]` seeds from (run, step, prompt, sample). A prompt asked again within a step goes on counting."""
        if self._asked_in != self.step:
            self._asked, self._asked_in = Counter(), self.step
        seeds = []
        for p in prompts:
            first = self._asked[who + p.id]
            self._asked[who + p.id] += samples
            seeds += [sequence_seed(self.seed, self.step, who + p.id, first + i) for i in range(samples)]
        return torch.tensor(seeds)

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int = 1,
        role: Role | None = None,
        sampling: Sampling | None = None,
    ) -> Rollouts:
        """`samples` answers to each prompt by the student, or by a role that reads the prompt in its own view.

        The answers are stored after the student's own rendering of the prompt, whoever wrote them. sampling: the law
        they are drawn from; None: the run's.
        """
        sampling = sampling or self.sampling
        context = self.prompt_ids(prompts)
        engine, author = self.engine, Author.STUDENT
        reads = context
        if role is not None:
            engine, author = self._engine_of(role), Author.TEACHER
            reads = role.prompt_ids(_unanswered(prompts, context))
        seeds = self.seeds(prompts, samples, "" if role is None else role.name)
        writer = self.student if role is None else role.policy
        with writer.adapter(role is None or role.adapter):
            written = engine.generate(reads, samples, sampling, seeds, self.progress)
        return self._rollouts(prompts, context, samples, written, author, sampling)

    def generate_mixed(self, prompts: Sequence[Prompt], samples: int, teacher_share: float) -> Rollouts:
        """Answers drawn token by token from `teacher_share * teacher + (1 - teacher_share) * student`.

        Each prompt's teacher is its domain's. The tokens count as the student's; `sampler_logp` is the mixture's.
        """

        def write(chosen: Sequence[Prompt], teacher: Role) -> Rollouts:
            context = self.prompt_ids(chosen)
            reads = teacher.prompt_ids(_unanswered(chosen, context))
            written = generate_mixed(
                self.student,
                teacher.policy,
                teacher_share,
                context,
                reads,
                samples,
                self.sampling,
                self.seeds(chosen, samples),
                version=self.updates,
                progress=self.progress,
            )
            return self._rollouts(chosen, context, samples, written, Author.STUDENT, self.sampling)

        return self._routed(prompts, samples, write)

    def _rollouts(
        self,
        prompts: Sequence[Prompt],
        context: Ragged,
        samples: int,
        written: Completions,
        author: Author,
        sampling: Sampling,
    ) -> Rollouts:
        repeat = torch.arange(len(prompts)).repeat_interleave(samples)
        self.tokens["generated"] += len(written.response.values)
        return Rollouts(
            prompts=tuple(prompts[i] for i in repeat.tolist()),
            prompt_ids=context.select(repeat),
            response=written.response,
            author=torch.full_like(written.response.values, int(author), dtype=torch.int8),
            sampler_logp=written.logp,
            group=repeat,
            finish=written.finish,
            version=written.version,
            temperature=sampling.temperature,
        )

    def from_data(self, prompts: Sequence[Prompt], max_new_tokens: int | None = None) -> Rollouts:
        """The data set's own responses, EOS appended, cut at `max_new_tokens` (None: the run's); author DATA.

        Raises ValueError for a prompt without a response.
        """
        limit = max_new_tokens or self.sampling.max_new_tokens
        responses, finish = [], []
        for prompt in prompts:
            if prompt.response is None:
                raise ValueError(
                    f"prompt {prompt.id!r} has no response to learn from; its source needs a `completion` or `response` "
                    "column (name it with --data.fields.response COLUMN)"
                )
            tokenizer = self.student.tokenizer
            ids = tokenizer(prompt.response, add_special_tokens=False)["input_ids"]
            ids = [*ids, *self.student.eos_ids[-1:]]
            cut = len(ids) > limit
            responses.append(ids[:limit])
            finish.append(int(Finish.LENGTH if cut else Finish.EOS))
        response = Ragged.from_list(responses, torch.int64)
        return Rollouts(
            prompts=tuple(prompts),
            prompt_ids=self.prompt_ids(prompts),
            response=response,
            author=torch.full_like(response.values, int(Author.DATA), dtype=torch.int8),
            sampler_logp=torch.full((len(response.values),), float("nan")),
            group=torch.arange(len(prompts)),
            finish=torch.tensor(finish),
            version=torch.zeros(len(prompts), dtype=torch.int64),
        )

    def _engine_of(self, role: Role) -> Engine:
        if role.name not in self._engines:
            if self.engine_for is None:
                raise ValueError(f"role {role.name!r} is asked to write, but this run has no engine for it")
            self._engines[role.name] = self.engine_for(role.policy)
        return self._engines[role.name]

    def write_by_teacher(
        self,
        prompts: Sequence[Prompt],
        samples: int = 1,
        *,
        view: View | None = None,
        sampling: Sampling | None = None,
    ) -> Rollouts:
        """Answers by each prompt's own teacher (routed by domain), as one batch in the order of `prompts`.

        view: the context teachers read; None: their own. sampling: the law they write under; None: the run's.
        """

        def write(chosen: Sequence[Prompt], teacher: Role) -> Rollouts:
            return self.generate(chosen, samples, _reading(teacher, view), sampling)

        return self._routed(prompts, samples, write)

    def _routed(
        self, prompts: Sequence[Prompt], samples: int, write: Callable[[Sequence[Prompt], Role], Rollouts]
    ) -> Rollouts:
        """What `write` gives for each teacher's own prompts, as one batch in the order of `prompts`."""
        if not self.teachers:
            raise ValueError(
                "this method needs a teacher: --teacher PATH, or --teachers.DOMAIN PATH for several"
            )
        routed = route(self.teachers, _unanswered(prompts, self.prompt_ids(prompts)))
        parts = [write([prompts[i] for i in rows], teacher) for teacher, rows in routed]
        order = torch.tensor([i * samples + s for _, rows in routed for i in rows for s in range(samples)])
        return (
            Rollouts.cat(parts).select(torch.argsort(order)).with_(group=torch.sort(order).values // samples)
        )

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
                asked = _reading(teacher, view)
                parts.append((tokens, self._score(asked, rollouts.select(index), want, chosen)))
            scores = merge(parts, len(rollouts.response.values))
        else:
            scores = self._score(_reading(self.role(role), view), rollouts, want, support)
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
    ) -> VocabularyDivergence:
        """Full-vocabulary divergence `[T]` between the student and `log q = sum_i w_i log p_i + const`.

        weights: by role, a number or `[T]`. A role whose weight is the number 0 is never read.
        tokens: `[t]` flat indices, ascending; the result is then `[t]`, and the states of all other tokens never
        reach the head. None: all.
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
            parts.append(log_linear_divergence(hidden[chosen], head, terms, divergence, self.temperature))
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


def _reading(role: Role, view: View | None) -> Role:
    return role if view is None else replace(role, view=view)


def _unanswered(prompts: Sequence[Prompt], context: Ragged) -> Rollouts:
    """Rollouts with empty responses, for roles that are asked to write rather than to score."""
    none = torch.zeros(0, dtype=torch.int64)
    return Rollouts(
        prompts=tuple(prompts),
        prompt_ids=context,
        response=Ragged.from_lengths(none, torch.zeros(len(prompts), dtype=torch.int64)),
        author=none.to(torch.int8),
        sampler_logp=torch.zeros(0),
        group=torch.arange(len(prompts)),
        finish=torch.zeros(len(prompts), dtype=torch.int64),
        version=torch.zeros(len(prompts), dtype=torch.int64),
    )
