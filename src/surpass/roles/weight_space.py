"""Arithmetic on weights: averages and extrapolation of checkpoints that share an architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

Weights = Mapping[str, Tensor]


def average(models: Sequence[Weights], shares: Sequence[float] | None = None) -> dict[str, Tensor]:
    """`sum_i share_i * theta_i`; equal shares by default.

    Raises ValueError where parameter names or shapes differ, or shares do not sum to 1.
    """
    shares = [1.0 / len(models)] * len(models) if shares is None else list(shares)
    if len(shares) != len(models) or abs(sum(shares) - 1.0) > 1e-6:
        raise ValueError(f"expected {len(models)} shares that sum to 1, found {shares}")
    for other in models[1:]:
        _check_same(models[0], other)
    out = {}
    for name, first in models[0].items():
        if not first.is_floating_point():
            out[name] = first.clone()
            continue
        total = sum(share * model[name].double() for share, model in zip(shares, models, strict=True))
        out[name] = total.to(first.dtype)  # type: ignore[union-attr]
    return out


def expo(experts: Sequence[Weights], base: Weights, alpha: float) -> dict[str, Tensor]:
    """ExPO weight extrapolation `mean + alpha * (mean - base)` (arXiv 2404.16792; baseline of arXiv 2602.12125).

    alpha = 0 gives the plain average of the experts.
    """
    mean = average(experts)
    _check_same(mean, base)
    return {
        name: (value.double() + alpha * (value.double() - base[name].double())).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in mean.items()
    }


def _check_same(first: Weights, other: Weights) -> None:
    missing = sorted(set(first) ^ set(other))
    if missing:
        raise ValueError(
            f"the checkpoints are of different architectures: parameters {missing[:3]} are in one only"
        )
    for name, value in first.items():
        if value.shape != other[name].shape:
            raise ValueError(
                f"the checkpoints are of different sizes: {name} is {tuple(value.shape)} in one "
                f"and {tuple(other[name].shape)} in the other"
            )
