"""Programs in the sandbox see nothing, reach nobody and end in time; without a sandbox none is run."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from surpass.judge import sandbox
from surpass.judge.code import program_of, verify
from surpass.judge.environments import environment_named
from surpass.judge.judge import Component, Judge
from surpass.judge.sandbox import Limits, SandboxUnavailable, check_sandbox, run_python
from surpass.judge.verifiers import verifier_named
from surpass.records import Prompt

WORKING = [tool for tool in sandbox.TOOLS if sandbox._complaint(tool) is None]
# Generous on time: a busy machine must not turn a verdict into a time-out.
PATIENT = Limits(seconds=30.0)

pytestmark = pytest.mark.skipif(not WORKING, reason="nothing here isolates programs")


@pytest.fixture(params=WORKING)
def tool(request: pytest.FixtureRequest) -> str:
    return request.param


def printed(code: str, tool: str, limits: Limits = PATIENT, stdin: str = "") -> str:
    done = run_python(code, stdin, limits, tool)
    assert done.status == "ok", done
    return done.stdout.strip()


def test_a_program_reads_and_prints(tool: str):
    done = run_python("import sys\nprint(input() + '!')\nprint('e', file=sys.stderr)", "grüß", PATIENT, tool)
    assert (done.status, done.stdout, done.stderr) == ("ok", "grüß!\n", "e\n")
    assert done.report() == "grüß!"


def test_an_error_is_reported_by_its_last_line(tool: str):
    done = run_python("print(1)\n1 / 0", limits=PATIENT, tool=tool)
    assert (done.status, done.report()) == ("error", "1\nerror: ZeroDivisionError: division by zero")


def test_nothing_of_the_machine_is_in_reach(tool: str):
    with tempfile.NamedTemporaryFile(dir="/tmp", suffix=".secret") as file:
        os.chmod(file.name, 0o644)
        hidden = [file.name, str(Path(__file__).resolve()), "/etc/passwd", "/root", "/home", "/var", "/sys"]
        code = (
            f"import os\nprint([p for p in {hidden!r} if os.path.exists(p)], os.listdir('/tmp'), "
            "dict(os.environ).keys() & {'SECRET'})"
        )
        os.environ["SECRET"] = "x"
        try:
            assert printed(code, tool) == "[] [] set()"
        finally:
            del os.environ["SECRET"]


def test_no_file_can_be_written_but_in_the_scratch_folder(tool: str):
    code = """
import os
for path in ("/usr/x", "/x", "/task/x", "/task/main.py", "/dev/x", "/bin/x", "/tmp/x"):
    try:
        open(path, "a").write("x")
        print(path)
    except OSError:
        pass
"""
    assert printed(code, tool) == "/tmp/x"
    assert printed("import os; print(os.listdir('/tmp'))", tool) == "[]"


def test_there_is_no_network(tool: str):
    code = """
import socket
server = socket.socket()
try:
    socket.create_connection(("HOST", PORT), 2)
    print("reached")
except OSError:
    print("cut off")
"""
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        host, port = server.getsockname()
        socket.create_connection((host, port), 2).close()  # it can be reached from here
        assert printed(code.replace("HOST", host).replace("PORT", str(port)), tool) == "cut off"


def test_no_privilege_can_be_gained(tool: str):
    code = """
import subprocess
def works(*command):
    return subprocess.run(command, capture_output=True).returncode == 0
print(works("true"), works("unshare", "--user", "--map-root-user", "true"), works("mount", "-t", "tmpfs", "x", "/tmp"),
      works("chroot", "/tmp", "true"))
"""
    assert printed(code, tool) == "True False False False"
    fields = printed("print(open('/proc/self/status').read())", tool)
    capabilities = {
        line.split()[0]: line.split()[1] for line in fields.splitlines() if line.startswith("Cap")
    }
    assert {int(v, 16) for v in capabilities.values()} == {0}
    assert "NoNewPrivs:\t1" in fields


def test_other_processes_are_not_seen(tool: str):
    own = int(printed("import os; print(len([p for p in os.listdir('/proc') if p.isdigit()]))", tool))
    assert own <= 3


def test_time_is_limited_and_nothing_is_left_running(tool: str):
    code = "import os, time\nif os.fork() == 0:\n    os.setsid()\ntime.sleep(987654)"
    begun = time.monotonic()
    assert run_python(code, limits=replace(Limits(), seconds=0.5), tool=tool).status == "timeout"
    assert time.monotonic() - begun < 10
    time.sleep(0.2)
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "-I -B /task/main.py" not in left


def test_memory_files_processes_and_output_are_limited(tool: str):
    small = replace(PATIENT, memory=1 << 28, scratch=1 << 20, processes=8, output=1000)
    assert printed("try:\n    bytearray(1 << 29)\nexcept MemoryError:\n    print('no')", tool, small) == "no"
    for attempt in (
        "open('/tmp/x', 'wb').write(bytes(1 << 22))",
        "for i in range(9): open(f'/tmp/{i}', 'wb').write(bytes(1 << 19))",
        "for _ in range(50): os.fork() or time.sleep(60)",
    ):
        code = f"import os, time\ntry:\n    {attempt}\nexcept OSError:\n    print('no')"
        assert printed(code, tool, small) == "no"
    much = run_python("while True: print('x' * 100)", limits=small, tool=tool)
    assert (much.status, len(much.stdout)) == ("output", 1000)
    assert much.report().endswith("error: the program printed too much")


def test_without_a_sandbox_nothing_is_run(monkeypatch: pytest.MonkeyPatch):
    def never(*arguments: object, **settings: object) -> None:
        raise AssertionError(f"a program was started: {arguments}")

    monkeypatch.setattr(sandbox, "PATH", "/nowhere")
    monkeypatch.setattr(subprocess, "Popen", never)
    check_sandbox.cache_clear()
    try:
        with pytest.raises(
            SandboxUnavailable, match=r"bwrap: not installed; unshare: not installed.*install bubblewrap"
        ):
            run_python("print(1)")
        with pytest.raises(ValueError, match=r"no sandbox verifier here: .*not installed"):
            verifier_named("code")
    finally:
        check_sandbox.cache_clear()


def test_a_tool_that_leaves_something_in_reach_is_not_used(monkeypatch: pytest.MonkeyPatch):
    def bare(task: Path, root: Path, interpreter: str, limits: Limits) -> list[str]:
        del root, limits
        return [interpreter, "-I", str(task / "main.py")]

    monkeypatch.setattr(sandbox, "_unshare", bare)
    assert sandbox._complaint("unshare") == "it leaves network, files or processes in reach"


# -- the code verifier ----------------------------------------------------------------------------------------------

ADD = "here:\n```python\ndef add(a, b):\n    return a + b\n```\nand that is all"
ECHO = "```python\nprint(sum(map(int, input().split())))\n```"


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (ADD, "assert add(1, 2) == 3", 1.0),
        (ADD, "assert add(1, 2) == 4", 0.0),
        (ADD, {"fn_name": "add", "inputs": [[1, 2], [[1], [2]]], "outputs": [3, [1, 2]]}, 1.0),
        (ADD, {"fn_name": "add", "inputs": [[1, 2], [2, 2]], "outputs": [3, 5]}, 0.0),
        (ECHO, json.dumps({"inputs": ["1 2\n", "3 4"], "outputs": ["3", "7 \n\n"]}), 1.0),
        (ECHO, {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3", "8"]}, 0.0),
        ("import sys; sys.exit(1)", {"inputs": [""], "outputs": [""]}, 0.0),
        ("no program at all", {"inputs": [""], "outputs": [""]}, 0.0),
    ],
)
def test_verdicts(completion: str, answer: object, reward: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("surpass.judge.code.SECONDS", 30.0)
    assert verify(completion, answer) == reward


def test_the_last_program_counts():
    assert program_of("```python\na\n```\n```\nb\n```") == "b\n"
    assert program_of("x = 1") == "x = 1"


@pytest.mark.parametrize(
    "answer", ["", {}, {"inputs": ["a"], "outputs": []}, {"inputs": [], "outputs": []}, None, 3]
)
def test_answers_without_tests_are_errors(answer: object):
    with pytest.raises(ValueError, match="expected the tests of a program"):
        verify(ADD, answer)


def test_a_program_without_end_is_wrong_and_no_failure_of_the_judge(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("surpass.judge.code.SECONDS", 0.5)
    assert verify("while True: pass", "assert True") == 0.0


def test_through_the_judge():
    prompts = [Prompt("p", "q", answer="assert add(1, 2) == 3")] * 2
    with Judge([Component("code", verifier_named("code"))], time_limit=30.0) as judge:
        verdict = judge(prompts, [ADD, "def add(a, b): return 0"])
    assert verdict.reward.tolist() == [1.0, 0.0]
    assert verdict.metrics == {"judge/code/timeouts": 0.0, "judge/code/errors": 0.0}


def test_programs_as_an_environment():
    environment = environment_named("python")()
    said = environment.reset(Prompt("p", "q"))
    assert said is not None and "python(code)" in said
    call = json.dumps({"name": "python", "arguments": {"code": "print(6 * 7)"}})
    assert environment.step(f"<tool_call>{call}</tool_call>").observation == "42"
    assert environment.step("it is 42").done
