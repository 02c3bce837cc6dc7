"""SFT: supervised fine-tuning, cross-entropy on the responses of a data set.

    min_theta  E_{(x, y) ~ data} sum_t -log student(y_t | x, y_<t)

Source: the first stage of arXiv 2203.02155. Nobody writes anything: each prompt brings its `response`, EOS is
appended and trained, and text beyond `rollout.max_new_tokens` is cut. Papers rarely say how tokens are averaged;
the mean over all tokens of the batch is what most code does, and the default.
"""

from __future__ import annotations

from dataclasses import dataclass

from surpass.learn.aggregate import Loss
from surpass.methods.base import Method, Needs
from surpass.methods.run import Run
from surpass.records import Prompt, Rollouts


@dataclass(kw_only=True)
class SFT(Method):
    """Supervised fine-tuning on the data set's responses (arXiv 2203.02155)."""

    samples: int = 1
    """Answers to each prompt; a data set has one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples != 1:
            raise ValueError(
                f"each prompt of a data set has one response, found method.samples {self.samples}; leave it 1 and "
                "repeat the row for every further response"
            )

    def needs(self) -> Needs:
        return Needs(response=True, rollouts=False)

    def collect(self, run: Run, prompts: list[Prompt]) -> Rollouts:
        return run.from_data(prompts)

    def loss(self, run: Run, batch: Rollouts) -> Loss:
        logp, entropy = run.student_logp(batch)
        return Loss((self.term("cross_entropy", -logp, "data"),), {"entropy": entropy})
