"""Distillation signals that read only the sampled tokens, and the line between advantages and losses.

An advantage multiplies `grad log p(sampled token)`; it is a constant, and its own gradient must not exist. A
loss is differentiated. The estimators are named by the gradient they give when the tokens were drawn from the
student itself: k1 differentiated gives none, k2 gives that of reverse KL, k3 that of forward KL. All are
`[T]`.
"""

from __future__ import annotations

from torch import Tensor


def token_signal(values: Tensor) -> Tensor:
    """The one door to an advantage: gives `values` back, or raises ValueError if they carry a gradient.

    A tensor with a gradient here is a loss in the wrong place. For a divergence over many tokens it matters
    most: it does not depend on which token was sampled, so as an advantage its expected gradient is zero.
    """
    if values.requires_grad:
        raise ValueError(
            "found an advantage that requires grad; advantages are constants. If it is a full-vocabulary or "
            "top-k divergence, "
            "it is a loss to differentiate (return it as a Term): as an advantage its expected gradient is "
            "zero. If it is a "
            "sampled log-ratio, make it with log_ratio_advantage"
        )
    return values


def log_ratio_advantage(target_logp: Tensor, student_logp: Tensor) -> Tensor:
    """`log q - log p_student` of the sampled tokens, detached: policy-gradient form of reverse KL to `q`."""
    return (target_logp - student_logp).detach()


def reverse_kl_k2(student_logp: Tensor, target_logp: Tensor) -> Tensor:
    """`(log p - log q)^2 / 2`: on the student's own samples its gradient is that of KL(student || target)."""
    return (student_logp - target_logp.detach()).square() / 2


def forward_kl_k3(student_logp: Tensor, target_logp: Tensor) -> Tensor:
    """`exp(d) - d - 1`, `d = log q - log p`: on the student's own samples its gradient is that of KL(target
    || student).

    Its value estimates the *reverse* KL; differentiate it only if forward KL is what you want.
    """
    d = target_logp.detach() - student_logp
    return d.exp() - d - 1


def k1_value(student_logp: Tensor, target_logp: Tensor) -> Tensor:
    """`log p - log q`, detached: unbiased for the value of reverse KL. As a loss its expected gradient is
    zero.
    """
    return (student_logp - target_logp).detach()


def k3_value(student_logp: Tensor, target_logp: Tensor) -> Tensor:
    """`exp(d) - d - 1`, detached: unbiased for the value of reverse KL, never negative, less noisy than
    k1.
    """
    return forward_kl_k3(student_logp, target_logp).detach()
