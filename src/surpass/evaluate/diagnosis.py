"""Is on-policy distillation likely to work with this teacher? Measured before any training.

Two conditions decide (arXiv 2604.13016): student and teacher must agree on what is likely at the states the student
visits, and the teacher must know something the student does not. Both are measured on the student's own answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from surpass.evaluate.coverage import Coverage, coverage
from surpass.evaluate.evaluation import Judged, evaluate
from surpass.evaluate.summary import Evaluation
from surpass.learn.divergence import entropy, forward_kl, reverse_kl
from surpass.learn.overlap import top_k_overlap
from surpass.learn.targets import log_linear
from surpass.models.forward import micro_batches, response_hidden
from surpass.models.policy import Policy
from surpass.prompts.templates import render
from surpass.records import Prompt, Ragged
from surpass.rollout.engine import Engine, Sampling
from surpass.rollout.sampling import sequence_seed

# Successful runs of arXiv 2604.13016 began at 72 % overlap or rose to 91 %, failing ones stayed at 75-78 %; well below
# that the supports have little in common and a cold start comes first.
LOW_OVERLAP = 0.5
DETERMINISTIC = 0.9
SCALES = tuple(1.0 + 0.25 * i for i in range(17))


@dataclass(frozen=True)
class StateFigures:
    """Means over the tokens of the student's own answers.

    overlap: share of the student's top-k that is in the teacher's. student_mass, teacher_mass: probability each gives
    to the shared part. student_entropy, teacher_entropy: nats. reverse_kl, forward_kl: nats a token. deterministic:
    share of tokens on which the teacher's largest probability exceeds 0.9. limit: the largest lambda of a grid up to 5 at
    which at most 1 % of those tokens would lose the teacher's mode (None: even lambda = 1.25 loses more).
    """

    overlap: float
    student_mass: float
    teacher_mass: float
    student_entropy: float
    teacher_entropy: float
    reverse_kl: float
    forward_kl: float
    deterministic: float
    limit: float | None


@dataclass
class Diagnosis:
    """Evidence and verdict. gain: the teacher's pass rate less the student's when both go on from the same half-written
    answers of the student. novelty: share of prompts the teacher solves at least once and the student never."""

    student: Evaluation
    teacher: Evaluation
    covered: Coverage
    states: StateFigures
    gain: float
    novelty: float
    verdict: str = ""
    reasons: list[str] = field(default_factory=list)


def diagnose(
    student: Policy,
    teacher: Policy,
    reference: Policy,
    engine_of: Callable[[Policy], Engine],
    prompts: Sequence[Prompt],
    judge: Callable[[Sequence[Prompt], Sequence[str]], Judged],
    sampling: Sampling,
    *,
    samples: int = 8,
    top_k: int = 16,
    seed: int = 0,
    token_budget: int = 16384,
    template_args: dict[str, object] | None = None,
) -> Diagnosis:
    """Evaluate both models, compare them on the student's states, and let both continue the student's half answers."""
    ids = Ragged.from_list(
        [render(p, student.tokenizer, template_args=template_args or {}) for p in prompts], torch.int64
    )
    measured = [
        evaluate(
            engine_of(p),
            prompts,
            ids,
            judge,
            p.tokenizer,
            n=samples,
            sampling=sampling,
            ks=(1, samples),
            seed=seed,
        )
        for p in (student, teacher)
    ]
    seeds = torch.tensor([sequence_seed(seed, -2, p.id, 0) for p in prompts])
    written = engine_of(student).generate(ids, 1, sampling, seeds)
    states = state_figures(
        student, teacher, reference, ids, written.response, top_k, sampling.temperature, token_budget
    )
    halves = Ragged.from_list(
        [torch.cat([ids[i], written.response[i][: len(written.response[i]) // 2]]) for i in range(len(ids))]
    )
    rates = [
        _continued(engine_of(p), p, prompts, ids, halves, judge, sampling, seeds + 1)
        for p in (student, teacher)
    ]
    covered = coverage(measured[0], measured[1], k=samples, threshold=0.5)
    result = Diagnosis(measured[0], measured[1], covered, states, rates[1] - rates[0], covered.lost)
    result.verdict, result.reasons = verdict(result)
    return result


@torch.no_grad()
def state_figures(
    student: Policy,
    teacher: Policy,
    reference: Policy,
    prompt_ids: Ragged,
    response: Ragged,
    top_k: int,
    temperature: float,
    token_budget: int,
) -> StateFigures:
    """Figures on given answers; the full distributions of few sequences at a time."""
    shared = min(p.vocabulary for p in (student, teacher, reference))
    k = min(top_k, shared)
    columns: list[Tensor] = []
    kept: list[Tensor] = []
    for rows in micro_batches(prompt_ids.lengths + response.lengths, max(1, token_budget // 8)):
        context, answers = prompt_ids.select(rows), response.select(rows)
        s, t, r = (
            p.head.cut(shared)
            .logits(response_hidden(p, context, answers), temperature or 1.0)
            .log_softmax(-1)
            .cpu()
            for p in (student, teacher, reference)
        )
        top_s, top_t = s.topk(k).indices, t.topk(k).indices
        shared_top = top_k_overlap(top_s, s.gather(-1, top_s), top_t, t.gather(-1, top_t))
        columns.append(
            torch.stack(
                [
                    shared_top.ratio,
                    shared_top.student_mass,
                    shared_top.teacher_mass,
                    entropy(s),
                    entropy(t),
                    reverse_kl(s, t),
                    forward_kl(s, t),
                ],
                -1,
            )
        )
        sure = t.amax(-1).exp() > DETERMINISTIC
        mode = t.argmax(-1, keepdim=True)
        # For each lambda: does the extrapolated target still put the teacher's mode first on this near-certain token?
        stays = [
            (log_linear([t, r], [scale, 1.0 - scale]).argmax(-1, keepdim=True) == mode).squeeze(-1)
            for scale in SCALES
        ]
        kept.append(torch.stack(stays, -1)[sure])
    means = torch.cat(columns).mean(0).tolist()
    holding = torch.cat(kept).float()
    limit: float | None = SCALES[-1]
    if len(holding):
        within = [
            scale for scale, share in zip(SCALES, holding.mean(0).tolist(), strict=True) if share >= 0.99
        ]
        limit = max(within) if len(within) > 1 else None
    return StateFigures(*means, deterministic=len(holding) / max(1, len(response.values)), limit=limit)


def _continued(
    engine: Engine,
    policy: Policy,
    prompts: Sequence[Prompt],
    prompt_ids: Ragged,
    halves: Ragged,
    judge: Callable[[Sequence[Prompt], Sequence[str]], Judged],
    sampling: Sampling,
    seeds: Tensor,
) -> float:
    """Pass rate of answers begun by the student and ended by `policy`."""
    rest = engine.generate(halves, 1, sampling, seeds).response
    begun = [halves[i][len(prompt_ids[i]) :].tolist() for i in range(len(halves))]
    texts = policy.tokenizer.batch_decode(
        [a + b for a, b in zip(begun, rest.tolist(), strict=True)], skip_special_tokens=True
    )
    reward = judge(list(prompts), [str(t) for t in texts]).reward
    return float(reward[~reward.isnan()].mean())


def verdict(found: Diagnosis) -> tuple[str, list[str]]:
    """`likely`, `cold start first` or `unlikely`, with the reasons in words."""
    states, reasons = found.states, []
    better = found.teacher.overall.estimates["pass@1"].value - found.student.overall.estimates["pass@1"].value
    reasons.append(f"the teacher's pass@1 is {better:+.3f} against the student's")
    reasons.append(
        f"going on from the student's half answers, the teacher is {found.gain:+.3f} against the student"
    )
    reasons.append(f"{found.novelty:.1%} of the prompts are solved by the teacher and never by the student")
    reasons.append(f"{states.overlap:.1%} of the student's likely tokens are among the teacher's")
    if found.gain <= 0 and found.novelty == 0:
        return "unlikely", [
            *reasons,
            "on the student's own states this teacher knows nothing the student does not",
        ]
    if states.overlap < LOW_OVERLAP:
        return "cold start first", [
            *reasons,
            "the two think differently: fine-tune the student on the teacher's answers first (surpass train sequence_kd)",
        ]
    return "likely", reasons
