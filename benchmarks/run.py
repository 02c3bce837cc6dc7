"""All benchmarks, from nothing: make the environment of the peers, then run each benchmark in it.

    python benchmarks/run.py                  the figures of docs/benchmarks.md (about 20 minutes, 10 GB of memory)
    python benchmarks/run.py --tokens 512     a quarter of both
    python benchmarks/run.py --small          everything once on small tensors; nothing is written

The peers live in an environment of their own, so that their pins never meet ours. surpass runs there too, from
its source: the parts measured import nothing but torch, and both sides then share one interpreter and one torch.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEERS = HERE / ".venv-peers"
PYTHON = PEERS / "bin" / "python"
WITHOUT_DEPENDENCIES = "liger-kernel"


def install_peers() -> None:
    """Make the peers' environment unless it holds these very pins already."""
    pins = HERE / "peers.txt"
    stamp = PEERS / "installed"
    wanted = hashlib.sha256(pins.read_bytes() + (ROOT / "constraints.txt").read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print("installing the peers (once)", flush=True)
    venv.create(PEERS, with_pip=True)
    lines = [line for line in pins.read_text().splitlines() if line and not line.startswith("#")]
    # torch first and alone, so that what follows finds it installed and never replaces it by another build
    for batch in (
        [line for line in lines if line.startswith("torch==")],
        [line for line in lines if not line.startswith(WITHOUT_DEPENDENCIES)],
        ["--no-deps", *(line for line in lines if line.startswith(WITHOUT_DEPENDENCIES))],
    ):
        pip = [PYTHON, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
        subprocess.run([*pip, *batch], check=True)
    stamp.write_text(wanted)


def run(script: str, arguments: list[str]) -> int:
    """One benchmark on one thread, offline; gives its exit status."""
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    surroundings = {**os.environ, **one_thread, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    print(f"\n== {script}", flush=True)
    return subprocess.run([PYTHON, HERE / script, *arguments], env=surroundings, cwd=ROOT).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare surpass with other libraries.")
    parser.add_argument("--small", action="store_true", help="small tensors, nothing is written")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the loss measurement")
    options = parser.parse_args()
    install_peers()
    small = ["--small"] if options.small else []
    cost = small or ["--tokens", str(options.tokens)]
    return max(run("agreement.py", small), run("loss_cost.py", cost))


if __name__ == "__main__":
    sys.exit(main())
