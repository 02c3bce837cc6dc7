"""Invariants of TIP: which tokens are kept, exactly how many, and that the others never reach the head."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from world import (
    CLOSE,
    PROMPT,
    distributions,
    every_answer,
    gradient,
    policy,
    prompts,
    rollouts,
    step_gradient,
    world,
)

import surpass.methods.run as run_module
from surpass.learn.divergence import entropy, forward_kl, reverse_kl
from surpass.learn.weights import kept_count, min_max, soft_or
from surpass.methods.opd import OPD
from surpass.methods.run import Run
from surpass.methods.tip import TIP, importance
from surpass.records import Rollouts, Scores
from surpass.roles.role import Role

ANSWERS = every_answer(2)
SCORES = ["soft_or", "entropy", "q3", "divergence"]
SELECTIONS: list[dict[str, Any]] = [*({"score": s} for s in SCORES), {"selection": "drawn"}]
each_selection = pytest.mark.parametrize("settings", SELECTIONS, ids=lambda s: next(iter(s.values())))


def collected(run: Run, method: TIP) -> Rollouts:
    """All answers to one prompt."""
    return dataclasses.replace(method, samples=len(ANSWERS)).collect(run, [PROMPT])


def ranked(run: Run, batch: Rollouts, score: str) -> torch.Tensor:
    """`[T]` importance, straight from the definition."""
    student, teacher = (
        distributions(p, batch).detach() for p in (run.student, run.teachers["default"].policy)
    )
    h = entropy(student)
    h = min_max(h.clamp(max=h.sort().values[-(-98 * len(h) // 100) - 1]))
    if score == "entropy":
        return h
    if score == "q3":
        return forward_kl(student, teacher) * (1 - h)
    kl = reverse_kl(student, teacher)
    return kl if score == "divergence" else soft_or(h, min_max(kl))


def test_all_tokens_are_on_policy_distillation_bit_for_bit():
    run = world()
    opd = OPD(estimator="full")
    batch = rollouts(run, ANSWERS)
    expected = step_gradient(run, opd, opd.score(run, batch))
    method = TIP(share=1.0)
    assert torch.equal(step_gradient(run, method, collected(run, method)), expected)


@pytest.mark.parametrize("share", [0.5, 0.2, 0.1, 0.01])
@each_selection
def test_the_kept_count_is_exact(settings, share):
    run = world()
    batch = collected(run, TIP(share=share, **settings))
    total = len(batch.response.values)
    assert int(batch.mask("trained").sum()) == kept_count(total, share)
    assert run.metrics["tokens_kept"] == kept_count(total, share) / total


@pytest.mark.parametrize("score", SCORES)
def test_the_most_important_tokens_are_kept(score):
    run = world()
    batch = collected(run, TIP(share=0.4, score=score))
    scores, kept = ranked(run, batch, score), batch.mask("trained")
    # Scores are compared to four decimals.
    assert float(scores[kept].min()) >= float(scores[~kept].max()) - 1.1e-4


@each_selection
def test_the_loss_is_the_mean_of_reverse_kl_over_kept_tokens_and_others_have_no_gradient(settings):
    run = world()
    method = TIP(share=0.3, **settings)
    batch = collected(run, method)
    kept = batch.mask("trained")
    student, teacher = (distributions(p, batch) for p in (run.student, run.teachers["default"].policy))
    exact = reverse_kl(student, teacher.detach())[kept].mean()
    found = step_gradient(run, method, batch)
    torch.testing.assert_close(found, gradient(run.student, exact), **CLOSE)
    assert bool(found.any())
    values = method.loss(run, batch).terms[0].values
    assert not bool(values[~kept].any())
    assert not bool(gradient(run.student, values[~kept].sum()).any())


def test_other_tokens_reach_neither_head_nor_memory(monkeypatch):
    run = world()
    method = TIP(share=0.3)
    batch = collected(run, method)
    kept = int(batch.mask("trained").sum())
    assert sum(len(part.states) for part in batch.scores["teacher"].hidden) == kept
    read = []
    fused = run_module.log_linear_divergence

    def counting(hidden, head, terms, *rest, **named):
        read.append((len(hidden), *(len(t.hidden) for t in terms)))
        return fused(hidden, head, terms, *rest, **named)

    monkeypatch.setattr(run_module, "log_linear_divergence", counting)
    method.loss(run, batch)
    assert read == [(kept, kept)]


@pytest.mark.parametrize("micro", [1, 3])
def test_the_mean_is_over_the_whole_update_however_it_is_cut(micro):
    run = world()
    method = TIP(share=0.2)
    batch = collected(run, method)
    # Some micro-batches have no kept token at all.
    assert bool((batch.ragged(batch.mask("trained")).sum() == 0).any())
    torch.testing.assert_close(
        step_gradient(run, method, batch, micro), step_gradient(run, method, batch), **CLOSE
    )


def test_confident_and_wrong_is_seen_by_soft_or_and_q3_and_not_by_entropy():
    h, distance = torch.tensor([0.0, 0.6, 0.3]), torch.tensor([3.0, 0.1, 0.0])
    assert importance("entropy", h, distance).argmax() == 1
    assert importance("q3", h, distance).argmax() == importance("soft_or", h, distance).argmax() == 0
    found = importance("soft_or", h, distance)
    assert float(found[0]) == 1.0 and bool((found >= torch.maximum(h, distance / 3) - 1e-6).all())


@pytest.mark.parametrize("score", ["soft_or", "entropy", "divergence"])
def test_scale_and_offset_do_not_change_the_selection(score):
    """Powers of two and small integers: no rounding decides a tie."""
    h, distance = torch.tensor([1.0, 2.0, 5.0, 3.0]), torch.tensor([4.0, 1.0, 2.0, 5.0])

    def order(h: torch.Tensor, distance: torch.Tensor) -> list[int]:
        return importance(score, min_max(h), distance).argsort(descending=True).tolist()

    assert order(h, distance) == order(4 * h + 2, distance) == order(h, 2 * distance + 8)


@each_selection
def test_a_student_that_is_its_teacher_gives_no_nan(settings):
    run = world(teacher=policy(0))
    method = TIP(share=0.5, **settings)
    batch = collected(run, method)
    assert int(batch.mask("trained").sum()) == kept_count(len(batch.response.values), 0.5)
    assert bool(step_gradient(run, method, batch).isfinite().all())


@pytest.mark.parametrize("score", SCORES)
def test_micro_batches_do_not_choose_between_equal_states(score):
    """Twenty answers begin in the same state, and in micro-batches of every size it is read a little differently."""
    answers = [[i % 3, i // 3 % 3, 3] for i in range(20)] + [[3]]
    masks = []
    for budget in (1, 9, 23, 10_000):
        run = world(answers, token_budget=budget)
        masks.append(TIP(share=0.4, score=score, samples=len(answers)).collect(run, [PROMPT]).mask("trained"))
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_the_draw_depends_on_seed_and_step_alone():
    method = TIP(share=0.3, selection="drawn")
    masks = [collected(world(step=step), method).mask("trained") for step in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_with_high_powers_the_draw_goes_where_entropy_and_divergence_are():
    run = world()
    sharp = collected(run, TIP(share=0.2, selection="drawn", entropy_power=60.0, divergence_power=0.0))
    h = ranked(run, sharp, "entropy")
    assert float(h[sharp.mask("trained")].min()) > float(h.median())


def test_routed_teachers_are_ranked_together():
    teachers = {"math": Role("teacher/math", policy(1)), "code": Role("teacher/code", policy(4))}
    run = world(teachers=teachers)
    asked = [dataclasses.replace(p, domain=d) for p, d in zip(prompts(2), teachers, strict=True)]
    method = TIP(share=0.4, samples=5)
    batch = method.collect(run, asked)
    assert int(batch.mask("trained").sum()) == kept_count(len(batch.response.values), 0.4)
    whole = dataclasses.replace(method, share=1.0).collect(run, asked)
    everywhere = TIP(share=1.0).loss(run, whole).terms[0].values
    kept = batch.mask("trained")
    torch.testing.assert_close(method.loss(run, batch).terms[0].values[kept], everywhere[kept], **CLOSE)


# -- rewards ----------------------------------------------------------------------------------------------------------


def reward(text: str) -> float:
    return float(text.count("b"))


def test_rewards_weigh_whole_answers_as_the_softmax_does():
    run = world(reward=reward)
    method = TIP(share=1.0, reward_temperature=0.5, reduction="sequence_mean")
    assert method.needs().reward
    batch = collected(run, method)
    assert batch.reward is not None
    weight = (batch.reward / 0.5).softmax(0)
    student, teacher = (distributions(p, batch) for p in (run.student, run.teachers["default"].policy))
    exact = (weight * batch.ragged(reverse_kl(student, teacher.detach())).mean()).sum()
    torch.testing.assert_close(step_gradient(run, method, batch), gradient(run.student, exact), **CLOSE)


def test_without_differences_in_reward_the_weights_are_one():
    run = world(reward=lambda text: 1.0)
    weighed, plain = TIP(reward_temperature=0.5), TIP()
    torch.testing.assert_close(
        step_gradient(run, weighed, collected(run, weighed)),
        step_gradient(run, plain, collected(run, plain)),
        **CLOSE,
    )


def test_answers_nobody_judged_are_not_trained():
    run = world(reward=lambda text: float("nan") if "c" in text else 1.0)
    method = TIP(share=0.5, reward_temperature=1.0)
    batch = collected(run, method)
    assert batch.reward is not None
    unjudged = batch.response.expand(batch.reward.isnan())
    assert bool(unjudged.any()) and not bool((batch.mask("trained") & unjudged).any())
    assert int(batch.mask("trained").sum()) == kept_count(int((~unjudged).sum()), 0.5)


# -- the parts that were added for it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 9, 10_000])
def test_measure_is_the_divergence_in_the_batch_s_own_order(budget):
    run = world(token_budget=budget)
    run.student.model.train()
    method = OPD(estimator="full")
    batch = method.score(run, rollouts(run, ANSWERS))
    found = run.measure(batch, {"teacher": 1.0}, run_module.Divergence("reverse_kl"))
    expected = method.loss(run, batch)
    torch.testing.assert_close(found.value, expected.terms[0].values.detach(), **CLOSE)
    torch.testing.assert_close(found.student_entropy, expected.metrics["entropy"], **CLOSE)
    assert not found.value.requires_grad and run.student.model.training


def test_a_token_without_the_teacher_s_states_is_an_error_only_where_it_is_asked_for():
    run = world()
    batch = collected(run, TIP(share=0.3))
    hidden = run.student_hidden(batch)
    kept = batch.mask("trained").nonzero().squeeze(1)
    ask: dict[str, Any] = {"weights": {"teacher": 1.0}, "divergence": run_module.Divergence("reverse_kl")}
    assert len(run.divergence(batch, hidden, **ask, tokens=kept).value) == len(kept)
    with pytest.raises(ValueError, match=r"no hidden states on \d+ of \d+ tokens"):
        run.divergence(batch, hidden, **ask)
    with pytest.raises(ValueError, match="no hidden states"):
        run.divergence(batch.with_(scores={"teacher": Scores()}), hidden, **ask, tokens=kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 0.0}, "share of tokens"),
        ({"share": 1.5}, "share of tokens"),
        ({"percentile": 0.0}, "percentile"),
        ({"reward_temperature": 0.0}, "above 0"),
        ({"entropy_power": 2.0}, "belong to selection drawn"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        TIP(**changes)
