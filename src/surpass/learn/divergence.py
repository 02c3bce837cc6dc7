"""How far the student is from its target, over the whole vocabulary (or a support that was made a
distribution).

Every function takes log-probs `student, target` `[t, V]` and gives `[t]` in nats, never clamped. Gradient
flows through whatever requires it: hand in a detached target. 0 * log 0 is 0; student mass where the target
has none makes reverse KL +inf, and target mass where the student has none makes forward KL +inf.

These are losses to differentiate. None of them is an advantage: they do not depend on the sampled token, so
as a factor of `grad log p(sampled)` their expected gradient is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from surpass.learn.targets import mixture

Kind = Literal[
    "forward_kl", "reverse_kl", "jsd", "rescaled_jsd", "skew_forward_kl", "skew_reverse_kl", "mixed_kl"
]


def forward_kl(student: Tensor, target: Tensor) -> Tensor:
    """`KL(target || student)`: cover every mode of the target. Logit gradient `S - T`."""
    return _kl(target, student)


def reverse_kl(student: Tensor, target: Tensor) -> Tensor:
    """`KL(student || target)`: stay inside the modes of the target. Logit gradient `S (log(S / T) - KL)`."""
    return _kl(student, target)


def jsd(student: Tensor, target: Tensor, beta: float) -> Tensor:
    """`beta KL(T || m) + (1 - beta) KL(S || m)` with `m = beta T + (1 - beta) S` (GKD, arXiv 2306.13649).

    Lies in `[0, H(beta)]`, at most ln 2. At beta = 0 and 1 the formula is identically 0, which is nobody's
    intention, so they raise ValueError: name forward_kl or reverse_kl instead.
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"jsd is 0 or undefined at beta = {beta}; use forward_kl (the limit of jsd / beta at 0), "
            "reverse_kl (the limit of "
            "jsd / (1 - beta) at 1) or rescaled_jsd, which is continuous there"
        )
    middle = mixture([target, student], [beta, 1 - beta])
    return beta * _kl(target, middle) + (1 - beta) * _kl(student, middle)


def rescaled_jsd(student: Tensor, target: Tensor, beta: float) -> Tensor:
    """`jsd / (beta (1 - beta))`: moves without a jump from forward KL (beta = 0) to reverse KL (beta = 1); 4
    jsd at 0.5.
    """
    if beta == 0:
        return forward_kl(student, target)
    if beta == 1:
        return reverse_kl(student, target)
    return jsd(student, target, beta) / (beta * (1 - beta))


def skew_forward_kl(student: Tensor, target: Tensor, alpha: float) -> Tensor:
    """`KL(T || alpha T + (1 - alpha) S)` (DistiLLM, arXiv 2402.03898); alpha in [0, 1), 0 is forward_kl."""
    return _kl(target, mixture([target, student], [alpha, 1 - alpha]))


def skew_reverse_kl(student: Tensor, target: Tensor, alpha: float) -> Tensor:
    """`KL(S || alpha S + (1 - alpha) T)` (DistiLLM, arXiv 2402.03898); alpha in [0, 1), 0 is reverse_kl."""
    return _kl(student, mixture([student, target], [alpha, 1 - alpha]))


def mixed_kl(student: Tensor, target: Tensor, weight: float) -> Tensor:
    """`weight * reverse_kl + (1 - weight) * forward_kl`; at 0 and 1 the unused direction is not computed."""
    if weight == 0:
        return forward_kl(student, target)
    if weight == 1:
        return reverse_kl(student, target)
    return weight * reverse_kl(student, target) + (1 - weight) * forward_kl(student, target)


def entropy(logp: Tensor) -> Tensor:
    """`-sum_v p log p` in nats, `[t, V]` -> `[t]`."""
    p = logp.exp()
    return -(p * torch.where(p == 0, torch.zeros_like(logp), logp)).sum(-1)


@dataclass(frozen=True)
class Divergence:
    """A divergence by name, with its parameter where it has one.

    parameter: `jsd` (0, 1) and `rescaled_jsd` [0, 1]: weight beta of the target; `skew_*` [0, 1): alpha;
    `mixed_kl` [0, 1]: weight of reverse KL; None for the others. Raises ValueError when built with anything
    else.
    """

    kind: Kind
    parameter: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"unknown divergence {self.kind!r}; choose one of {', '.join(get_args(Kind))}")
        if self.kind in ("forward_kl", "reverse_kl"):
            if self.parameter is not None:
                raise ValueError(f"{self.kind} has no parameter, found {self.parameter}; remove it")
            return
        if self.parameter is None:
            raise ValueError(f"{self.kind} needs a parameter between 0 and 1, found none")
        low_open, high_open = self.kind == "jsd", self.kind not in ("rescaled_jsd", "mixed_kl")
        p = self.parameter
        if not 0 <= p <= 1 or (low_open and p == 0) or (high_open and p == 1):
            interval = f"{'(' if low_open else '['}0, 1{')' if high_open else ']'}"
            raise ValueError(
                f"{self.kind} takes a parameter in {interval}, found {p}; at an end use forward_kl or "
                "reverse_kl"
            )

    def __call__(self, student: Tensor, target: Tensor) -> Tensor:
        """`[t, V]`, `[t, V]` -> `[t]`."""
        if self.kind == "forward_kl":
            return forward_kl(student, target)
        if self.kind == "reverse_kl":
            return reverse_kl(student, target)
        assert self.parameter is not None
        with_parameter = {
            "jsd": jsd,
            "rescaled_jsd": rescaled_jsd,
            "skew_forward_kl": skew_forward_kl,
            "skew_reverse_kl": skew_reverse_kl,
            "mixed_kl": mixed_kl,
        }
        return with_parameter[self.kind](student, target, self.parameter)


def _kl(p_log: Tensor, q_log: Tensor) -> Tensor:
    p = p_log.exp()
    # Masked by p == 0, not by p_log == -inf: an underflowed p would meet an infinite ratio and give NaN.
    return (p * torch.where(p == 0, torch.zeros_like(p), p_log - q_log)).sum(-1)
