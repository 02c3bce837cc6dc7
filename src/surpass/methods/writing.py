"""Who writes the answers of a run: the student, a teacher, both mixed, or a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from surpass.models.policy import Policy
from surpass.prompts.stream import PromptStream
from surpass.prompts.templates import render
from surpass.prompts.views import View
from surpass.records import Author, Finish, Prompt, Ragged, Rollouts
from surpass.roles.role import Role, route
from surpass.rollout.engine import Completions, Engine, Sampling
from surpass.rollout.mixture import generate_mixed
from surpass.rollout.sampling import sequence_seed


@dataclass
class Writing:
    """The half of a run that writes; `Run` adds what judges, scores and learns.

    teachers: by domain (`default` alone: one for all). tokens: how many tokens were generated, scored and trained so
    far. rendered: token ids of prompts by id, so that each is rendered once.
    """

    student: Policy
    engine: Engine
    sampling: Sampling
    teachers: dict[str, Role] = field(default_factory=dict)
    stream: PromptStream | None = None
    template_args: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    step: int = 0
    updates: int = 0
    steps: int = 1
    tokens: Counter[str] = field(default_factory=Counter)
    metrics: dict[str, float] = field(default_factory=dict)
    engine_for: Callable[[Policy], Engine] | None = None
    progress: Callable[[int, int], None] | None = None
    rendered: dict[str, list[int]] = field(default_factory=dict)
    _engines: dict[str, Engine] = field(default_factory=dict)
    _asked: Counter[str] = field(default_factory=Counter)
    _asked_in: int = -1

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
            return self.generate(chosen, samples, teacher.reading(view), sampling)

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
