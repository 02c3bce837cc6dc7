"""Probes: identical models agree wholly, the rank AUC is the fraction of ordered pairs, gaps close from 0 to 1."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surpass.evaluate.probes import agreement, gap_recovery, near_deterministic, rank_auc
from surpass.models.policy import Policy, load_policy
from surpass.models.zoo import char_tokenizer, save_tiny
from surpass.records import Author, Prompt, Ragged, Rollouts
from surpass.roles.role import Role


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Policy, Policy]:
    folder: Path = tmp_path_factory.mktemp("probes")
    for seed in (0, 1):
        save_tiny(folder / str(seed), tokenizer=char_tokenizer("ab"), seed=seed)
    one, two = (load_policy(str(folder / str(seed))) for seed in (0, 1))
    with torch.no_grad():  # fresh weights are nearly uniform
        for policy in (one, two):
            policy.head.weight.mul_(40.0)
    return one, two


def answers(policy: Policy, reward: torch.Tensor | None = None) -> Rollouts:
    vocabulary = policy.vocabulary
    generator = torch.Generator().manual_seed(0)
    response = Ragged.from_list([torch.randint(vocabulary, (n,), generator=generator) for n in (3, 5, 1)])
    total = len(response.values)
    return Rollouts(
        prompts=tuple(Prompt(f"p{i}", "a") for i in range(3)),
        prompt_ids=Ragged.from_list([[1]] * 3),
        response=response,
        author=torch.full((total,), int(Author.STUDENT), dtype=torch.int8),
        sampler_logp=torch.zeros(total),
        group=torch.arange(3),
        finish=torch.zeros(3, dtype=torch.int64),
        version=torch.zeros(3, dtype=torch.int64),
        reward=reward,
    )


def test_a_model_agrees_with_itself(policies: tuple[Policy, Policy]):
    one, _ = policies
    found = agreement(Role("student", one), Role("teacher", one), answers(one), k=2)
    assert (found.overlap_ratio, found.entropy_gap, found.overlap_advantage) == (1.0, 0.0, 0.0)
    assert found.student_mass == found.teacher_mass and found.overlap_tokens == 9
    assert math.isnan(found.signal_auc)
    whole = agreement(Role("student", one), Role("teacher", one), answers(one), k=10_000)
    assert whole.student_mass == pytest.approx(1.0)


def test_different_models_agree_in_part(policies: tuple[Policy, Policy]):
    one, two = policies
    rewarded = answers(one, torch.tensor([1.0, 0.0, 0.0]))
    found = agreement(Role("student", one), Role("teacher", two), rewarded, k=2)
    assert 0 <= found.overlap_ratio < 1 and found.entropy_gap > 0
    assert 0 <= found.signal_auc <= 1 and found.overlap_advantage <= 0
    back = agreement(Role("student", two), Role("teacher", one), rewarded, k=2)
    assert (back.overlap_ratio, back.entropy_gap) == pytest.approx((found.overlap_ratio, found.entropy_gap))
    assert (back.student_mass, back.teacher_mass) == pytest.approx((found.teacher_mass, found.student_mass))
    # The signal of one is minus that of the other, and so is the order.
    assert back.signal_auc == pytest.approx(1 - found.signal_auc)
    assert set(found.row()) >= {"overlap_ratio", "signal_auc", "deterministic_share"}


def test_no_token_is_an_error(policies: tuple[Policy, Policy]):
    one, _ = policies
    empty = replace(answers(one)).select(torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="no response token"):
        agreement(Role("student", one), Role("teacher", one), empty)


def test_gap_recovery():
    assert [gap_recovery(0.2, after, 0.6) for after in (0.2, 0.4, 0.6)] == pytest.approx([0.0, 0.5, 1.0])
    assert gap_recovery(0.2, 0.7, 0.6) > 1 and gap_recovery(0.2, 0.1, 0.6) < 0
    assert math.isnan(gap_recovery(0.2, 0.3, 0.2))


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=12))
def test_rank_auc_counts_ordered_pairs(pairs: list[tuple[int, bool]]):
    signal = torch.tensor([float(s) for s, _ in pairs])
    reward = torch.tensor([float(r) for _, r in pairs])
    right, wrong = ([s for s, r in pairs if r == kind] for kind in (True, False))
    found = rank_auc(signal, reward)
    if not right or not wrong:
        assert math.isnan(found)
        return
    scores = [1.0 if a > b else 0.5 if a == b else 0.0 for a in right for b in wrong]
    assert found == pytest.approx(sum(scores) / len(scores))


def test_rank_auc_leaves_out_what_was_not_judged():
    nan = math.nan
    assert rank_auc(torch.tensor([2.0, 1.0, 9.0, nan]), torch.tensor([1.0, 0.0, nan, 1.0])) == 1.0
    with pytest.raises(ValueError, match="per answer"):
        rank_auc(torch.zeros(3), torch.zeros(2))


def test_near_deterministic_share():
    assert near_deterministic(torch.tensor([0.95, 0.9, 0.5, math.nan])) == pytest.approx(2 / 3)
    assert math.isnan(near_deterministic(torch.zeros(0)))
