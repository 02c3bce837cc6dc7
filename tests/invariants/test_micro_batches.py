"""One optimiser update is one gradient: however it is cut, whatever else the prompts and the batch hold."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from world import Verdict, gradient, policy, prompts, rollouts, world

from surpass.learn.aggregate import denominator, reduce
from surpass.methods.base import Method
from surpass.methods.dapo import DAPO
from surpass.methods.dr_grpo import DrGRPO
from surpass.methods.exopd import ExOPD
from surpass.methods.grpo import GRPO
from surpass.methods.gspo import GSPO
from surpass.methods.opd import OPD
from surpass.methods.rloo import RLOO
from surpass.methods.run import Run
from surpass.records import Author, Prompt, Rollouts, Scores
from surpass.roles.role import Role
from surpass.train.step import update

# Float32 sums in another order.
SAME: dict[str, Any] = {"rtol": 2e-4, "atol": 1e-6}
ANSWERS = [[0, 1, 3], [2], [1, 3], [1, 1, 0, 2, 0, 3], [3], [2, 0], [], [0, 0, 0, 3]]
DOMAINS = ["math", "code"]
BUDGETS = [1, 6, 13, 24]
REDUCTIONS: list[dict[str, Any]] = [
    {"reduction": "token_mean", "horizon": None},
    {"reduction": "sequence_mean", "horizon": None},
    {"reduction": "sequence_sum", "horizon": None},
    {"reduction": "constant_length", "horizon": 20},
]
METHODS: list[Method] = [
    OPD(),
    OPD(discount=0.5),
    OPD(estimator="top_k", top_k=2),
    OPD(estimator="top_k", top_k=2, support="union", tail="renormalise"),
    OPD(estimator="full"),
    ExOPD(),
    ExOPD(reward_scale=2.0, guard_entropy=0.9, guard_top1=0.7),
    ExOPD(reward_scale=2.0, baseline="batch_mean"),
    ExOPD(reward_scale=2.0, baseline="log_normaliser"),
    ExOPD(estimator="top_k", top_k=2),
    ExOPD(estimator="full"),
    ExOPD(estimator="full", reward_scale=2.0, guard_entropy=0.9),
    GRPO(kl_coefficient=0.1),
    GRPO(kl_coefficient=0.1, kl_gradient="forward", advantage="leave_one_out"),
    DrGRPO(),
    DAPO(refill=0),
    DAPO(refill=0, overlong="filter"),
    GSPO(clip_low=0.2, clip_high=0.3),
    RLOO(),
]


def named(method: Method) -> str:
    base = type(method)()
    changed = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    return "-".join([type(method).__name__, *(str(v) for k, v in changed.items() if v != getattr(base, k))])


@dataclasses.dataclass(frozen=True)
class Judge:
    """A reward for each completion in turn, NaN where the judge leaves one out."""

    rewards: tuple[float, ...] = (1.0, 0.0, 0.5, 1.0, math.nan, 0.0, 1.0, 0.25)

    def __call__(
        self, prompts: tuple[Prompt, ...], completions: list[str], completion_ids: object = None
    ) -> Verdict:
        del completion_ids
        del prompts, completions
        return Verdict(torch.tensor(self.rewards), {}, {})


def a_run(budget: int, off_policy: bool = False) -> Run:
    judge: Any = Judge()
    return world(
        ANSWERS,
        student=policy(0),
        teachers={"math": Role("teacher/math", policy(1)), "code": Role("teacher/code", policy(4))},
        judge=judge,
        token_budget=budget,
        off_policy=off_policy,
    )


def asked(**changes: Any) -> list[Prompt]:
    return [dataclasses.replace(p, domain=d, **changes) for p, d in zip(prompts(2), DOMAINS)]


def collected(run: Run, method: Method) -> Rollouts:
    return dataclasses.replace(method, samples=4).collect(run, asked())


def updated(run: Run, method: Method, batch: Rollouts) -> torch.Tensor:
    """The gradient an update leaves behind, before any clipping."""
    optimiser = torch.optim.SGD(run.student.model.parameters(), lr=0.0)
    unlimited = 1e9
    update(run, method, batch, optimiser, Accelerator(cpu=True), unlimited, lambda _: "nowhere")
    return torch.cat([p.grad.flatten() for p in run.student.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda r: r["reduction"])
@pytest.mark.parametrize("method", METHODS, ids=named)
def test_the_gradient_does_not_depend_on_the_token_budget(method, reduction):
    method = dataclasses.replace(method, **reduction)
    whole = a_run(10_000)
    expected = updated(whole, method, collected(whole, method))
    assert bool(expected.isfinite().all())
    assert float(expected.norm()) > 1e-3
    for budget in BUDGETS:
        run = a_run(budget)
        torch.testing.assert_close(updated(run, method, collected(run, method)), expected, **SAME)


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_nor_does_it_where_the_weights_have_moved_since_the_answers_were_written(method):
    found = []
    for budget in (10_000, 1):
        run = a_run(budget, off_policy=True)
        batch = collected(run, method)
        with torch.no_grad():
            run.student.head.weight.mul_(1.1)
        found.append(updated(run, method, batch))
    torch.testing.assert_close(found[1], found[0], **SAME)


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_nor_on_the_order_of_the_answers(method):
    run = a_run(13)
    batch = collected(run, method)
    shuffled = batch.select(torch.tensor([5, 2, 7, 0, 6, 3, 1, 4]))
    torch.testing.assert_close(updated(run, method, shuffled), updated(run, method, batch), **SAME)


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_columns_a_method_does_not_read_change_nothing(method):
    run = a_run(10_000)
    batch = collected(run, method)
    other = tuple(
        dataclasses.replace(
            p,
            answer="a much longer reference answer",
            response="c" * 20,
            privileged={"solution": "abc"},
            columns={"difficulty": 9, "reference_tokens": 400},
            tags=("hard",),
        )
        for p in batch.prompts
    )
    total = len(batch.response.values)
    changed = dataclasses.replace(batch, prompts=other, feedback=("unread",) * len(batch)).with_(
        token={"unread": torch.full((total,), torch.nan)},
        sequence={"unread": torch.full((len(batch),), torch.nan)},
        components={"unread": torch.full((len(batch),), torch.nan)},
        scores={"unread": Scores(logp=torch.full((total,), -torch.inf))},
    )
    assert torch.equal(updated(run, method, changed), updated(run, method, batch))


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_per_token_losses_do_not_depend_on_the_padding_around_them(method):
    run = a_run(10_000)
    batch = collected(run, method)
    whole = [batch.ragged(term.values.detach()) for term in method.loss(run, batch).terms]
    for row in range(len(batch)):
        alone = method.loss(run, batch.select(torch.tensor([row])))
        for together, term in zip(whole, alone.terms, strict=True):
            torch.testing.assert_close(
                term.values.detach(), together[row], rtol=1e-4, atol=1e-5, equal_nan=True
            )


@pytest.mark.parametrize("estimator", ["sampled", "top_k", "full"])
def test_tokens_of_others_are_scored_but_not_trained(estimator):
    run = a_run(10_000)
    method = OPD(estimator=estimator, top_k=2)
    batch = rollouts(run, [[0, 1, 3], [2, 1, 3]], asked())
    author = batch.author.clone()
    author[1] = int(Author.TOOL)
    batch = method.score(run, dataclasses.replace(batch, author=author))
    loss = method.loss(run, batch).terms[0]
    assert batch.mask(loss.stream).tolist() == [True, False, True, True, True, True]
    expected = torch.cat([loss.values[:1], loss.values[2:]]).mean()
    expected = gradient(run.student, expected)
    torch.testing.assert_close(updated(run, method, batch), expected, **SAME)


@pytest.mark.parametrize("budget", [1, 10_000])
def test_a_step_without_a_judged_answer_is_an_error_in_words(budget):
    run = a_run(budget)
    judge: Any = Judge((math.nan,) * 8)
    run.judge = judge
    batch = collected(run, GRPO())
    with pytest.raises(ValueError, match="no token of stream 'trained'"):
        updated(run, GRPO(), batch)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum"])
def test_foreseen_weights_are_what_the_averaging_multiplies_by(reduction: Any):
    batch = rollouts(world(), [[0, 1, 2], [1], [2, 0]])
    batch = batch.with_(masks={"trained": torch.tensor([True, False, True, True, False, False])})
    method = OPD(reduction=reduction)
    values = torch.ones(6, requires_grad=True)
    mask = batch.ragged(batch.mask("trained"))
    reduce(values, mask, reduction, denominator(mask, reduction)).backward()
    assert values.grad is not None
    foreseen = method.loss_weight(batch, "trained").to(values.grad.dtype)
    torch.testing.assert_close(foreseen / foreseen.sum(), values.grad / values.grad.sum())
