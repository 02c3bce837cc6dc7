"""Embedded tasks: their solutions are right by an independent reckoning, and critiques name the first wrong step."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surpass.records import Prompt
from surpass.tasks import TASKS, critique, task_named, task_prompts, verify
from surpass.tasks.tools import page_of

NAMES = sorted(TASKS)
DIFFICULTIES = st.integers(1, 4)
SEEDS = st.integers(0, 10_000)
SPLITS = st.sampled_from(["train", "eval"])


def question(prompt: Prompt) -> str:
    return str(prompt.messages[0]["content"])  # type: ignore[index]


def reckoned(name: str, text: str) -> str:
    """The answer, reckoned from the question alone in another way than the task does."""
    digits = text.split()[-1]
    if name == "sort":
        return "".join(d * digits.count(d) for d in "0123456789")
    if name == "missing":
        return "".join(sorted(set("0123456789") - set(digits)))
    if name == "sums":
        return "".join(str(sum(map(int, digits[:i])) % 5) for i in range(2, len(digits) + 1))
    if name == "chain":
        value = int(re.findall(r"start with (\d+)", text)[0])
        for operation in re.findall(r"[+*-] \d+", text):
            value = eval(f"{value} {operation}")
        return str(value % 97)  # the remainder is taken once, at the end
    values = text.partition("what is ")[2].rstrip("?").split(" + ")
    return str(sum(int(table(name, text)[v]) for v in values))


def table(name: str, text: str) -> dict[str, str]:
    """Name to value: in the question, or on the page that it names."""
    return page_of(text) if name == "tools" else dict(re.findall(r"(\w)=(\d+)", text))


@pytest.mark.parametrize("name", NAMES)
@given(seed=SEEDS, difficulty=DIFFICULTIES, split=SPLITS)
@settings(max_examples=25, deadline=None)
def test_solution_is_right_and_a_changed_answer_is_not(
    name: str, seed: int, difficulty: int, split: str
) -> None:
    for prompt in task_prompts(name, 3, seed, split, difficulty):
        assert prompt.answer == reckoned(name, question(prompt))
        solution = prompt.privileged["solution"]
        assert verify(name, solution, prompt) == 1.0
        assert critique(task_named(name), prompt, solution) == "The answer is right."
        assert verify(name, str(prompt.answer), prompt) == 1.0
        rng = random.Random(seed)
        at = rng.randrange(len(str(prompt.answer)))
        changed = str((int(prompt.answer[at]) + rng.randrange(1, 10)) % 10)
        wrong = prompt.answer[:at] + changed + prompt.answer[at + 1 :]
        for text in (wrong, solution + "1", solution + "\n" + wrong, "", "\n"):
            assert verify(name, text, prompt) == 0.0
            assert critique(task_named(name), prompt, text) != "The answer is right."


def hinted(name: str, text: str, hint: str) -> int:
    """The number a true hint would tell, reckoned from the question."""
    if name == "missing":
        return len(reckoned(name, text))
    if name in ("lookup", "tools"):
        return int(table(name, text)[hint[0]])
    if name == "chain":
        return int(reckoned(name, "; ".join(text.split("; ")[:2])))
    return int(reckoned(name, text)[0])


@pytest.mark.parametrize("name", NAMES)
def test_hints_are_true(name: str) -> None:
    for prompt in task_prompts(name, 40, 7, difficulty=2):
        hint = prompt.privileged["hint"]
        assert int(re.findall(r"\d+", hint)[0]) == hinted(name, question(prompt), hint)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_call_gives_the_same_prompts_and_others_give_others(name: str) -> None:
    first = task_prompts(name, 20, 1)
    assert first == task_prompts(name, 20, 1)
    assert first[:5] == task_prompts(name, 5, 1)
    for other in (task_prompts(name, 20, 2), task_prompts(name, 20, 1, "eval")):
        assert [question(p) for p in first] != [question(p) for p in other]
    assert len({p.id for d in (1, 2) for p in task_prompts(name, 20, 1, difficulty=d)}) == 40


@pytest.mark.parametrize("name", NAMES)
def test_train_and_eval_share_no_question(name: str) -> None:
    train = {question(p) for seed in (5, 6) for p in task_prompts(name, 400, seed, "train")}
    held_out = {question(p) for p in task_prompts(name, 400, 5, "eval")}
    assert not train & held_out
    assert len(train) > 400
    assert len(held_out) > 200


def test_difficulty_makes_longer_problems() -> None:
    for name in NAMES:
        lengths = [len(task_prompts(name, 1, 0, difficulty=d)[0].privileged["solution"]) for d in (1, 4)]
        if name != "missing":  # which always names ten digits
            assert lengths[0] < lengths[1]


def test_joined_tasks_take_turns() -> None:
    made = task_prompts("sort+sums", 4, 0)
    assert [p.domain for p in made] == ["sort", "sums", "sort", "sums"]


@pytest.mark.parametrize("name", ["sort", "sums", "missing"])
@given(seed=SEEDS, at=st.integers(0, 20))
@settings(max_examples=25, deadline=None)
def test_critique_of_digits_names_the_first_wrong_one(name: str, seed: int, at: int) -> None:
    prompt = task_prompts(name, 1, seed)[0]
    right = str(prompt.answer)
    at %= len(right)
    other = str((int(right[at]) + 1) % 10)
    said = critique(task_named(name), prompt, right[:at] + other + "9" * (len(right) - at - 1))
    assert said.startswith(f"Digit {at + 1} is wrong")
    assert repr(right[at]) in said
    if at:
        assert f"stops after {at} digits" in critique(task_named(name), prompt, right[:at])
    assert "goes on" in critique(task_named(name), prompt, right + "0")


@given(seed=SEEDS, difficulty=DIFFICULTIES, at=st.integers(0, 20), off=st.integers(1, 96))
@settings(max_examples=50, deadline=None)
def test_critique_of_a_chain_names_the_first_wrong_step(
    seed: int, difficulty: int, at: int, off: int
) -> None:
    prompt = task_prompts("chain", 1, seed, difficulty=difficulty)[0]
    lines = prompt.privileged["solution"].splitlines()
    at %= len(lines) - 1
    left, result = lines[at].split(" = ")
    wrong = str((int(result) + off) % 97)
    spoilt = [*lines[:at], f"{left} = {wrong}", *["1 + 1 = 5"] * (len(lines) - at - 2), "no"]
    said = critique(CHAIN, prompt, "\n".join(spoilt))
    assert said.startswith(f"Step {at + 1} is wrong")
    assert repr(lines[at]) in said


CHAIN, LOOKUP = task_named("chain"), task_named("lookup")


def made(question: str, answer: str) -> Prompt:
    return Prompt("1", ({"role": "user", "content": question},), answer)


def test_critique_of_a_chain_is_not_confused_by_a_repeated_operation() -> None:
    prompt = made("start with 5; + 3; + 3; modulo 97", "11")
    assert critique(CHAIN, prompt, "5 + 3 = 8\n8 + 3 = 12\n12").startswith("Step 2 is wrong")
    assert critique(CHAIN, prompt, "5 + 3 = 8\n12").startswith("Step 2 is missing: '8 + 3 = 11'")
    assert critique(CHAIN, prompt, "5 + 3 = 8\n8 + 3 = 11\n12").startswith("The last line should be")


TABLE = made("table: a=10, b=20, c=31. what is c + a?", "41")


@pytest.mark.parametrize(
    ("completion", "said"),
    [
        ("lookup(c) -> 20\nlookup(a) -> 10\ncalc(20 + 10) -> 30\n30", "Step 1 is wrong: lookup(c) gives 31"),
        ("lookup(c) -> 31\nlookup(d) -> 10\n41x", "Step 2 is wrong: lookup(d) gives no such name"),
        ("lookup(a) -> 10\ncalc(31 + 10) -> 41\n41x", "Step 2 comes too early: c"),
        ("lookup(a) -> 10\n41x", "Step 2 is missing: c"),
        ("lookup(a) -> 10\nlookup(c) -> 31\ncalc(10 + 20) -> 30\n30", "Step 3 is wrong: it should be calc(31 + 10)"),
        ("lookup(a) -> 10\nlookup(c) -> 31\ncalc(10 + 31) -> 42\n42", "Step 3 is wrong: calc(10 + 31) gives 41"),
        ("lookup(a) -> 10\nlookup(c) -> 31\ncalc(10 + 31) -> 41\n40", "The last line should be the final value, 41"),
        ("40", "The last line should be the final value, 41"),
    ],
)  # fmt: skip
def test_critique_of_a_lookup_follows_the_calls(completion: str, said: str) -> None:
    assert critique(LOOKUP, TABLE, completion).startswith(said)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'sort'"):
        task_named("sorts")
    with pytest.raises(ValueError, match=r"splits train and eval, found 'test'"):
        task_prompts("sort", 1, 0, "test")
    with pytest.raises(ValueError, match="difficulty must be at least 1"):
        task_prompts("sort", 1, 0, difficulty=0)
