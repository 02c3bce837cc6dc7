"""The `code` verifier: a completion's program passes all tests, in the sandbox.

The gold answer says the tests, as Python text (assertions run after the program) or as JSON:

    {"inputs": ["1 2\\n"], "outputs": ["3\\n"]}                     standard input and output
    {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}        a function's arguments and result
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from typing import Any

from surpass.judge.sandbox import Limits, run_python

SECONDS = 3.0  # for all tests of one completion; less than a judge waits for a verdict

_FENCED = re.compile(r"```(?:[Pp]ython3?|py)?[ \t]*\n(.*?)```", re.DOTALL)
_CALL = """

import json as _json
_case = _json.loads(input())
_found = {name}(*_case["arguments"])
# What JSON does not know (tuples) is compared as JSON has it.
assert _json.loads(_json.dumps(_found)) == _case["result"]
"""


def program_of(completion: str) -> str:
    """The last fenced block of Python, or all of it where nothing is fenced."""
    fenced = _FENCED.findall(completion)
    return fenced[-1] if fenced else completion


def verify(completion: str, answer: Any) -> float:
    """1.0 where the program passes every test within SECONDS, else 0.0.

    Raises ValueError for an answer without tests, and SandboxUnavailable.
    """
    tests = _tests(answer)
    program, deadline = program_of(completion), time.monotonic() + SECONDS
    for code, stdin, expected in _runs(program, tests):
        left = deadline - time.monotonic()
        if left <= 0:
            return 0.0
        done = run_python(code, stdin, replace(Limits(), seconds=left))
        if done.status != "ok" or (expected is not None and _lines(done.stdout) != _lines(expected)):
            return 0.0
    return 1.0


def _tests(answer: Any) -> dict[str, Any] | str:
    tests = answer
    if isinstance(answer, str):
        try:
            tests = json.loads(answer)
        except json.JSONDecodeError:
            tests = answer
    if isinstance(tests, str) and tests.strip():
        return tests
    if isinstance(tests, dict):
        inputs, outputs = tests.get("inputs"), tests.get("outputs")
        if isinstance(inputs, list) and isinstance(outputs, list) and inputs and len(inputs) == len(outputs):
            name = tests.get("fn_name")
            if name is None or (isinstance(name, str) and name.isidentifier()):
                return tests
    raise ValueError(
        "expected the tests of a program as gold answer, Python assertions or JSON with equally many inputs and outputs "
        f"(and fn_name, a function's name); found {str(answer)[:80]!r}"
    )


def _runs(program: str, tests: dict[str, Any] | str) -> list[tuple[str, str, str | None]]:
    """Program, standard input and wanted output (None: it only has to end well) of each test."""
    if isinstance(tests, str):
        return [(f"{program}\n\n{tests}\n", "", None)]
    cases = list(zip(tests["inputs"], tests["outputs"], strict=True))
    if tests.get("fn_name") is None:
        return [(program, str(given), str(wanted)) for given, wanted in cases]
    code = program + _CALL.format(name=tests["fn_name"])
    return [(code, json.dumps({"arguments": given, "result": wanted}), None) for given, wanted in cases]


def _lines(text: str) -> list[str]:
    """Output up to blanks at the ends of lines and empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
