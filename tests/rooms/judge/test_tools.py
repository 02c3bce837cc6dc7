"""Tool calls are read in two forms; the calculator calculates and does nothing else."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surpass.judge.tools import CALCULATOR, Tool, Toolbox, ToolCall, ToolError, calculate, lookup, parse_calls

ADD = Tool("add", "the sum", ("a", "b"), lambda a, b: str(int(a) + int(b)))
BOX = Toolbox((CALCULATOR, ADD))
PLAIN = Toolbox((CALCULATOR, ADD), "plain")


def hermes(name: str, **arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_hermes_calls_are_read_in_order():
    text = f"first {hermes('calc', expression='1 + 2')} then\n{hermes('add', a=1, b='2')}"
    assert parse_calls(text, "hermes") == [
        ToolCall("calc", {"expression": "1 + 2"}),
        ToolCall("add", {"a": 1, "b": "2"}),
    ]
    assert BOX.answer(text) == "3\n3"
    assert BOX.answer("no call here, calc(1 + 2)") is None


def test_arguments_may_be_json_within_json():
    text = '<tool_call>{"name": "calc", "arguments": "{\\"expression\\": \\"2*3\\"}"}</tool_call>'
    assert BOX.answer(text) == "6"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<tool_call>{'name': 1}</tool_call>", "holds no JSON"),
        ('<tool_call>{"name": "calc", "arguments": {}}', "is not closed"),
        ("<tool_call>[1]</tool_call>", 'an object with "name"'),
        ('<tool_call>{"name": "calc", "arguments": [1]}</tool_call>', '"arguments" is an object, found list'),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "holds no JSON"),
        (hermes("clac"), "there is no tool 'clac'; there are calc, add"),
        (hermes("calc", text="1"), "calc takes expression, found text"),
        (hermes("calc", expression="1 / 0"), "division by zero"),
    ],
)
def test_calls_that_cannot_be_carried_out_are_answered_in_words(text: str, said: str):
    answer = BOX.answer(text)
    assert answer is not None and answer.startswith("error: ") and said in answer


def test_plain_calls_stand_alone_on_their_line():
    assert PLAIN.answer("let me see\n calc(2 * (3 + 4)) \n") == "14"
    for text in ("calc(1 + 2) -> 3", "so calc(1 + 2) it is", "14", ""):
        assert PLAIN.answer(text) is None
    assert PLAIN.answer("add(1)") == "error: add takes a, b, found one text"


def test_instructions_name_every_tool_and_the_form():
    for box, form in ((BOX, "<tool_call>"), (PLAIN, "on a line of its own")):
        said = box.instructions()
        assert "calc(expression)" in said and "add(a, b)" in said and form in said


def expression(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.3:
        return str(rng.randrange(20))
    left, right = expression(rng, depth - 1), expression(rng, depth - 1)
    return rng.choice([f"({left} {rng.choice('+-*')} {right})", f"-{left}", f"{left} + {right}"])


@given(st.integers(0, 10_000))
def test_the_calculator_agrees_with_python(seed: int):
    text = expression(random.Random(seed), 3)
    assert calculate(text) == str(eval(text))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7 / 2", "3.5"),
        ("6 / 2", "3"),
        ("7 // 2", "3"),
        ("-7 % 3", "2"),
        ("2 ** 10", "1024"),
        ("2 ** -1", "0.5"),
        (" 1", "1"),
    ],
)
def test_values(text: str, value: str):
    assert calculate(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "x",
        "(lambda: 1)()",
        "[1][0]",
        "'a' * 9",
        "True + 1",
        "1 if 1 else 2",
        "1 < 2",
        "1j",
        "~1",
        "9 ** 9 ** 9",
        "(10 ** 300) * (10 ** 300)",
        "10.0 ** 400",
        "(-1) ** 0.5",
        "1 + " * 100 + "1",
        "1 / 0",
        "0 ** -1",
        "1 +",
        "",
        "\x00",
    ],
)
def test_anything_else_is_refused_at_once(text: str):
    with pytest.raises(ToolError):
        calculate(text)


def test_lookup():
    assert lookup({"a": "1"}, "a") == "1"
    with pytest.raises(ToolError, match="there is no entry 'b'; there are a"):
        lookup({"a": "1"}, "b")
