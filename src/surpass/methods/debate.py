"""A debate of several teachers on one question, and how far each is to be believed (arXiv 2605.01347).

The debate stays on the teachers' side: the student never reads it, and the teachers do not read the student's answer.
The wording is ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from surpass.methods.run import Run
from surpass.prompts.templates import render
from surpass.prompts.views import Messages, View
from surpass.records import Prompt
from surpass.roles.role import Role
from surpass.rollout.engine import Sampling

TEMPLATES = {
    "first": "You are expert {expert}. Answer on your own, with your reasons.",
    "later": (
        "You are expert {expert}. This is the discussion so far:\n\n{debate}\n\n"
        "Say where the others or you were wrong, and give a better answer."
    ),
    "confidence": (
        " End with your confidence that your answer is right, a number from 0 to 100, as <<CONFIDENCE=number>>."
    ),
    "answer": (
        "You are expert {expert}. This question has been discussed:\n\n{debate}\n\n"
        "Now give the final answer, in the form the question asks for."
    ),
}
PLAIN = View("plain")
_TAG = re.compile(r"<<\s*CONFIDENCE\s*=\s*(\d+(?:\.\d+)?)\s*%?\s*>>", re.IGNORECASE)


def confidence_in(text: str) -> float | None:
    """The last confidence tag, in [0, 100]; None where there is none, or it is beyond."""
    found = _TAG.findall(text)
    value = float(found[-1]) if found else None
    return value if value is not None and value <= 100 else None


def confidence_weights(
    confidences: Sequence[float | None], spoke: Sequence[bool], temperature: float = 1.0
) -> list[float]:
    """`K` weights that sum to 1: softmax(confidence / (100 temperature)) over those who spoke, 0 for the others.

    Uniform over those who spoke where one of them gave no confidence, and over all where nobody spoke.
    """
    those = [k for k, heard in enumerate(spoke) if heard]
    if not those:
        return [1 / len(spoke)] * len(spoke)
    given = [confidences[k] for k in those]
    known = [c for c in given if c is not None]
    scores = [c / (100 * temperature) for c in known] if len(known) == len(given) else [0.0] * len(given)
    shares = [math.exp(score - max(scores)) for score in scores]
    weights = [0.0] * len(spoke)
    for k, share in zip(those, shares, strict=True):
        weights[k] = share / sum(shares)
    return weights


@dataclass
class Debate:
    """One question. statements: by round and teacher; empty where a teacher failed. spoke: `K`, who failed in no round."""

    prompt: Prompt
    spoke: list[bool]
    statements: list[list[str]] = field(default_factory=list)

    @property
    def transcript(self) -> str:
        """Everything said so far."""
        return "\n\n".join(
            f"Expert {_letter(k)}, round {r + 1}: {text}"
            for r, statements in enumerate(self.statements)
            for k, text in enumerate(statements)
            if text
        )

    @property
    def confidences(self) -> list[float | None]:
        """`K`: what each said of itself in the last round."""
        return [confidence_in(text) for text in self.statements[-1]] if self.statements else []

    def turn(self, teacher: int, last: bool) -> Messages:
        """What `teacher` is asked in the next round."""
        name = "later" if self.statements else "first"
        return self._ask(TEMPLATES[name] + (TEMPLATES["confidence"] if last else ""), teacher)

    def context(self, teacher: int) -> Messages:
        """What `teacher` reads while it grades the student's answer."""
        return self._ask(TEMPLATES["answer"], teacher)

    def _ask(self, template: str, teacher: int) -> Messages:
        # The transcript comes last: braces within it are nobody's business.
        text = template.replace("{expert}", _letter(teacher)).replace("{debate}", self.transcript)
        messages = self.prompt.messages
        if isinstance(messages, str):
            return f"{messages}\n\n{text}\n\n"
        *before, last = messages
        if last["role"] == "user" and isinstance(last["content"], str):
            return (*before, {**last, "content": f"{last['content']}\n\n{text}"})
        return (*messages, {"role": "user", "content": text})


def hold_debates(
    run: Run, prompts: Sequence[Prompt], teachers: Sequence[Role], rounds: int, sampling: Sampling
) -> dict[str, Debate]:
    """A debate of `rounds` on each prompt, by prompt id. In a round all speak at once, knowing the earlier rounds.

    A teacher whose window the discussion does not fit, or that says nothing, has failed in this debate.
    """
    debates = {p.id: Debate(p, [True] * len(teachers)) for p in prompts}
    for r in range(rounds):
        said = {id: [""] * len(teachers) for id in debates}
        for k, teacher in enumerate(teachers):
            asked = [
                replace(d.prompt, id=f"{id}/round{r}", messages=d.turn(k, r + 1 == rounds))
                for id, d in debates.items()
            ]
            reading = replace(teacher, view=PLAIN)
            fitting = [p for p in asked if length_for(run, reading, p) < teacher.policy.max_length]
            for prompt, text in zip(fitting, _write(run, reading, fitting, sampling), strict=True):
                said[prompt.id.removesuffix(f"/round{r}")][k] = text
        for id, debate in debates.items():
            debate.statements.append(said[id])
            debate.spoke = [heard and bool(text) for heard, text in zip(debate.spoke, said[id], strict=True)]
    return debates


def length_for(run: Run, teacher: Role, prompt: Prompt) -> int:
    """Tokens of a prompt as a teacher reads it."""
    args = teacher.template_args or run.template_args
    return len(render(prompt, teacher.policy.tokenizer, template_args=args))


def _write(run: Run, teacher: Role, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
    if not prompts:
        return []
    written = run.generate(prompts, 1, teacher, sampling)
    for prompt in prompts:  # nobody asks this again
        run.rendered.pop(prompt.id, None)
    tokenizer = teacher.policy.tokenizer
    texts = tokenizer.batch_decode(written.response.tolist(), skip_special_tokens=True)
    return [str(text).strip() for text in texts]


def _letter(teacher: int) -> str:
    return chr(ord("A") + teacher)
