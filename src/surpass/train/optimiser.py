"""AdamW and its learning-rate schedule, as plain functions of the step."""

from __future__ import annotations

import math

import torch

from surpass.config import OptimiserConfig


def make_optimiser(model: torch.nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; vectors (norms, biases) are not decayed. Raises ValueError if there are none."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the student has no trainable parameters; check model.lora.targets")
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.learning_rate, betas=(config.beta1, config.beta2)
    )


def learning_rate(config: OptimiserConfig, step: int, steps: int, spent: float = 0.0) -> float:
    """Rate of step `step` (counted from 0) of `steps`. spent: share of a token budget used so far, where there is one."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    share = min(1.0, max(spent, (step - config.warmup_steps) / max(1, steps - config.warmup_steps)))
    decay = 1.0 - share if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
    return config.learning_rate * decay


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate
