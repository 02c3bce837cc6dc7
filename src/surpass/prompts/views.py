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

Kind = Literal[
    "plain",
    "own_template",
    "solution",
    "critique",
    "hint",
    "demonstration",
    "refine",
    "refine_with_solution",
    "silent_key",
]
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
    "refine": (
        "{problem}\n\nThis is a first attempt at it:\n\n{draft}\n\n"
        "Rewrite the attempt as one clean answer. Keep its structure and every step that is right, put right whatever is "
        "wrong, and finish it if it is unfinished. Write the new answer alone, without a word about the attempt."
    ),
    "refine_with_solution": (
        "{problem}\n\nThis is a first attempt at it:\n\n{draft}\n\nThis is a correct solution:\n\n{solution}\n\n"
        "Rewrite the attempt as one clean answer. Keep its structure and every step that is right, and put right whatever "
        "the solution shows to be wrong. Write the new answer alone, without a word about the attempt or the solution."
    ),
    "silent_key": (
        "{problem}\n\n[For you alone: the correct final answer is {answer}. Never mention it or this note. Derive every "
        "step from the problem itself, and use the answer only to compare with your own result at the end.]"
    ),
}
# The texts a kind reads besides the problem, the one `View.field` renames first.
READS: dict[str, tuple[str, ...]] = {
    **{kind: (kind,) for kind in ("solution", "hint", "demonstration", "critique")},
    "refine": ("draft",),
    "refine_with_solution": ("draft", "solution"),
    "silent_key": ("answer",),
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
    - `refine`: one user turn of the problem, the privileged `draft`, and the request to rewrite it (arXiv 2606.08432);
      `refine_with_solution` shows the privileged `solution` too.
    - `silent_key`: one user turn of the problem and a private note with the prompt's answer (arXiv 2605.09725).

    template: text with `{problem}` and the texts of READS in braces (for critique: of the last turn); None: TEMPLATES.
    field: the privileged text that is read in place of the first of READS; None: the one of that name.
    Raises ValueError for an unknown kind and for a template that leaves out the privileged text.
    """

    kind: Kind = "plain"
    template: str | None = None
    field: str | None = None
    fallback: str = NO_CRITIQUE

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"unknown view {self.kind!r}; there are {list(get_args(Kind))}")
        if self.kind not in TEMPLATES and (self.template is not None or self.field is not None):
            raise ValueError(
                f"view {self.kind!r} reads the prompt as it is: it takes no template and no field"
            )
        for name in READS.get(self.kind, ()):
            if f"{{{name}}}" not in self.text:
                raise ValueError(
                    f"the template of view {self.kind!r} lacks {{{name}}}, found {self.template!r}"
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
        first, *others = READS[self.kind]
        texts = {name: self._privileged(prompt, name) for name in others}
        texts[first] = self._privileged(prompt, self.field or first)
        return _ask(prompt, _fill(self.text, problem=_problem(prompt), **texts))

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

    def _privileged(self, prompt: Prompt, name: str) -> str:
        text = prompt.privileged.get(name)
        if name == "answer" and not text and prompt.answer is not None:
            return str(prompt.answer)
        if name == "draft" and text is not None:
            return text  # an attempt may be empty
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
