"""Reading the final answer out of a completion. Text only: nothing here can hang on what a model wrote."""

from __future__ import annotations

import re
import unicodedata

# A sign belongs to the number only where it cannot be a minus or a range ("3-5").
_NUMBER = re.compile(r"(?<![\w.])-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?(?!\d)")
_LETTER = r"\(?([A-E])\)?"
_CHOSEN = re.compile(rf"(?i:answer|choice|option)\b[\s:*]*(?:(?i:is|would be)\b)?[\s:*]*{_LETTER}(?![\w'])")
_ALONE = re.compile(rf"^\W*{_LETTER}[\s.):*]*(?:$|[.):]\s)")


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{...}` (or `\fbox{...}`), braces balanced; None without one."""
    for match in reversed(list(re.finditer(r"\\f?box(?:ed)?\s*\{", text))):
        depth, start = 1, match.end()
        for i in range(start, len(text)):
            # An escaped brace is a set's brace, not the box's.
            if text[i] in "{}" and text[i - 1] != "\\":
                depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[start:i].strip()
    return None


def marked_answer(text: str) -> str | None:
    r"""The last boxed answer, else what follows the last `####`; None where nothing is marked."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    _, mark, rest = text.rpartition("####")
    return (rest.strip().splitlines() or [""])[0].strip() if mark else None


def last_number(text: str) -> str | None:
    """The last number, without thousands commas and currency sign; `3/4` is one number."""
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "").replace("$", "") if numbers else None


def final_answer(text: str) -> str | None:
    """The marked answer, else the last number."""
    marked = marked_answer(text)
    return marked if marked is not None else last_number(text)


def chosen_letter(text: str) -> str | None:
    """The option A-E chosen: marked, else after the last 'answer' / 'option', else alone at the start of the last line.

    A letter inside a sentence is not a choice: "A train leaves" chooses nothing.
    """
    marked = marked_answer(text)
    if marked is not None:
        plain = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", marked)
        alone = _ALONE.match(plain.strip())
        return alone[1] if alone else None
    chosen = _CHOSEN.findall(text)
    if chosen:
        return chosen[-1]
    lines = text.strip().splitlines()
    alone = _ALONE.match(lines[-1].strip()) if lines else None
    return alone[1] if alone else None


def normalised(text: str) -> str:
    """Text up to case, Unicode form, spacing and a final full stop."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".").rstrip()
