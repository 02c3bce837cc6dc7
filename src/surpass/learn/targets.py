"""What the student should become: targets made of the log-probs of several roles.

Two forms cover every published target. Log-linear, `log q = sum_i w_i log p_i + const`: a single teacher is
`[1]`, reward extrapolation is `[lambda, 1 - lambda]` over teacher and reference (G-OPD / ExOPD, arXiv
2602.12125), a tempered teacher is `[1 / temperature]`. And arithmetic, `q = sum_i w_i p_i`.

A weight is a float, or a `[t]` tensor of one number per token. Where a weight is exactly 0 its role is not
read: NaN or -inf in it cannot leak.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Weight = float | Tensor


def log_linear(logps: Sequence[Tensor], weights: Sequence[Weight]) -> Tensor:
    """Normalised log-probs of `q` proportional to `prod_i p_i^{w_i}` over the last axis.

    logps: each `[t, V]` (normalised); weights: each a float or `[t]`. Gives `[t, V]`. A role alone with
    weight exactly 1 comes back bit for bit. Where a role of positive weight gives a token no probability, `q`
    gives it none either. Raises ValueError where only a role of negative weight does: `q` would be infinite
    there.
    """
    combined = _combine(logps, weights)
    normaliser = _normaliser(combined, weights)
    if normaliser is None:
        return combined
    # Roles that share no token leave a target without mass: -inf everywhere, not NaN.
    return combined - normaliser.masked_fill(normaliser == -torch.inf, 0.0).unsqueeze(-1)


def log_normaliser(logps: Sequence[Tensor], weights: Sequence[Weight]) -> Tensor:
    """`log Z = log sum_v prod_i p_i(v)^{w_i}`, `[t]`: the sampled form minus the normalised
    target.

    With weights `[lambda, 1 - lambda]` it is `(lambda - 1)` times a Renyi divergence: above 0 for lambda > 1,
    below for 0 < lambda < 1. Exactly 0 for a role alone with weight 1.
    """
    combined = _combine(logps, weights)
    normaliser = _normaliser(combined, weights)
    return combined.new_zeros(combined.shape[:-1]) if normaliser is None else normaliser


def log_linear_sampled(logps: Sequence[Tensor], weights: Sequence[Weight]) -> Tensor:
    """`sum_i w_i log p_i` of the sampled tokens, `[T]`, not normalised (`log Z` needs the whole
    vocabulary).
    """
    return _combine(logps, weights)


def mixture(logps: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Log-probs of the arithmetic mixture `sum_i w_i p_i`, `[t, V]`. Raises ValueError unless weights are >=
    0 and sum to 1.
    """
    _same_count(logps, weights)
    if min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"mixture weights must be >= 0 and sum to 1, found {list(weights)}")
    parts = [(logp, weight) for logp, weight in zip(logps, weights) if weight != 0]
    if len(parts) == 1:
        return parts[0][0]
    logs = torch.stack(
        [logp + torch.tensor(weight, dtype=torch.float64).log().item() for logp, weight in parts]
    )
    # logsumexp of nothing but -inf has a NaN gradient, so tokens that no part allows are taken out of it.
    nowhere = (logs == -torch.inf).all(0)
    return torch.logsumexp(logs.masked_fill(nowhere, 0.0), dim=0).masked_fill(nowhere, -torch.inf)


def _combine(logps: Sequence[Tensor], weights: Sequence[Weight]) -> Tensor:
    """`sum_i w_i log p_i`, where a zero of a positively weighted role wins over any other term."""
    _same_count(logps, weights)
    total, impossible = None, None
    for logp, weight in zip(logps, weights):
        if isinstance(weight, Tensor):
            weight = weight.to(logp.dtype).view(*weight.shape, *[1] * (logp.ndim - weight.ndim))
            used = weight != 0
            term = weight * torch.where(used, logp, torch.zeros_like(logp))
            zero = (weight > 0) & (logp == -torch.inf)
        elif weight == 0:
            continue
        else:
            term = logp if weight == 1 else weight * logp
            zero = logp == -torch.inf if weight > 0 else None
        total = term if total is None else total + term
        if zero is not None:
            impossible = zero if impossible is None else impossible | zero
    if total is None:
        raise ValueError(f"all target weights are 0 ({list(weights)}): no role is left to learn from")
    if impossible is None or len(logps) == 1:
        return total
    return total.masked_fill(impossible, -torch.inf)


def _normaliser(combined: Tensor, weights: Sequence[Weight]) -> Tensor | None:
    """`log Z` `[t]`; None (or 0 at those tokens) where one role stands alone with weight 1 and is normalised
    already.
    """
    used = [w for w in weights if isinstance(w, Tensor) or w != 0]
    if len(used) == 1 and not isinstance(used[0], Tensor) and used[0] == 1:
        return None
    normaliser = torch.logsumexp(combined, dim=-1)
    if bool((normaliser == torch.inf).any()):
        raise ValueError(
            "the log-linear target is infinite: a role with a negative weight gives probability 0 to a token "
            "that the "
            "others allow; cut all roles to their shared vocabulary, or keep weights >= 0 (lambda <= 1)"
        )
    if any(isinstance(w, Tensor) for w in used):
        columns = torch.stack(
            torch.broadcast_tensors(*[torch.as_tensor(w, device=combined.device) for w in used])
        )
        alone = ((columns == 1).sum(0) == 1) & ((columns != 0).sum(0) == 1)
        normaliser = torch.where(alone, torch.zeros_like(normaliser), normaliser)
    return normaliser


def _same_count(logps: Sequence[Tensor], weights: Sequence[Weight]) -> None:
    if len(logps) != len(weights) or not logps:
        raise ValueError(f"expected one weight per role, found {len(logps)} roles and {len(weights)} weights")
