"""Verifiers by name, and who judges which domain."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surpass.judge.math_answer import verify as math_verify
from surpass.judge.verifiers import verifier_for, verifier_named
from surpass.judge.votes import vote_of
from surpass.prompts.sources import load_prompts
from surpass.records import Prompt


def score(name: str, completion: str, answer) -> float:
    return verifier_named(name).verify(completion, Prompt(id="p", messages="q", answer=answer))


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (r"so \boxed{72}", "72", 1.0),
        (r"so \boxed{72.0}", 72, 1.0),
        (r"\boxed{72} no, \boxed{73}", "72", 0.0),
        (r"\boxed{\frac{2}{4}}", "1/2", 1.0),
        (r"\boxed{0.5}", r"$\frac12$", 1.0),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", 1.0),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", 1.0),
        (r"\boxed{(3, 4)}", "(3,4)", 1.0),
        (r"\boxed{(4, 3)}", "(3,4)", 0.0),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}", 1.0),
        (r"\boxed{1,234}", "1234", 1.0),
        (r"\boxed{yes}", r"\text{yes}", 1.0),
        ("work...\n#### 72", "72", 1.0),
        ("That makes 72 clips altogether.", "72", 1.0),
        (r"The answer is $\frac{1}{2}$.", "0.5", 1.0),
        ("That makes 72 clips for 3 friends.", "72", 0.0),
        ("no idea", "72", 0.0),
        ("", "72", 0.0),
        (r"\boxed{}", "72", 0.0),
    ],
)
def test_math(completion, answer, expected):
    assert math_verify(completion, answer) == expected


def test_math_wants_a_gold_answer():
    with pytest.raises(ValueError, match="blank"):
        math_verify(r"\boxed{1}", " $ $ ")


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_math_on_integers_is_equality(given_, gold):
    assert math_verify(rf"\boxed{{{given_}}}", gold) == float(given_ == gold)


@pytest.mark.parametrize(
    ("name", "completion", "answer", "expected"),
    [
        ("exact", "  Paris. ", "paris", 1.0),
        ("exact", r"It is \boxed{Paris}", "paris", 1.0),
        ("exact", "It is Paris", "Paris", 0.0),
        ("exact", "Rome", ["Paris", "Rome"], 1.0),
        ("contains", "It is Paris, I think", "paris", 1.0),
        ("contains", "Parisian", "paris", 0.0),
        ("choice", "The answer is (B).", "B", 1.0),
        ("choice", "The answer is (B).", "(b)", 1.0),
        ("choice", "The answer is (B).", "C", 0.0),
        ("choice", "no idea", "C", 0.0),
    ],
)
def test_texts(name, completion, answer, expected):
    assert score(name, completion, answer) == expected


def test_unusable_gold_answers_are_errors():
    with pytest.raises(ValueError, match="letter A-E as gold answer of prompt 'p', found 2"):
        score("choice", "B", 2)
    with pytest.raises(ValueError, match="gold answer of prompt 'p' is blank"):
        score("exact", "B", "")


def test_unknown_verifiers_are_refused_and_code_without_a_sandbox(no_sandbox: None):
    with pytest.raises(ValueError, match="unknown verifier 'maths'; there are"):
        verifier_named("maths")
    with pytest.raises(ValueError, match="no sandbox verifier"):
        verifier_named("code")
    with pytest.raises(ValueError, match="unknown embedded task 'sorte', did you mean 'sort'"):
        verifier_named("embedded:sorte")


@pytest.mark.parametrize("name", ["embedded", "embedded:sort"])
def test_embedded_tasks_verify_their_own(name):
    (prompt,) = load_prompts("embedded:sort", limit=1)
    verifier = verifier_named(name)
    assert verifier.verify(f"let me see\n{prompt.answer}", prompt) == 1.0
    assert verifier.verify(f"{prompt.answer}\nno", prompt) == 0.0
    assert verifier.vote is not None
    assert verifier.vote(f"a\n {prompt.answer} ") == prompt.answer
    with pytest.raises(ValueError, match="prompt 'p' comes from no embedded task"):
        score("embedded", "1", "1")


def test_who_judges_which_domain():
    math, choice, odd = (Prompt(id=d, messages="q", domain=d) for d in ("math", "choice", "odd"))
    own = Prompt(id="e", messages="q", domain="odd", columns={"verifier": "embedded:sums"})
    assert verifier_for([math, choice]) == {"math": "math", "choice": "choice"}
    assert verifier_for([odd], "aime") == {"odd": "math"}
    assert verifier_for([own, math], "gsm8k") == {"odd": "embedded:sums", "math": "math"}
    with pytest.raises(ValueError, match=r"no verifier is known for prompts of domain \['odd'\]"):
        verifier_for([math, odd])
    with pytest.raises(ValueError, match="one domain, several verifiers"):
        verifier_for([own, odd])


def test_votes_are_equal_for_equal_answers():
    vote = vote_of({"math": "math", "mcq": "choice"})
    sums, mcq = Prompt(id="s", messages="q", domain="math"), Prompt(id="m", messages="q", domain="mcq")
    assert vote(sums, r"\boxed{1,000}") == vote(sums, "that is $1000") == "1000"
    assert vote(mcq, "Answer: B") == "B"
    assert vote(sums, "nothing") is None
    assert vote(Prompt(id="o", messages="q", domain="other"), "1") is None
    assert vote_of({"default": "exact"})(sums, " Yes.") == "yes"
