"""Views: what a role reads in place of the student's prompt."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surpass.prompts.views import NO_CRITIQUE, View
from surpass.records import Prompt


def turns(view: View, prompt: Prompt, *context: str) -> tuple[dict[str, Any], ...]:
    messages = view.prompt_for(prompt, *context)
    assert not isinstance(messages, str)
    return messages


SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+2?"}
SECRETS = {
    "solution": "two and two",
    "hint": "count",
    "demonstration": "like this",
    "critique": "stored critique",
    "privileged_context": "a tip",
}
PROMPT = Prompt(id="p", messages=(SYSTEM, USER), answer="GOLD", privileged=SECRETS)


@pytest.mark.parametrize("kind", ["solution", "hint", "demonstration"])
def test_one_user_turn_with_problem_and_secret(kind):
    system, turn = turns(View(kind), PROMPT)
    assert system == SYSTEM
    assert turn["role"] == "user"
    assert turn["content"].index("What is 2+2?") < turn["content"].index(SECRETS[kind])
    # Only its own secret, and never the answer column.
    assert not any(text in turn["content"] for name, text in {**SECRETS, "x": "GOLD"}.items() if name != kind)


@pytest.mark.parametrize("kind", ["plain", "own_template"])
def test_plain_views_read_the_prompt_as_it_is(kind):
    assert View(kind).prompt_for(PROMPT, "answer", "feedback") == PROMPT.messages


def test_critique_is_a_conversation_about_the_students_own_answer():
    system, problem, answer, request = turns(View("critique"), PROMPT, "It is 5.", "5 is wrong")
    assert (system, problem) == (SYSTEM, USER)
    assert answer == {"role": "assistant", "content": "It is 5."}
    assert request["content"].startswith("5 is wrong")
    assert turns(View("critique"), PROMPT, "x")[-1]["content"].startswith("stored critique")
    bare = Prompt(id="p", messages=(USER,))
    assert turns(View("critique"), bare, "x")[-1]["content"].startswith(NO_CRITIQUE)
    with pytest.raises(ValueError, match="prompt 'p' needs the student's answer"):
        View("critique").prompt_for(PROMPT)


def test_plain_text_stays_plain_text():
    prompt = Prompt(id="p", messages="2+2=", privileged={"hint": "even"})
    assert View("hint", "{hint};{problem}").prompt_for(prompt) == "even;2+2="
    assert View("critique", "{critique}!").prompt_for(prompt, "5", "no") == "2+2=5\n\nno!\n\n"


@given(st.text(), st.text(min_size=1))
def test_texts_are_inserted_verbatim(problem, secret):
    prompt = Prompt(id="p", messages=problem, privileged={"solution": secret})
    template = r"\boxed{} {problem}|{solution}|{other}"
    assert View("solution", template).prompt_for(prompt) == rf"\boxed{{}} {problem}|{secret}|{{other}}"


def test_missing_secret_names_prompt_and_field():
    bare = Prompt(id="p7", messages="q", privileged={"hint": "h", "solution": ""})
    with pytest.raises(
        ValueError, match=r"reads the privileged 'solution'.* prompt 'p7' has \['hint', 'solution'\]"
    ):
        View("solution").prompt_for(bare)


def test_another_field_can_be_read():
    assert "a tip" in turns(View("hint", field="privileged_context"), PROMPT)[-1]["content"]


def test_unusable_views_are_refused():
    with pytest.raises(ValueError, match="unknown view 'soluton'"):
        View("soluton")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lacks \{solution\}"):
        View("solution", "{problem}")
    with pytest.raises(ValueError, match="takes no template"):
        View("plain", "{problem}")
