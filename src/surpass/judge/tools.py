"""Tool calls: reading them out of what a model wrote, and a few tools that are safe to run in this process.

Two forms are read:

    hermes   <tool_call>{"name": "calc", "arguments": {"expression": "1 + 2"}}</tool_call>
    plain    a line `calc(1 + 2)` and nothing else in it

A call that cannot be carried out is answered in words (`ToolError`), which the model reads and may act upon.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Form = Literal["hermes", "plain"]
Number = int | float

_HERMES = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)
_PLAIN = re.compile(r"^[ \t]*([A-Za-z_]\w*)\((.*)\)[ \t]*$", re.MULTILINE)


class ToolError(ValueError):
    """A call that cannot be carried out; the message is for the model."""


@dataclass(frozen=True)
class ToolCall:
    """One call. arguments: by name, or the text between the brackets of the plain form."""

    name: str
    arguments: dict[str, Any] | str


@dataclass(frozen=True)
class Tool:
    """Something a model may call. parameters: names of `run`'s arguments, all required, all text."""

    name: str
    about: str
    parameters: tuple[str, ...]
    run: Callable[..., str]

    def call(self, arguments: dict[str, Any] | str) -> str:
        """The tool's answer. Raises ToolError for arguments that do not fit, and what the tool itself raises."""
        if isinstance(arguments, str):
            if len(self.parameters) != 1:
                raise ToolError(f"{self.name} takes {_listed(self.parameters)}, found one text")
            arguments = {self.parameters[0]: arguments.strip()}
        if set(arguments) != set(self.parameters):
            raise ToolError(f"{self.name} takes {_listed(self.parameters)}, found {_listed(arguments)}")
        return self.run(**{name: str(value) for name, value in arguments.items()})


@dataclass(frozen=True)
class Toolbox:
    """The tools of an episode and the form they are called in."""

    tools: tuple[Tool, ...]
    form: Form = "hermes"

    def answer(self, text: str) -> str | None:
        """What the calls in `text` give, a line each, errors in words; None where it calls nothing."""
        try:
            calls = parse_calls(text, self.form)
        except ToolError as error:
            return f"error: {error}"
        return "\n".join(self._answer(call) for call in calls) if calls else None

    def _answer(self, call: ToolCall) -> str:
        known = {tool.name: tool for tool in self.tools}
        if call.name not in known:
            return f"error: there is no tool {call.name!r}; there are {_listed(known)}"
        try:
            return known[call.name].call(call.arguments)
        except ToolError as error:
            return f"error: {error}"

    def instructions(self) -> str:
        """What to tell a model that does not know the tools."""
        tools = "\n".join(f"{tool.name}({', '.join(tool.parameters)}): {tool.about}" for tool in self.tools)
        how = {
            "hermes": '<tool_call>{"name": NAME, "arguments": {PARAMETER: TEXT}}</tool_call>',
            "plain": "NAME(ARGUMENT) on a line of its own",
        }[self.form]
        return f"You may call these tools:\n{tools}\nTo call one, write {how}"


def parse_calls(text: str, form: Form) -> list[ToolCall]:
    """All calls in `text`, in order; none is an answer without a call.

    Raises ToolError for a call that is begun but cannot be read.
    """
    if form == "plain":
        return [ToolCall(name, argument) for name, argument in _PLAIN.findall(text)]
    return [_hermes(body, bool(end)) for body, end in _HERMES.findall(text)]


def _hermes(body: str, closed: bool) -> ToolCall:
    if not closed:
        raise ToolError("a <tool_call> is not closed by </tool_call>")
    try:
        found = json.loads(body)
        # Some models write the arguments as JSON within JSON.
        if isinstance(found, dict) and isinstance(found.get("arguments"), str):
            found["arguments"] = json.loads(found["arguments"])
    except (json.JSONDecodeError, RecursionError) as error:
        raise ToolError(f"a <tool_call> holds no JSON: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise ToolError('a <tool_call> holds an object with "name" and "arguments"')
    arguments = found.get("arguments", {})
    if not isinstance(arguments, dict):
        raise ToolError(f'"arguments" is an object, found {type(arguments).__name__}')
    return ToolCall(found["name"], arguments)


def _listed(names: Mapping[str, Any] | tuple[str, ...]) -> str:
    return ", ".join(names) or "nothing"


# -- a look-up ------------------------------------------------------------------------------------------------------


def lookup(table: Mapping[str, str], name: str) -> str:
    """The entry called `name`. Raises ToolError with the known names (the first ten)."""
    if name not in table:
        raise ToolError(f"there is no entry {name!r}; there are {', '.join(list(table)[:10])}")
    return table[name]


# -- a calculator ---------------------------------------------------------------------------------------------------

LONGEST = 200  # characters of an expression
LARGEST = 1024  # bits of any integer on the way

_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Number], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> str:
    """The value of an arithmetic expression: numbers, `+ - * / // % **` and brackets; no names, no calls.

    Nothing is evaluated as code: the syntax tree is walked. Raises ToolError for anything else, and for expressions
    or values too large.
    """
    if len(expression) > LONGEST:
        raise ToolError(f"an expression has at most {LONGEST} characters, found {len(expression)}")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        value = _value(tree.body)
    except ToolError:
        raise
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ToolError(f"cannot read {expression!r}; write numbers, + - * / // % ** and brackets") from None
    except (ArithmeticError, TypeError) as error:
        raise ToolError(f"{expression!r}: {error}") from None
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return str(value)


def _value(node: ast.expr) -> Number:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            _check_power(left, right)
        return _bounded(_BINARY[type(node.op)](left, right))
    raise ToolError(f"cannot calculate {ast.unparse(node)!r}; write numbers, + - * / // % ** and brackets")


def _check_power(base: Number, exponent: Number) -> None:
    """Before it is taken: a power of integers may be too large to be written down at all."""
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > LARGEST:
        raise ToolError("the result is too large")
    if base < 0 and not float(exponent).is_integer():
        raise ToolError("a negative number has no such power")


def _bounded(value: Number) -> Number:
    if isinstance(value, int) and value.bit_length() > LARGEST:
        raise ToolError("the result is too large")
    return value


CALCULATOR = Tool("calc", "the value of an arithmetic expression", ("expression",), calculate)
