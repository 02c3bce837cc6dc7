"""Pass rates, and prompt lists that are flat in them."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surpass.prompts.difficulty import flat_difficulty, pass_rates
from surpass.records import Prompt


def test_pass_rates_count_judged_answers_alone():
    ids, rewards = ["a", "a", "b", "b", "c", "a"], [1.0, 0.0, 0.6, math.nan, math.nan, 0.5]
    assert pass_rates(ids, rewards) == {"a": 1 / 3, "b": 1.0}
    assert pass_rates(ids, rewards, above=0.4) == {"a": 2 / 3, "b": 1.0}
    assert pass_rates(ids, rewards, smooth=True) == {"a": 1.5 / 4, "b": 0.75}


@given(st.lists(st.sampled_from([k / 8 for k in range(9)]), min_size=1, max_size=40), st.integers(1, 6))
def test_every_difficulty_is_as_frequent_and_no_prompt_is_lost(rates: list[float], bins: int):
    prompts = [Prompt(id=str(i), messages="x") for i in range(len(rates))]
    by_id = {p.id: rate for p, rate in zip(prompts, rates, strict=True)}
    found = flat_difficulty(prompts, by_id, bins)
    histogram = Counter(min(int(by_id[p.id] * bins), bins - 1) for p in found)
    assert len(set(histogram.values())) == 1
    assert max(histogram.values()) == max(Counter(min(int(r * bins), bins - 1) for r in rates).values())
    repeats = Counter(p.id for p in found)
    assert set(repeats) == set(by_id)
    for level in histogram:
        inside = [repeats[i] for i, r in by_id.items() if min(int(r * bins), bins - 1) == level]
        assert max(inside) - min(inside) <= 1


def test_the_seed_says_which_prompts_come_once_more():
    prompts = [Prompt(id=str(i), messages="x") for i in range(30)]
    rates = {p.id: float(int(p.id) >= 20) for p in prompts}
    first, again = (sorted(p.id for p in flat_difficulty(prompts, rates, 2, seed=1)) for _ in range(2))
    assert first == again and len(first) == 40
    middle = [Prompt(id=str(i), messages="x") for i in range(35)]
    rates = {p.id: float(int(p.id) >= 20) for p in middle}
    draws = {tuple(sorted(p.id for p in flat_difficulty(middle, rates, 2, seed=s))) for s in range(5)}
    assert len(draws) > 1


def test_what_is_missing_is_an_error_in_words():
    prompts = [Prompt(id="known", messages="x"), Prompt(id="new", messages="x")]
    with pytest.raises(ValueError, match=r"1 of 2 prompts have no pass rate \(first: 'new'\)"):
        flat_difficulty(prompts, {"known": 0.5})
    with pytest.raises(ValueError, match="at least 1 difficulty bin"):
        flat_difficulty(prompts, {"known": 0.5, "new": 0.5}, bins=0)
