"""A world so small that expectations are sums: real Qwen3 policies over a handful of tokens.

Tokens are the letters `abc...`; the last one, `.`, ends an answer. With `V` tokens and at most `L` of them
per answer, `every_answer` lists the whole sample space, `probability` weighs it, and `expected_gradient` is
the gradient of a method in expectation, without sampling noise. Logits are float32, so equalities hold to
about 1e-5 (`CLOSE`).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from surpass.learn.aggregate import denominators
from surpass.methods.base import Method
from surpass.methods.run import Run
from surpass.models.forward import response_hidden
from surpass.models.policy import Policy
from surpass.records import Author, Finish, Prompt, Ragged, Rollouts
from surpass.roles.role import Role
from surpass.rollout.engine import Completions, Sampling

# Sums of a few hundred float32 terms of size 1.
CLOSE: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-5}
V = 4
EOS = V - 1
PROMPT = Prompt(id="p", messages="ab", answer="c")


def tokenizer(vocabulary: int = V) -> PreTrainedTokenizerFast:
    """One letter is one token; `.` (the last id) is EOS."""
    letters = {chr(ord("a") + i): i for i in range(vocabulary - 1)} | {".": vocabulary - 1}
    inner = Tokenizer(models.WordLevel(letters, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=".", pad_token=".", unk_token="a")


def policy(seed: int = 0, vocabulary: int = V, name: str = "") -> Policy:
    """A random one-layer Qwen3, with weights large enough that its distributions are far from uniform."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=32,
        initializer_range=0.4,
        tie_word_embeddings=False,
        eos_token_id=vocabulary - 1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).eval()
    return Policy(model, tokenizer(vocabulary), name or f"seed-{seed}")


def sharpened(teacher: Policy, factor: float = 1e4) -> Policy:
    """The same policy with its logits multiplied: with a large factor its distributions are one-hot."""
    sharp = Policy(copy.deepcopy(teacher.model), teacher.tokenizer, f"{teacher.name}-sharp")
    with torch.no_grad():
        sharp.head.weight.mul_(factor)
    return sharp


@dataclass
class Scripted:
    """An engine that writes the given answers, in order and over again, with `writer`'s own log-probs."""

    writer: Policy
    answers: Sequence[Sequence[int]]
    calls: list[Ragged] = field(default_factory=list)
    """The prompt ids of every call so far."""
    version: int = 0

    def generate(
        self,
        prompt_ids: Ragged,
        n: int,
        sampling: Sampling,
        seeds: Tensor,
        progress: Callable[[int, int], None] | None = None,
    ) -> Completions:
        del seeds, progress
        self.calls.append(prompt_ids)
        rows = torch.arange(len(prompt_ids)).repeat_interleave(n)
        answers = list(itertools.islice(itertools.cycle(self.answers), len(rows)))
        response = Ragged.from_list(answers, torch.int64)
        logp = _token_logp(self.writer, prompt_ids.select(rows), response, sampling.temperature).detach()
        return Completions(response, logp, _finish(response), torch.full((len(rows),), self.version))

    def update(self, version: int) -> None:
        self.version = version


@dataclass(frozen=True)
class Verdict:
    reward: Tensor
    components: dict[str, Tensor]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Verifier:
    """A judge that rewards each completion's text by a function."""

    reward: Callable[[str], float]

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: object = None
    ) -> Verdict:
        del completion_ids
        del prompts
        reward = torch.tensor([self.reward(text) for text in completions])
        return Verdict(reward, {"verifier": reward}, {})


def world(
    answers: Sequence[Sequence[int]] | None = None,
    *,
    student: Policy | None = None,
    teacher: Policy | None = None,
    reference: Policy | None = None,
    reward: Callable[[str], float] | None = None,
    teacher_answers: Sequence[Sequence[int]] | None = None,
    **settings: Any,
) -> Run:
    """A run whose student writes `answers` (by default all of length up to 2), its teacher its own.

    The policies default to three different ones (seeds 0, 1, 2). settings: further fields of `Run`.
    """
    student = student or policy(0)
    teacher = teacher or policy(1)
    answers = every_answer(2) if answers is None else answers
    judge: Any = None if reward is None else Verifier(reward)
    return Run(
        **{
            "student": student,
            "engine": Scripted(student, answers),
            "sampling": Sampling(max_new_tokens=max(len(a) for a in answers)),
            "judge": judge,
            "teachers": {"default": Role("teacher", teacher)},
            "reference": Role("reference", reference or policy(2)),
            "engine_for": lambda writer: Scripted(writer, teacher_answers or answers),
            **settings,
        }
    )


def every_answer(length: int, vocabulary: int = V, eos: int | None = None) -> list[list[int]]:
    """The sample space: every answer that ends with EOS or has `length` tokens. eos -1: EOS ends nothing."""
    eos = vocabulary - 1 if eos is None else eos
    out: list[list[int]] = []
    for ids in itertools.product(range(vocabulary), repeat=length):
        end = ids.index(eos) + 1 if eos in ids else length
        if list(ids[:end]) not in out:
            out.append(list(ids[:end]))
    return out


def rollouts(
    run: Run,
    answers: Sequence[Sequence[int]],
    prompts: Sequence[Prompt] | None = None,
    author: Author = Author.STUDENT,
    group: Sequence[int] | None = None,
) -> Rollouts:
    """Answers to one prompt (or one prompt each), written by the student unless said otherwise.

    The student's own log-probs are the sampler's; answers of the data set have none.
    """
    chosen = tuple(prompts or [PROMPT] * len(answers))
    context = [run.student.tokenizer(str(p.messages))["input_ids"] for p in chosen]
    prompt_ids, response = Ragged.from_list(context, torch.int64), Ragged.from_list(answers, torch.int64)
    logp = _token_logp(run.student, prompt_ids, response, run.sampling.temperature).detach()
    return Rollouts(
        prompts=chosen,
        prompt_ids=prompt_ids,
        response=response,
        author=torch.full_like(response.values, int(author), dtype=torch.int8),
        sampler_logp=torch.full_like(logp, torch.nan) if author == Author.DATA else logp,
        group=torch.zeros(len(answers), dtype=torch.int64) if group is None else torch.tensor(group),
        finish=_finish(response),
        version=torch.zeros(len(answers), dtype=torch.int64),
        temperature=run.sampling.temperature,
    )


def distributions(reader: Policy, batch: Rollouts, temperature: float = 1.0) -> Tensor:
    """`[T, V]` log-probs of a policy at every response token, with gradient."""
    hidden = response_hidden(reader, batch.prompt_ids, batch.response)
    return reader.head.logits(hidden, temperature).log_softmax(-1)


def token_logp(reader: Policy, batch: Rollouts, temperature: float = 1.0) -> Tensor:
    """`[T]` log-prob of each response token, with gradient."""
    return _token_logp(reader, batch.prompt_ids, batch.response, temperature)


def sequence_logp(reader: Policy, batch: Rollouts) -> Tensor:
    """`[N]` log-prob of each whole answer, with gradient."""
    return batch.ragged(token_logp(reader, batch)).sum()


def probability(reader: Policy, batch: Rollouts) -> Tensor:
    """`[N]` exact probability of each answer, detached; over `every_answer` they sum to 1."""
    return sequence_logp(reader, batch).detach().exp()


def gradient(student: Policy, loss: Tensor) -> Tensor:
    """The gradient of a scalar with respect to all weights of the student, as one flat vector."""
    parameters = [p for p in student.model.parameters() if p.requires_grad]
    parts = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, parts)])


def expected_gradient(run: Run, method: Method, batch: Rollouts, weight: Tensor | None = None) -> Tensor:
    """Gradient of `sum_i weight_i sum_t loss_it`: tokens summed, answers weighted.

    weight: `[N]`, the student's own probability by default. The method's averaging is left aside: this is its
    expected gradient per answer.
    """
    weight = probability(run.student, batch) if weight is None else weight
    loss = method.loss(run, batch)
    total = torch.zeros(())
    for term in loss.terms:
        values = torch.where(batch.mask(term.stream), term.values, torch.zeros_like(term.values))
        total = total + term.coefficient * (batch.ragged(values).sum() * weight).sum()
    return gradient(run.student, total)


def step_gradient(run: Run, method: Method, batch: Rollouts, micro: int | None = None) -> Tensor:
    """The gradient of one update, averaged as the method says, in micro-batches of `micro` answers."""
    total, divisors = None, None
    for rows in torch.arange(len(batch)).split(micro or len(batch)):
        part = batch.select(rows)
        loss = method.loss(run, part)
        if divisors is None:
            masks = {term.stream: batch.ragged(batch.mask(term.stream)) for term in loss.terms}
            divisors = denominators([term.key for term in loss.terms], masks)
        shares = [
            t.contribution(part.ragged(part.mask(t.stream)), divisors[t.key].float()) for t in loss.terms
        ]
        found = gradient(run.student, torch.stack(shares).sum())
        total = found if total is None else total + found
    assert total is not None
    return total


def prompts(count: int, **changes: Any) -> list[Prompt]:
    """Different prompts `p0, p1, ...` with the texts `a`, `b`, `ab`, ..., and whatever else is asked for."""
    texts = ["a", "b", "ab", "ba", "aa", "bb"]
    return [replace(PROMPT, id=f"p{i}", messages=texts[i % len(texts)], **changes) for i in range(count)]


def _token_logp(reader: Policy, prompt_ids: Ragged, response: Ragged, temperature: float) -> Tensor:
    logits = reader.head.logits(response_hidden(reader, prompt_ids, response), temperature)
    return logits.log_softmax(-1).gather(-1, response.values.unsqueeze(-1)).squeeze(-1)


def _finish(response: Ragged) -> Tensor:
    ended = [len(ids) > 0 and int(ids[-1]) == EOS for ids in response.tolist()]
    return torch.tensor([int(Finish.EOS if e else Finish.LENGTH) for e in ended])
