"""Reading final answers out of text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surpass.judge.answers import chosen_letter, final_answer, last_boxed, last_number, normalised


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{7}", "7"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed {\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} and then \boxed{2", "1"),
        (r"\fbox{3}", "3"),
        (r"\boxed{}", ""),
        (r"\boxed{", None),
        ("none", None),
    ],
)
def test_last_boxed(text, answer):
    assert last_boxed(text) == answer


@given(st.recursive(st.text("ab1 ", max_size=4), lambda s: s.map(lambda t: f"x{{{t}}}y"), max_leaves=5))
def test_balanced_content_comes_back(content):
    assert last_boxed(rf"a \boxed{{{content}}} b") == content.strip()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7.", "7"),
        ("costs $1,234.50", "1234.50"),
        ("it is -3", "-3"),
        ("3/4 of it", "3/4"),
        ("10-3", "3"),
        ("x2 and 5", "5"),
        ("none", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_marks_come_before_numbers():
    assert final_answer("\\boxed{4} of 5\n#### 6") == "4"
    assert final_answer("4 of 5\n#### 6 \n7") == "6"
    assert final_answer("4 of 5") == "5"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (C).", "C"),
        ("Answer: B", "B"),
        ("option A is wrong, so the answer is **D**", "D"),
        (r"\boxed{E}", "E"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{(C) 12}", "C"),
        ("thinking...\nC", "C"),
        ("thinking...\n(C) twelve", "C"),
        ("A train leaves the station", None),
        ("The answer is a lot", None),
        ("", None),
    ],
)
def test_chosen_letter(text, letter):
    assert chosen_letter(text) == letter


@given(st.text())
def test_normalising_is_idempotent(text):
    once = normalised(text)
    assert normalised(once) == once
