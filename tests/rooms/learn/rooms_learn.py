"""A three-token state with hand-checked numbers, shared by the tests of this room."""

import torch
from torch import Tensor

STUDENT = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
TEACHER = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
# The numbers are written to six decimals.
PRINTED = 1.01e-6


def logits() -> Tensor:
    """`[1, 3]` leaf whose softmax is STUDENT."""
    return STUDENT.log().unsqueeze(0).requires_grad_()


def row(p: Tensor) -> Tensor:
    return p.log().unsqueeze(0)


def gradient(value: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0].squeeze(0)


def close(found: Tensor, expected: object, rtol: float = 0.0, atol: float = PRINTED) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=rtol, atol=atol)


def random_logp(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1)
