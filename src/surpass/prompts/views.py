"""Views: the context a role reads in place of the student's own prompt.

A view changes what stands before the answer, never the answer: the response tokens are scored as they were written.
On-policy context distillation reads the student's answer after a worked solution or a critique (arXiv 2602.12125);
demonstrations come from arXiv 2601.19897. The wording is ours and can be replaced.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from surpass.records import Prompt

Kind = Literal["plain", "own_template", "solution", "critique", "hint", "demonstration"]
Messages = tuple[dict[str, Any], ...] | str

TEMPLATES: dict[str, str] = {
    "solution": (
        "{problem}\n\nHere is a worked solution to this problem:\n\n{solution}\n\n"
        "Read it until you understand every step. Then solve the problem yourself, in your own words and your own way, "
        "as if you had not seen it."
    ),
    "hint": "{problem}\n\nHint: {hint}",
    "demonstration": (
        "{problem}\n\nThis is an example of a good answer:\n\n{demonstration}\n\n"
        "Now give an answer of your own, in your own words."
    ),
    "critique": (
        "{critique}\n\nWith this in mind, write your solution again. Keep the steps that are right and keep your style; "
        "change only what is wrong."
    ),
}
NO_CRITIQUE = "Please go over your solution once more and check each step."


@dataclass(frozen=True)
class View:
    """What a role reads.

    kind:
    - `plain`: the student's prompt. `own_template`: the same messages, named so where the role's chat template is
      meant to differ from the student's.
    - `solution`, `hint`, `demonstration`: one user turn of the problem, the privileged text, and an instruction.
    - `critique`: problem, the student's own answer as the assistant's turn, then the critique and the request to
      write it again. The critique is the feedback on that answer, else the prompt's privileged one, else `fallback`.

    template: text with `{problem}` and the kind's own name in braces (for critique: of the last turn); None: TEMPLATES.
    field: the privileged text that is read; None: the one called like the kind.
    Raises ValueError for an unknown kind and for a template that leaves out the privileged text.
    """

    kind: Kind = "plain"
    template: str | None = None
    field: str | None = None
    fallback: str = NO_CRITIQUE

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"unknown view {self.kind!r}; there are {list(get_args(Kind))}")
        if self.kind not in TEMPLATES:
            if self.template is not None or self.field is not None:
                raise ValueError(
                    f"view {self.kind!r} reads the prompt as it is: it takes no template and no field"
                )
        elif f"{{{self.kind}}}" not in self.text:
            raise ValueError(
                f"the template of view {self.kind!r} lacks {{{self.kind}}}, found {self.template!r}"
            )

    @property
    def text(self) -> str:
        """The template in use."""
        return self.template if self.template is not None else TEMPLATES.get(self.kind, "{problem}")

    def prompt_for(
        self, prompt: Prompt, response_text: str | None = None, feedback: str | None = None
    ) -> Messages:
        """The messages the role reads: a conversation for a conversation, plain text for plain text.

        response_text: the student's answer, and feedback: what the judge said of it; only `critique` reads them.
        Raises ValueError where the prompt lacks the privileged text or, for `critique`, where there is no answer.
        """
        if self.kind not in TEMPLATES:
            return prompt.messages
        if self.kind == "critique":
            return self._critique(prompt, response_text, feedback)
        secret = self._privileged(prompt)
        return _ask(prompt, _fill(self.text, problem=_problem(prompt), **{self.kind: secret}))

    def _critique(self, prompt: Prompt, response_text: str | None, feedback: str | None) -> Messages:
        if response_text is None:
            raise ValueError(
                f"view 'critique' of prompt {prompt.id!r} needs the student's answer, and there is none"
            )
        critique = feedback or prompt.privileged.get(self.field or "critique") or self.fallback
        problem = _problem(prompt)
        request = _fill(self.text, problem=problem, critique=critique)
        if isinstance(prompt.messages, str):
            return f"{prompt.messages}{response_text}\n\n{request}\n\n"
        return (
            *prompt.messages,
            {"role": "assistant", "content": response_text},
            {"role": "user", "content": request},
        )

    def _privileged(self, prompt: Prompt) -> str:
        name = self.field or self.kind
        text = prompt.privileged.get(name)
        if not text:
            raise ValueError(
                f"view {self.kind!r} reads the privileged {name!r} of every prompt, and prompt {prompt.id!r} has "
                f"{sorted(prompt.privileged) or 'none'}; add a {name!r} column, or name yours with data.fields.{name}"
            )
        return text


def _problem(prompt: Prompt) -> str:
    """The text of the question: the plain text, or the last user turn."""
    if isinstance(prompt.messages, str):
        return prompt.messages
    last = prompt.messages[-1]
    if last["role"] != "user" or not isinstance(last["content"], str):
        raise ValueError(
            f"views rewrite the last user turn as text, but prompt {prompt.id!r} ends with {last['role']!r} and "
            f"{type(last['content']).__name__} content"
        )
    return last["content"]


def _ask(prompt: Prompt, text: str) -> Messages:
    """The same conversation with another last turn."""
    if isinstance(prompt.messages, str):
        return text
    return (*prompt.messages[:-1], {"role": "user", "content": text})


def _fill(template: str, **texts: str) -> str:
    # One pass over known names only: braces of LaTeX, in the template or in a text, stay as they are.
    return re.sub(r"\{(\w+)\}", lambda match: texts.get(match[1], match[0]), template)
