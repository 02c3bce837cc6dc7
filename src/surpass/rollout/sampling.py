"""The law a token is drawn from, and the randomness it is drawn with.

Randomness is counter-based: the uniform of a token is a hash of its sequence's seed and its position in the
response. A sequence's text therefore depends on its seed, its prompt and the weights alone, not on what else
is in the batch, on the order of refills, or on any generator's state.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from surpass.rollout.engine import Sampling

# Wider distributions are drawn in two steps (block, then token): cheap, and exact in the far tail.
BLOCK = 512


def sequence_seed(run_seed: int, step: int, prompt_id: str, sample: int) -> int:
    """The seed of one sequence, in `[0, 2**63)`: the same in every process and on every machine (BLAKE2b)."""
    key = f"{run_seed}\0{step}\0{sample}\0{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """float64 in `[0, 1)` for each pair of int64 `seeds` and `positions` (broadcast against each other).

    Output `position` of a SplitMix64 stream whose state starts at the mixed seed, so that neighbouring seeds
    do not give shifted copies of one stream. 53 bits.
    """
    bits = _mix(_mix(seeds) + (positions + 1) * _signed(0x9E3779B97F4A7C15))
    return _shift(bits, 11).to(accumulator(bits.device)) * 2.0**-53


def law(logits: Tensor, sampling: Sampling) -> Tensor:
    """`[B, V]` float32 log-probs of the law that samples, -inf for tokens it never draws.

    logits: `[B, V]` float32, already divided by the temperature. Not for greedy decoding.
    """
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0:
        logits = logits.masked_fill(logits < _threshold(logits, sampling), -math.inf)
    return logits.log_softmax(-1)


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row; gives token ids `[B]` and their log-probs `[B]` under the sampling law.

    logits: `[B, V]` as for `law`; uniform: `[B]` float64 in `[0, 1)`, unused by greedy decoding.
    """
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        return token, torch.zeros_like(token, dtype=torch.float32)
    logp = law(logits, sampling)
    token = inverse_cdf(logp.exp(), uniform)
    return token, logp.gather(1, token.unsqueeze(1)).squeeze(1)


def inverse_cdf(mass: Tensor, uniform: Tensor) -> Tensor:
    """`[B]`: in each row of `mass` `[B, W]` the first entry whose cumulated share exceeds `uniform` `[B]`.

    An entry of mass 0 is never chosen.
    """
    width = mass.shape[1]
    if width <= BLOCK:
        return _choose(mass, uniform)[0].squeeze(1)
    blocks = torch.nn.functional.pad(mass, (0, -width % BLOCK)).unflatten(1, (-1, BLOCK))
    shares = blocks.sum(-1, dtype=accumulator(mass.device))
    block, target, edges = _choose(shares, uniform)
    # Where within its block the uniform fell, again in [0, 1].
    size = shares.gather(1, block)
    uniform = ((target - (edges.gather(1, block) - size)) / size).squeeze(1).clamp(0, 1)
    inside = blocks.gather(1, block.unsqueeze(2).expand(-1, 1, BLOCK)).squeeze(1)
    return (block * BLOCK + _choose(inside, uniform)[0]).squeeze(1)


def _choose(mass: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The chosen entry `[B, 1]`, the target `[B, 1]` that lies in it, and the cumulative sums `[B, W]`."""
    edges = mass.cumsum(-1, dtype=accumulator(mass.device))
    total = edges[:, -1:]
    # Rounding must not push the target onto the end, behind which there is nothing.
    target = torch.minimum(uniform.unsqueeze(1) * total, torch.nextafter(total, total.new_zeros(())))
    # Only logits that are not numbers reach past the end; the clamp keeps them readable until they are reported.
    return torch.searchsorted(edges, target, right=True).clamp_(max=mass.shape[1] - 1), target, edges


def _threshold(logits: Tensor, sampling: Sampling) -> Tensor:
    """`[B, 1]`: the smallest logit that is kept."""
    threshold = logits.new_full((len(logits), 1), -math.inf)
    k = min(sampling.top_k or logits.shape[1], logits.shape[1])
    if sampling.top_p < 1:
        candidates = logits.topk(k, dim=-1).values  # in descending order
        share = candidates.softmax(-1)
        # A token stays if what is more likely than it has not reached top_p yet: at least one always does.
        last = (share.cumsum(-1) - share < sampling.top_p).sum(-1, keepdim=True) - 1
        threshold = candidates.gather(1, last.clamp(min=0))
    elif k < logits.shape[1]:
        threshold = logits.topk(k, dim=-1).values[:, -1:]
    if sampling.min_p > 0:
        threshold = threshold.maximum(logits.amax(-1, keepdim=True) + math.log(sampling.min_p))
    return threshold


def _mix(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64, on int64 with wrap-around."""
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


def accumulator(device: torch.device) -> torch.dtype:
    """float64, but for devices that have none."""
    return torch.float32 if device.type == "mps" else torch.float64
