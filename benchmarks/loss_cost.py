"""What does one full-vocabulary reverse KL cost, from hidden states to gradients? Processor time and memory.

Forward and backward of the mean reverse KL over N tokens, V = 151,936, student width 128, teacher width 256, float32,
one thread, gradients at the student's hidden states and head. Each measurement is a fresh process that does it once.
Memory is the operating system's peak resident size over what the process held before (inputs, libraries). Processor
time rather than elapsed time, because other work may share the machine. Rounds are interleaved: every implementation
once, then again. The processes also report loss and gradient norms; unless these agree, nothing is compared.

    python benchmarks/loss_cost.py [--tokens 2048] [--rounds 5] [--only NAME ...] [--small]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import record
import torch
from torch import Tensor

VOCABULARY = 151_936
STUDENT, TEACHER = 128, 256
# Relative. Gradient norms sum millions of float32 numbers in another order; the loss is a mean of N.
TOLERANCE = 1e-4

# From hidden `[N, D]`, weight `[V, D]`, teacher's `[N, D']` and `[V, D']` to the mean reverse KL.
LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def full_logits() -> LossFunction:
    from trl.experimental.gkd import GKDTrainer

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        student_logits, teacher_logits = hidden @ weight.T, teacher @ teacher_weight.T
        labels = torch.zeros(1, len(hidden), dtype=torch.int64)
        return GKDTrainer.generalized_jsd_loss(student_logits[None], teacher_logits[None], labels, beta=1)

    return loss


def trl_chunked(tokens: int | None = None, vocabulary: int | None = None) -> LossFunction:
    """tokens, vocabulary: sides of the tile, in place of the constants TRL ships (4,096 and 32,768)."""
    from trl.kernels import chunked_divergence
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    chunked_divergence.TOKEN_CHUNK_SIZE = tokens or chunked_divergence.TOKEN_CHUNK_SIZE
    chunked_divergence.VOCAB_CHUNK_SIZE = vocabulary or chunked_divergence.VOCAB_CHUNK_SIZE

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        mask = torch.ones(1, len(hidden))
        return _chunked_divergence_loss(hidden[None], teacher[None], weight, teacher_weight, mask, 1.0)[0]

    return loss


def liger(chunk: int | None = None) -> LossFunction:
    """chunk: tokens, in place of Liger's default (1,024). Uncompiled: `torch.compile` needs a C++ compiler."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    sized = {} if chunk is None else {"chunk_size": chunk}
    fused = LigerFusedLinearJSDLoss(0.0, 1.0, beta=1.0, compiled=False, **sized)

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        labels = torch.zeros(len(hidden), dtype=torch.int64)
        return fused(hidden, weight, teacher, teacher_weight, labels)

    return loss


def surpass() -> LossFunction:
    from surpass.learn.divergence import Divergence
    from surpass.learn.head import Head
    from surpass.learn.vocabulary import TargetTerm, log_linear_divergence

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        target = [TargetTerm(teacher, Head(teacher_weight), 1.0)]
        return log_linear_divergence(hidden, Head(weight), target, Divergence("reverse_kl")).value.mean()

    return loss


IMPLEMENTATIONS: dict[str, Callable[[], LossFunction]] = {
    "full logits (TRL GKD)": full_logits,
    "TRL chunked, as shipped": trl_chunked,
    "TRL chunked, tile 64 x 32,768": lambda: trl_chunked(64, 32_768),
    "TRL chunked, tile 512 x 8,192": lambda: trl_chunked(512, 8192),
    "Liger, as shipped": liger,
    "Liger, chunk 64": lambda: liger(64),
    "surpass": surpass,
}


def measure(name: str, tokens: int, vocabulary: int) -> dict[str, float]:
    """One forward and backward in this process."""
    loss_function = IMPLEMENTATIONS[name]()

    def problem(tokens: int, vocabulary: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        sizes = [(tokens, STUDENT), (vocabulary, STUDENT), (tokens, TEACHER), (vocabulary, TEACHER)]
        # in place, so that making the inputs leaves no peak of its own; logits get deviation 1
        tensors = [torch.empty(size).normal_(generator=generator) for size in sizes]
        for weight in tensors[1::2]:
            weight.mul_(weight.shape[1] ** -0.5)
        for of_student in tensors[:2]:
            of_student.requires_grad_()
        return tensors

    loss_function(*problem(4, 64)).backward()  # loads lazily made parts of the libraries, too small to show
    inputs = problem(tokens, vocabulary)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    loss = loss_function(*inputs)
    loss.backward()
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    in_kilobytes = sys.platform != "darwin"
    hidden_gradient, weight_gradient = (tensor.grad for tensor in inputs[:2])
    assert hidden_gradient is not None and weight_gradient is not None
    return {
        "seconds": seconds,
        "megabytes": (peak - held) * (1024 if in_kilobytes else 1) / 1e6,
        "loss": float(loss.detach()),
        "hidden gradient": float(hidden_gradient.norm()),
        "head gradient": float(weight_gradient.norm()),
    }


def measure_in_fresh_process(name: str, tokens: int, vocabulary: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", name]
    command += ["--tokens", str(tokens), "--vocabulary", str(vocabulary)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{name}: the process ended with {done.returncode} (-9 means out of memory: lower --tokens, or choose "
            f"others with --only)\n{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def prove_equal_work(runs: dict[str, list[dict[str, float]]]) -> float:
    """Largest relative difference of loss and gradient norms between any run and the first. Exits above tolerance."""
    everything = [run for of_name in runs.values() for run in of_name]
    checked = ("loss", "hidden gradient", "head gradient")
    worst = max(abs(run[key] / everything[0][key] - 1) for run in everything for key in checked)
    if not worst <= TOLERANCE:
        raise SystemExit(f"not the same work: losses or gradient norms differ by {worst:.1e}\n{runs}")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--small", action="store_true", help="N 64, V 4,096, one round; writes nothing")
    parser.add_argument("--measure", choices=IMPLEMENTATIONS, help="one measurement in this process, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        print(json.dumps(measure(options.measure, options.tokens, options.vocabulary)))
        return
    if options.small:
        options.tokens, options.vocabulary, options.rounds = 64, 4096, 1

    runs: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    for _ in range(options.rounds):
        for name, measured in runs.items():
            measured.append(measure_in_fresh_process(name, options.tokens, options.vocabulary))
            print(f"{name}: {measured[-1]['seconds']:.2f} s, {measured[-1]['megabytes']:.0f} MB", flush=True)
    worst = prove_equal_work(runs)

    print(f"\nN = {options.tokens:,}, V = {options.vocabulary:,}; {options.rounds} fresh processes each")
    print(f"equal work: losses and gradient norms differ by {worst:.1e} at most\n")
    header = ["implementation", "CPU s, median", "CPU s, range", "peak MB, median", "peak MB, range"]
    print(record.table(header, [row(name, measured) for name, measured in runs.items()]))
    if not options.small:
        result: dict[str, Any] = {**record.environment(), "tokens": options.tokens}
        result |= {"vocabulary": options.vocabulary, "widths": [STUDENT, TEACHER], "runs": runs}
        record.save(f"loss_cost_{options.tokens}", result)


def row(name: str, measured: list[dict[str, float]]) -> list[str]:
    seconds = [run["seconds"] for run in measured]
    megabytes = [run["megabytes"] for run in measured]
    return [
        name,
        f"{median(seconds):.2f}",
        f"{min(seconds):.2f} to {max(seconds):.2f}",
        f"{median(megabytes):,.0f}",
        f"{min(megabytes):,.0f} to {max(megabytes):,.0f}",
    ]


if __name__ == "__main__":
    main()
