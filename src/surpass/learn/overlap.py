"""Do two policies put the same tokens first? What runs of on-policy distillation that succeed have in common.

Source: arXiv 2604.13016 (there k = 16, on the student's own tokens): agreement on a few likely tokens grows in runs
that work and stays flat in those that do not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TopKOverlap(NamedTuple):
    """Of the top-k sets of student and teacher, `[t]` each; `I` is their intersection.

    ratio: `|I| / k`. student_mass, teacher_mass: probability either gives to `I`. count: `|I|`.
    advantage: mean over `v` in `I` of `p(v) (log q(v) - log p(v))`, both renormalised on `I`: `-KL(p || q) / |I|`, near
    0 where they agree, very negative where the student is over-confident; 0 where `I` is empty.
    """

    ratio: Tensor
    student_mass: Tensor
    teacher_mass: Tensor
    count: Tensor
    advantage: Tensor


@torch.no_grad()
def top_k_overlap(
    student_ids: Tensor, student_logp: Tensor, teacher_ids: Tensor, teacher_logp: Tensor
) -> TopKOverlap:
    """Overlap from ids `[t, k]` and full-vocabulary log-probs `[t, k]` of both top-k sets, in any order."""
    same = student_ids.unsqueeze(-1) == teacher_ids.unsqueeze(-2)
    shared = same.any(-1)
    # The teacher's log-prob of the student's k-th token, where it is one of its own.
    teacher_there = teacher_logp.gather(-1, same.to(torch.uint8).argmax(-1))
    count = shared.sum(-1)
    p, q = (logp.masked_fill(~shared, -torch.inf) for logp in (student_logp, teacher_there))
    student_mass, teacher_mass = p.exp().sum(-1), q.exp().sum(-1)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)  # rows without a shared token are NaN, and not read
    terms = torch.where(shared, log_p.exp() * (log_q - log_p), torch.zeros_like(log_p))
    advantage = terms.sum(-1) / count.clamp(min=1)
    return TopKOverlap(shared.float().mean(-1), student_mass, teacher_mass, count, advantage)
