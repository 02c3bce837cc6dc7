"""MiniLLM: reverse KL between whole answers, by policy gradient with three remedies against its variance and hacking.

    min_theta  KL( student(y | x) || teacher(y | x) ),     r_t = log teacher(y_t) - log student(y_t)
    gradient = E_{y ~ mix} sum_t w_t ( grad KL(student(. | s_t) || teacher(. | s_t))  -  R_{t+1} grad log student(y_t) )

- single step: each token's own share of the gradient is exact, over the whole vocabulary; only the return of the later
  tokens, R_{t+1} = sum_{t' > t} r_t', is sampled;
- teacher-mixed sampling: y_t ~ mix = alpha teacher + (1 - alpha) student, weighed by w_t = student(y_t) / mix(y_t).
  The exact weight is the product over the whole prefix; the paper keeps its last factor, which is at most
  1 / (1 - alpha) and biased for alpha > 0;
- length normalisation: R_{t+1} is divided by the number of tokens it sums, or long answers are punished for length.

Source: arXiv 2306.08543; its code was not compared. The part with R is clipped as PPO clips, against the weights that
wrote the batch. The paper adds cross-entropy on a pre-training corpus at every step; here `data_coefficient` adds that
on the data set's own responses to the same prompts, and there is no second corpus.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from surpass.learn.aggregate import Loss, Term
from surpass.learn.divergence import Divergence
from surpass.learn.sampled import log_ratio_advantage
from surpass.learn.surrogate import importance_sampling, ppo_clip, truncated_importance_weight
from surpass.methods.base import Method, Needs, Reduction, divergence_metrics, kl_metrics, old_logp
from surpass.methods.run import Run
from surpass.records import Prompt, Ragged, Rollouts
from surpass.roles.scoring import Want


@dataclass(kw_only=True)
class MiniLLM(Method):
    """Reverse KL of whole answers with exact single steps and teacher-mixed sampling (arXiv 2306.08543)."""

    reduction: Reduction = "sequence_sum"
    """Sum over an answer's tokens, mean over answers, as the objective has it."""
    teacher_share: float = 0.2
    """alpha: share of the teacher's distribution in the one that tokens are sampled from; 0: the student alone."""
    length_normalised: bool = True
    """Divide the return of the later tokens by their number."""
    clip: float | None = 0.2
    """Ratios outside `1 +- clip` get no gradient from the return; null: no clip."""
    data_coefficient: float = 0.0
    """Weight of the cross-entropy on the data set's responses to the same prompts; above 0 they must have one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.teacher_share < 1:
            raise ValueError(
                f"method.teacher_share lies in [0, 1), found {self.teacher_share}; to learn from the teacher's text "
                "alone, choose the method sequence_kd"
            )

    def needs(self) -> Needs:
        return Needs(teacher=True, response=self.data_coefficient > 0, sampler_law=True)

    def collect(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        if self.teacher_share:
            rollouts = run.generate_mixed(prompts, self.samples, self.teacher_share)
        else:
            rollouts = run.generate(prompts, self.samples)
        if self.data_coefficient:
            data = run.from_data(prompts).with_(temperature=rollouts.temperature)
            rollouts = Rollouts.cat([rollouts, data])
        if run.off_policy:
            rollouts = run.score(rollouts, "old")
        return run.score(rollouts, "teacher", Want(hidden=True))

    def loss(self, run: Run, batch: Rollouts) -> Loss:
        hidden = run.student_hidden(batch)
        logp, _ = run.student_logp(batch, hidden)
        old, teacher = old_logp(batch, logp), batch.scores["teacher"].logp
        assert teacher is not None
        weight = self.mixture_weight(batch, old)
        kl = run.divergence(batch, hidden, {"teacher": 1.0}, Divergence("reverse_kl"))
        later = self.later_return(batch.ragged(log_ratio_advantage(teacher.to(logp.device), old)))
        terms = [
            self.term("single_step", weight * kl.value),
            self.term("long", weight * self.long(logp, old, later)),
        ]
        if self.data_coefficient:
            terms.append(Term("cross_entropy", -logp, "data", "token_mean", self.data_coefficient))
        metrics = {
            "reverse_kl": kl.value.detach(),
            "return": later,
            "sampling/mixture_weight": weight,
            **divergence_metrics(kl),
            **kl_metrics(batch, logp),
        }
        return Loss(tuple(terms), metrics)

    def mixture_weight(self, batch: Rollouts, old: Tensor) -> Tensor:
        """`w_t = student(y_t) / mix(y_t)` `[T]`, detached, of the weights that wrote the batch."""
        return truncated_importance_weight(
            old, batch.sampler_logp.to(old.device), 1 / (1 - self.teacher_share)
        )

    def later_return(self, log_ratio: Ragged) -> Tensor:
        """`R_{t+1}` `[T]`: what the tokens after each one will earn, per token where length-normalised."""
        later = log_ratio.suffix_sum() - log_ratio.values
        if not self.length_normalised:
            return later
        remaining = log_ratio.expand(log_ratio.lengths) - log_ratio.position - 1
        return later / remaining.clamp(min=1)

    def long(self, logp: Tensor, old: Tensor, later: Tensor) -> Tensor:
        """Policy gradient `[T]` of the later return."""
        if self.clip is None:
            return importance_sampling(logp, old, later)
        return ppo_clip(logp, old, later, self.clip, self.clip).loss
