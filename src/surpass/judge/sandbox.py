"""Programs that a model wrote, run where they can do no harm.

They run in namespaces of their own, made by `bwrap` (bubblewrap) or, where that is missing, by `unshare` (util-linux):
no network, no processes but their own, and no files but the system's programs and libraries, read-only, and an empty
scratch folder in memory. Time, memory, processes, files and output are limited. Where neither tool works nothing is run:
`SandboxUnavailable` says why. The kernel itself is shared; programs of people who attack it need a virtual machine.
"""

from __future__ import annotations

import contextlib
import functools
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

TOOLS = ("bwrap", "unshare")
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
SYSTEM = ("/usr", "/bin", "/lib", "/lib64")
NOBODY = 65534
# What an isolated program must find, and what it must not.
PROBE = """\
import os, socket
try:
    socket.create_connection(("192.0.2.1", 9), 0.1)
    network = True
except OSError as error:
    network = error.errno != 101
print(network, os.path.exists("HOST"), len([p for p in os.listdir("/proc") if p.isdigit()]) > 3)
"""


class SandboxUnavailable(RuntimeError):  # noqa: N818 (it is a state of the machine)
    """Nothing on this machine can isolate a program, so none is run."""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 5.0
    """Wall-clock time."""
    memory: int = 1 << 29
    """Bytes of address space, per process."""
    scratch: int = 1 << 24
    """Bytes of files it may write."""
    processes: int = 16
    """Processes and threads at once, its own included."""
    output: int = 1 << 16
    """Bytes of standard output, and of errors, that are read; a program that writes more is ended."""


@dataclass(frozen=True)
class Execution:
    """What became of a program. status: `ok` (exit status 0), `error`, `timeout`, or `output` (it wrote too much)."""

    status: Literal["ok", "error", "timeout", "output"]
    stdout: str
    stderr: str

    def report(self) -> str:
        """For a model: what was printed, and how it ended if not well (the last line of the errors)."""
        last = (self.stderr.strip().splitlines() or ["the program failed"])[-1]
        ends = {
            "ok": "",
            "error": f"error: {last}",
            "timeout": "error: the program took too long",
            "output": "error: the program printed too much",
        }
        return "\n".join(part for part in (self.stdout.rstrip("\n"), ends[self.status]) if part)


def run_python(code: str, stdin: str = "", limits: Limits = Limits(), tool: str | None = None) -> Execution:
    """Run a Python program. tool: one of TOOLS; None: the first that works here.

    The interpreter has its standard library and nothing else. Raises SandboxUnavailable.
    """
    tool = tool or check_sandbox()
    interpreter = _interpreter()
    if interpreter is None:
        raise SandboxUnavailable("there is no Python interpreter that an isolated program could read")
    with tempfile.TemporaryDirectory(prefix="surpass-") as folder:
        task, root = Path(folder, "task"), Path(folder, "root")
        for made in (Path(folder), task, root):
            made.mkdir(exist_ok=True)
            made.chmod(0o755)  # read by somebody else
        # Half a surrogate pair cannot be written as UTF-8; a model may well produce one.
        for name, text in (("main.py", code), ("input", stdin)):
            (task / name).write_text(text, encoding="utf-8", errors="replace")
            (task / name).chmod(0o644)
        make = _bwrap if tool == "bwrap" else _unshare
        return _collect(make(task, root, interpreter, limits), limits)


@functools.cache
def check_sandbox() -> str:
    """The first of TOOLS that isolates programs here; tried once. Raises SandboxUnavailable with what each said."""
    said = {tool: why for tool in TOOLS if (why := _complaint(tool)) is not None}
    for tool in TOOLS:
        if tool not in said:
            return tool
    reasons = "; ".join(f"{tool}: {why}" for tool, why in said.items())
    raise SandboxUnavailable(
        f"programs a model wrote are run in isolation only, and nothing here can isolate them ({reasons}); install "
        "bubblewrap and allow unprivileged user namespaces"
    )


def _complaint(tool: str) -> str | None:
    """Why `tool` is of no use here; None: it isolates."""
    if shutil.which(tool, path=PATH) is None:
        return "not installed"
    here = str(Path(__file__).resolve())
    try:
        done = run_python(PROBE.replace("HOST", here), limits=replace(Limits(), seconds=10.0), tool=tool)
    except (OSError, SandboxUnavailable) as error:
        return str(error)
    if done.status != "ok":
        return (done.stderr.strip().splitlines() or [done.status])[-1]
    return None if done.stdout.split() == ["False"] * 3 else "it leaves network, files or processes in reach"


@functools.cache
def _interpreter() -> str | None:
    """A Python that nobody in particular may run, from the system's own folders."""
    found = [os.path.realpath(sys.executable), *(shutil.which(f"python{v}", path=PATH) for v in ("3", ""))]
    return next((p for p in found if p and os.path.realpath(p).startswith("/usr/")), None)


# -- two ways to isolate --------------------------------------------------------------------------------------------


def _limited(interpreter: str, limits: Limits) -> list[str]:
    """The command within: resource limits, then the program."""
    return [
        "prlimit",
        f"--as={limits.memory}",
        f"--nproc={limits.processes}",
        f"--cpu={int(limits.seconds) + 1}",
        f"--fsize={limits.scratch}",
        "--nofile=64",
        "--core=0",
        "env",
        "-i",
        "HOME=/tmp",
        f"PATH={PATH}",
        "LANG=C.UTF-8",
        # A thread of a numerical library reserves memory of its own.
        "OMP_NUM_THREADS=1",
        interpreter,
        "-I",
        "-B",
        "/task/main.py",
    ]


def _bwrap(task: Path, root: Path, interpreter: str, limits: Limits) -> list[str]:
    del root
    command = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"]
    command += ["--new-session", "--cap-drop", "ALL", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    for path in SYSTEM:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            command += ["--ro-bind", path, path]
    command += ["--proc", "/proc", "--dev", "/dev", "--ro-bind", str(task), "/task"]
    command += ["--size", str(limits.scratch), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/dev"]
    command += ["--remount-ro", "/"]
    return [*command, "--", "sh", "-c", 'exec "$@" < /task/input', "sh", *_limited(interpreter, limits)]


# Runs as root of its own user namespace, which ends with `setpriv`: from there on nothing can be gained any more.
_SETUP = """\
set -eu
root=$1 task=$2 scratch=$3 system=$4
shift 4
echo 0 > /proc/sys/user/max_user_namespaces
mount -t tmpfs -o size=1m,mode=755 tmpfs "$root"
mkdir "$root/old" "$root/tmp" "$root/task" "$root/dev" "$root/proc"
for path in $system; do
  if [ -L "$path" ]; then cp -P "$path" "$root$path"
  elif [ -d "$path" ]; then
    mkdir -p "$root$path"; mount --bind "$path" "$root$path"; mount -o remount,bind,ro "$root$path"
  fi
done
for device in null zero urandom; do
  : > "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"
done
mount --bind "$task" "$root/task"; mount -o remount,bind,ro "$root/task"
mount -t tmpfs -o "size=$scratch,mode=777" tmpfs "$root/tmp"
mount -t proc proc "$root/proc"
mount -o remount,bind,ro "$root"
cd "$root"; pivot_root . old; umount -l /old
cd /tmp
exec setpriv --no-new-privs --inh-caps=-all --bounding-set=-all "$@" < /task/input
"""


def _unshare(task: Path, root: Path, interpreter: str, limits: Limits) -> list[str]:
    command = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--net", "--ipc", "--uts"]
    command += ["--fork", "--kill-child", "sh", "-c", _SETUP, "sh"]
    command += [str(root), str(task), str(limits.scratch), " ".join(SYSTEM)]
    return [*command, *_limited(interpreter, limits)]


# -- running it -----------------------------------------------------------------------------------------------------


def _collect(command: list[str], limits: Limits) -> Execution:
    """Run until the end, the time limit or too much output; nothing of it is left running."""
    # `timeout` ends the program also where this process has been killed meanwhile.
    guarded = ["timeout", "--foreground", "-s", "KILL", f"{limits.seconds + 1}", *command]
    # The kernel does not count the processes of root, so root becomes nobody first.
    root = os.geteuid() == 0
    process: subprocess.Popen[bytes] = subprocess.Popen(
        guarded,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": PATH},
        cwd="/",
        start_new_session=True,
        user=NOBODY if root else None,
        group=NOBODY if root else None,
        extra_groups=[] if root else None,
    )
    try:
        written, stopped = _read(process, limits)
        if stopped is None:
            process.wait(timeout=2.0)
    except subprocess.TimeoutExpired:
        written, stopped = [b"", b""], "timeout"
    finally:
        _kill(process)
    stdout, stderr = (part.decode("utf-8", "replace") for part in written)
    return Execution(stopped or ("ok" if process.returncode == 0 else "error"), stdout, stderr)


def _read(
    process: subprocess.Popen[bytes], limits: Limits
) -> tuple[list[bytes], Literal["timeout", "output"] | None]:
    """Standard output and errors until both are closed, and why reading stopped before that."""
    deadline = time.monotonic() + limits.seconds
    assert process.stdout is not None and process.stderr is not None
    streams = [process.stdout, process.stderr]
    written = [b"", b""]
    with selectors.DefaultSelector() as selector:
        for i, stream in enumerate(streams):
            selector.register(stream, selectors.EVENT_READ, i)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                return written, "timeout"
            for key, _ in ready:
                piece = os.read(key.fd, 1 << 14)
                if not piece:
                    selector.unregister(key.fileobj)
                written[key.data] += piece
                if len(written[key.data]) > limits.output:
                    written[key.data] = written[key.data][: limits.output]
                    return written, "output"
    return written, None


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
