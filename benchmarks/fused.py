"""How near do the whole-vocabulary quantities come to the matrix products they can not do without?

Forward and backward of the mean over N tokens, V = 151,936, student width 128, teacher and reference width 256,
float32, one thread; gradients at the student's hidden states and head. The floor of each is its matrix products
alone, at the fastest tile found: `2NV` times the widths forward, `4NV` times the student's width backward. Every
measurement is a fresh process that does it once; floors are measured in each round, between the others, because the
speed of a shared machine drifts. Processor time, and peak resident memory over what the inputs took.

    python benchmarks/fused.py [--tokens 2048] [--rounds 3] [--only NAME ...] [--save FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import record
import torch
from torch import Tensor

from surpass.learn.divergence import Divergence
from surpass.learn.head import Head
from surpass.learn.vocabulary import TargetTerm, log_linear_divergence, token_logp

VOCABULARY, STUDENT, OTHERS = 151_936, 128, 256
FLOOR_TILES = ((256, 512), (256, 1024), (512, 512), (512, 1024), (1024, 1024))


class Variant(NamedTuple):
    """kind: a divergence, or token_logp. roles: of the target. backward: whether gradients are asked for."""

    kind: str
    parameter: float | None = None
    roles: int = 1
    backward: bool = True
    frozen_head: bool = False
    uneven: bool = False  # each token weighs differently in the loss, and nobody said so before
    dtype: torch.dtype = torch.float32
    naive: bool = False

    @property
    def floor(self) -> str:
        products = f"floor: {self.roles if self.kind != 'token_logp' else 0} roles"
        backward = ", hidden gradient" if self.frozen_head else ", gradients"
        return products + (backward if self.backward else "")


VARIANTS = {
    "reverse KL": Variant("reverse_kl"),
    "forward KL": Variant("forward_kl"),
    "mixed KL 0.5": Variant("mixed_kl", 0.5),
    "JSD 0.5": Variant("jsd", 0.5),
    "skew forward KL 0.1": Variant("skew_forward_kl", 0.1),
    "skew reverse KL 0.1": Variant("skew_reverse_kl", 0.1),
    "reverse KL, teacher and reference (1.25, -0.25)": Variant("reverse_kl", roles=2),
    "reverse KL, uneven loss": Variant("reverse_kl", uneven=True),
    "reverse KL, frozen head": Variant("reverse_kl", frozen_head=True),
    "reverse KL, no gradient": Variant("reverse_kl", backward=False),
    "reverse KL, bfloat16": Variant("reverse_kl", dtype=torch.bfloat16),
    "reverse KL, full logits": Variant("reverse_kl", naive=True),
    "log-prob and entropy, no gradient": Variant("token_logp", backward=False),
    "log-prob and entropy": Variant("token_logp"),
    "log-prob and entropy, bfloat16": Variant("token_logp", dtype=torch.bfloat16),
    "log-prob and entropy, full logits": Variant("token_logp", naive=True),
}
FLOORS = {variant.floor: variant for variant in VARIANTS.values()}


def floor(variant: Variant, tokens: int, vocabulary: int) -> float:
    """Processor seconds of the matrix products alone, at the fastest tile."""
    widths = [STUDENT] + [OTHERS] * (variant.roles if variant.kind != "token_logp" else 0)
    heads = [torch.randn(vocabulary, width) for width in widths]
    gradient = torch.zeros(vocabulary, STUDENT)

    def run(rows: int, columns: int, tokens: int) -> float:
        states = [torch.randn(rows, width) for width in widths]
        tile, states_gradient = torch.randn(rows, columns), torch.zeros(rows, STUDENT)
        seconds = time.process_time()
        for start in range(0, vocabulary - columns + 1, columns):
            parts = [head[start : start + columns] for head in heads]
            for _ in range(tokens // rows):
                for hidden, part in zip(states, parts):
                    torch.mm(hidden, part.T, out=tile)
                if variant.backward:
                    states_gradient.addmm_(tile, parts[0])
                if variant.backward and not variant.frozen_head:
                    gradient[start : start + columns].addmm_(tile.T, states[0])
        return (time.process_time() - seconds) * tokens / (tokens // rows * rows)

    fitting = [tile for tile in FLOOR_TILES if tile[0] <= tokens]
    best = min(fitting, key=lambda tile: run(*tile, tokens=min(tokens, 1024)))
    return run(*best, tokens=tokens)


def surpass(variant: Variant, states: Sequence[Tensor], heads: Sequence[Tensor], ids: Tensor) -> Tensor:
    if variant.kind == "token_logp":
        return token_logp(states[0], Head(heads[0]), ids).logp
    weights = [1.0] if variant.roles == 1 else [1.25, -0.25]
    terms = [TargetTerm(h, Head(w), weight) for h, w, weight in zip(states[1:], heads[1:], weights)]
    divergence = Divergence(variant.kind, variant.parameter)  # type: ignore[arg-type]
    return log_linear_divergence(states[0], Head(heads[0]), terms, divergence).value


def full_logits(variant: Variant, states: Sequence[Tensor], heads: Sequence[Tensor], ids: Tensor) -> Tensor:
    logp = (states[0] @ heads[0].T).log_softmax(-1)
    if variant.kind == "token_logp":
        entropy = -(logp.exp() * logp).sum(-1).detach()
        return logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1) + 0 * entropy
    with torch.no_grad():
        target = (states[1] @ heads[1].T).log_softmax(-1)
    return (logp.exp() * (logp - target)).sum(-1)


def problem(variant: Variant, tokens: int, vocabulary: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    roles = 0 if variant.kind == "token_logp" else variant.roles
    states, heads = [], []
    for width in [STUDENT] + [OTHERS] * roles:
        # in place, so that making the inputs leaves no peak of its own; logits get deviation 1
        states.append(torch.empty(tokens, width, dtype=variant.dtype).normal_(generator=generator))
        head = torch.empty(vocabulary, width, dtype=variant.dtype).normal_(generator=generator)
        heads.append(head.mul_(width**-0.5))
    ids = torch.randint(vocabulary, (tokens,), generator=generator)
    states[0].requires_grad_(variant.backward)
    heads[0].requires_grad_(variant.backward and not variant.frozen_head)
    return states, heads, ids


def measure(name: str, tokens: int, vocabulary: int) -> dict[str, float]:
    """One forward and backward, or one floor, in this process."""
    if name in FLOORS:
        return {"seconds": floor(FLOORS[name], tokens, vocabulary)}
    variant: Variant = VARIANTS[name]
    function: Callable[..., Tensor] = full_logits if variant.naive else surpass

    def run(tokens: int, vocabulary: int) -> dict[str, float]:
        states, heads, ids = problem(variant, tokens, vocabulary)
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.process_time()
        values = function(variant, states, heads, ids)
        loss = (values * torch.linspace(0.5, 1.5, tokens)).mean() if variant.uneven else values.mean()
        if variant.backward:
            loss.backward()
        seconds = time.process_time() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        in_kilobytes = sys.platform != "darwin"
        gradients = {
            label: float(tensor.grad.float().norm())
            for label, tensor in (("hidden gradient", states[0]), ("head gradient", heads[0]))
            if tensor.grad is not None
        }
        megabytes = (peak - held) * (1024 if in_kilobytes else 1) / 1e6
        return {"seconds": seconds, "megabytes": megabytes, "loss": float(loss), **gradients}

    run(4, 64)  # loads lazily made parts of the library
    return run(tokens, vocabulary)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--rounds", type=int, default=3)
    usual = [
        name for name, variant in VARIANTS.items() if not variant.naive and variant.dtype == torch.float32
    ]
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, default=usual, help="full logits: 5 MB per token"
    )
    parser.add_argument("--save", default="fused", help="name of the file in results/")
    parser.add_argument("--measure", help="one measurement in this process, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        print(json.dumps(measure(options.measure, options.tokens, options.vocabulary)))
        return
    names = [*dict.fromkeys(VARIANTS[name].floor for name in options.only), *options.only]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, measured in runs.items():
            command = [sys.executable, __file__, "--measure", name, "--tokens", str(options.tokens)]
            command += ["--vocabulary", str(options.vocabulary)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name}: the process ended with {done.returncode}\n{done.stderr[-2000:]}")
            measured.append(json.loads(done.stdout.splitlines()[-1]))
            print(name, measured[-1], flush=True)
    header = ["variant", "CPU s, median (range)", "floor s", "ratio", "peak MB"]
    print(record.table(header, [row(name, runs) for name in options.only]))
    sizes = {"tokens": options.tokens, "vocabulary": options.vocabulary, "widths": [STUDENT, OTHERS]}
    record.save(options.save, {**record.environment(), **sizes, "runs": runs})


def row(name: str, runs: dict[str, list[dict[str, float]]]) -> list[str]:
    seconds = [run["seconds"] for run in runs[name]]
    least = median(run["seconds"] for run in runs[VARIANTS[name].floor])
    spread = f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
    megabytes = median(run["megabytes"] for run in runs[name])
    return [name, spread, f"{least:.2f}", f"{median(seconds) / least:.2f}", f"{megabytes:,.0f}"]


if __name__ == "__main__":
    main()
