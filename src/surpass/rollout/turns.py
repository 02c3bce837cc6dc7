"""Answers of several turns: the model acts, its environment answers, and so on, over any engine.

Tokens go in and tokens come out: what the model wrote stays as it was sampled and is never made of text again. Of every
observation only the text between the end of one action and the beginning of the next is rendered, by the chat template,
and appended; those tokens are the tool's (`Author.TOOL`), nobody drew them, and nothing is trained on them. All rows
that still act go through one call of the engine per turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from surpass.judge.environments import Environment, Step, step_all
from surpass.prompts.templates import continuation, render
from surpass.records import Finish, Prompt, Ragged
from surpass.rollout.engine import Completions, Engine, Sampling
from surpass.rollout.sampling import sequence_seed

# Stands for an action in the chat template, which is asked only for what follows it.
ACTION = "0"


@dataclass(frozen=True)
class Turn:
    """One action `[L]` with its log-probs `[L]`, and what it led to.

    text: the action without special tokens. observation: what the model read next, and appended: its tokens, with those
    of the template around it; None and none after the last turn.
    """

    action: Tensor
    logp: Tensor
    text: str
    observation: str | None = None
    appended: tuple[int, ...] = ()


@dataclass
class Episode:
    """One answer. prompt: with what the environment said at the beginning; prompt_ids: its tokens.

    finish: LENGTH where tokens or turns ran out, ABORTED where the environment did not answer in time. reward: the sum
    of the environment's, None where it gave none. version: of the weights that wrote the last turn.
    """

    prompt: Prompt
    prompt_ids: list[int]
    turns: list[Turn] = field(default_factory=list)
    finish: Finish = Finish.LENGTH
    reward: float | None = None
    version: int = 0

    @property
    def length(self) -> int:
        """Tokens of the answer so far, observations included."""
        return sum(len(turn.action) + len(turn.appended) for turn in self.turns)

    @property
    def context(self) -> list[int]:
        """Everything the model reads before its next action."""
        ids = list(self.prompt_ids)
        for turn in self.turns:
            ids += [*turn.action.tolist(), *turn.appended]
        return ids


@dataclass(frozen=True)
class Reader:
    """How a model reads observations: its tokenizer, EOS ids, the template's arguments, and its position limit."""

    tokenizer: PreTrainedTokenizerBase
    eos_ids: Collection[int]
    max_length: int
    template_args: Mapping[str, Any] = field(default_factory=dict)
    role: str = "tool"
    """The chat role observations are given in."""

    def text(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def opening(self, prompt: Prompt, said: str) -> tuple[Prompt, list[int]]:
        """The prompt with what the environment says at the beginning, after the question."""
        said = self.harmless(said)
        if isinstance(prompt.messages, str):
            prompt = replace(prompt, messages=f"{prompt.messages}{said}")
        else:
            *before, last = prompt.messages
            prompt = replace(prompt, messages=(*before, {**last, "content": f"{last['content']}\n\n{said}"}))
        return prompt, render(prompt, self.tokenizer, template_args=self.template_args)

    def appended(self, prompt: Prompt, observation: str, ended: bool) -> list[int]:
        """The tokens between an action and the next one. ended: the action wrote its own EOS.

        Plain text: the observation alone. Raises ValueError for a template that does not close a turn with EOS.
        """
        if isinstance(prompt.messages, str):
            return list(self.tokenizer(observation, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
        more = [{"role": "assistant", "content": ACTION}, {"role": self.role, "content": observation}]
        ids = continuation(prompt.messages, more, self.tokenizer, template_args=self.template_args)
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), None)
        if end is None:
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path!r} does not close the assistant's turn with an EOS "
                f"token, so what follows a sampled turn is not known: {self.tokenizer.decode(ids)!r}"
            )
        return ids[end + 1 :] if ended else ids[end:]

    def harmless(self, observation: str) -> str:
        """Without the texts of special tokens, which would be read as turns that nobody took."""
        added = {str(t.content) for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        # Taking one out may put another together, so until none is left. Single letters mark nothing.
        marks = "|".join(re.escape(t) for t in sorted(added, key=len, reverse=True) if len(t) > 1)
        count = 1 if marks else 0
        while count:
            observation, count = re.subn(marks, "", observation)
        return observation


def write_turns(
    engine: Engine,
    prompts: Sequence[Prompt],
    prompt_ids: Ragged,
    samples: int,
    environments: Sequence[Environment | None],
    *,
    reader: Reader,
    sampling: Sampling,
    seeds: Tensor,
    max_turns: int,
    time_limit: float = 10.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Episode]:
    """`samples` episodes of each of `P` prompts, those of prompt `i` at `i * samples` and on.

    environments: `[P * samples]`, one per episode; None: the first turn is the answer. sampling: its `max_new_tokens`
    are those of the whole answer, observations included. seeds: `[P * samples]`; later turns derive their own.
    time_limit: seconds for one step of an environment. Raises what the engine raises, and ValueError for templates that
    cannot be continued.
    """
    if max_turns < 1:
        raise ValueError(f"max_turns must be at least 1, found {max_turns}")
    opened = _reset(prompts, prompt_ids, samples, environments, reader)
    episodes, begun_alike = [Episode(p, ids) for p, ids, _ in opened], not any(said for *_, said in opened)
    room = [min(sampling.max_new_tokens, reader.max_length - len(e.prompt_ids)) for e in episodes]
    if min(room, default=1) < 1:
        worst = episodes[room.index(min(room))]
        raise ValueError(
            f"prompt {worst.prompt.id!r} has {len(worst.prompt_ids)} tokens with what its environment says, and the model "
            f"reads {reader.max_length}; drop it, or use a model with a longer context"
        )
    acting = list(range(len(episodes)))
    for turn in range(max_turns):
        if not acting:
            break
        left = [room[i] - episodes[i].length for i in acting]
        law = replace(
            sampling,
            max_new_tokens=max(left),
            min_new_tokens=min(sampling.min_new_tokens, max(left)),
        )
        if turn == 0 and begun_alike:  # answers to one prompt share its reading
            written = engine.generate(prompt_ids, samples, law, seeds, progress)
        else:
            contexts = Ragged.from_list([episodes[i].context for i in acting], torch.int64)
            own = torch.tensor([_turn_seed(int(seeds[i]), turn) for i in acting])
            written = engine.generate(contexts, 1, law, own, progress)
        for row, (i, most) in enumerate(zip(acting, left, strict=True)):
            _write(episodes[i], written, row, most, reader)
        acting = [i for i in acting if episodes[i].finish in (Finish.EOS, Finish.STOP) and environments[i]]
        answers = step_all(
            [e for i in acting if (e := environments[i]) is not None],
            [episodes[i].turns[-1].text for i in acting],
            time_limit,
        )
        last = turn + 1 == max_turns
        acting = [
            i
            for i, answer in zip(acting, answers, strict=True)
            if _goes_on(episodes[i], answer, room[i], last, reader)
        ]
    return episodes


def _reset(
    prompts: Sequence[Prompt],
    prompt_ids: Ragged,
    samples: int,
    environments: Sequence[Environment | None],
    reader: Reader,
) -> list[tuple[Prompt, list[int], bool]]:
    """Prompt, token ids, and whether the environment had something to say, of every episode."""
    if len(environments) != len(prompts) * samples:
        raise ValueError(
            f"expected one environment per answer, {len(prompts)} prompts x {samples} samples; found {len(environments)}"
        )
    opened: list[tuple[Prompt, list[int], bool]] = []
    for row, environment in enumerate(environments):
        prompt = prompts[row // samples]
        said = None if environment is None else environment.reset(prompt)
        if said is None:
            opened.append((prompt, prompt_ids[row // samples].tolist(), False))
        else:
            opened.append((*reader.opening(prompt, said), True))
    return opened


def _turn_seed(seed: int, turn: int) -> int:
    return seed if turn == 0 else sequence_seed(seed, turn, "turn", 0)


def _write(episode: Episode, written: Completions, row: int, most: int, reader: Reader) -> None:
    """Add the action of `row`, cut at the `most` tokens this episode still has."""
    action, logp = written.response[row][:most], written.response.like(written.logp)[row][:most]
    cut = len(written.response[row]) > most
    episode.finish = Finish.LENGTH if cut else Finish(int(written.finish[row]))
    episode.version = int(written.version[row])
    episode.turns.append(Turn(action, logp, reader.text(action)))


def _goes_on(episode: Episode, answer: Step | None, room: int, last: bool, reader: Reader) -> bool:
    """Take in what the environment said; False where the episode is over."""
    if answer is None:
        episode.finish = Finish.ABORTED
        return False
    if answer.reward is not None:
        episode.reward = (episode.reward or 0.0) + answer.reward
    if answer.done:
        return False
    turn = episode.turns[-1]
    observation = reader.harmless(answer.observation)
    ended = bool(len(turn.action)) and int(turn.action[-1]) in reader.eos_ids
    appended = [] if last else reader.appended(episode.prompt, observation, ended)
    if last or episode.length + len(appended) >= room:  # no token would be left to act with
        episode.finish = Finish.LENGTH
        return False
    episode.turns[-1] = replace(turn, observation=observation, appended=tuple(appended))
    return True
