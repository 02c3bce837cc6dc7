"""The order of prompts: deterministic, in exact proportion, resumable."""

import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surpass.prompts.stream import PromptStream
from surpass.records import Prompt


def make(**sizes: int) -> list[Prompt]:
    return [Prompt(id=f"{d}{i}", messages="q", domain=d) for d, n in sizes.items() for i in range(n)]


RATIOS = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 20).map(lambda i: i / 10), min_size=1)


@settings(max_examples=60)
@given(ratios=RATIOS, batches=st.lists(st.integers(0, 20), max_size=12), seed=st.integers(0, 5))
def test_every_domain_is_within_one_of_its_share_at_any_time(ratios, batches, seed):
    stream = PromptStream(make(a=3, b=5, c=7, d=1), seed=seed, ratios=ratios)
    total, counts = sum(ratios.values()), Counter()
    for size in batches:
        counts.update(p.domain for p in stream.next(size))
        n = counts.total()
        for domain, ratio in ratios.items():
            # Quota is exact in fractions; the slack is for the float division of this test alone.
            assert abs(counts[domain] - n * ratio / total) < 1 + 1e-9
    assert set(counts) <= set(ratios)


def test_batches_that_divide_evenly_are_exact():
    stream = PromptStream(make(a=4, b=4, c=4), ratios={"a": 0.5, "b": 0.25, "c": 0.25})
    for _ in range(10):
        assert Counter(p.domain for p in stream.next(8)) == {"a": 4, "b": 2, "c": 2}


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_each_epoch_has_every_prompt_once(size, seed, mixed):
    prompts = make(a=size)
    stream = PromptStream(prompts, seed=seed, ratios={"a": 1.0} if mixed else None)
    for _ in range(3):
        assert Counter(p.id for p in stream.next(size)) == Counter(p.id for p in prompts)


def test_order_depends_on_seed_and_epoch():
    prompts = make(a=50)
    stream, same, other = (PromptStream(prompts, seed=s) for s in (1, 1, 2))
    first, second = stream.next(50), stream.next(50)
    assert first == same.next(50)
    assert first != second
    assert first != other.next(50)
    assert PromptStream(prompts, shuffle=False).next(60) == [*prompts, *prompts[:10]]


@settings(max_examples=40)
@given(st.integers(0, 40), st.integers(1, 30), st.sampled_from([None, {"a": 0.7, "b": 0.3}]))
def test_resume_is_exact_at_any_position(before, after, ratios):
    prompts = make(a=7, b=4)
    stream = PromptStream(prompts, seed=3, ratios=ratios)
    stream.next(before)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = PromptStream(prompts, seed=3, ratios=ratios)
    resumed.load_state_dict(state)
    peeked = resumed.peek(after)
    assert peeked == resumed.next(after) == stream.next(after)
    assert sum(stream.drawn.values()) == before + after


def test_batch_sizes_do_not_change_the_order():
    prompts = make(a=7, b=4)
    one, other = (PromptStream(prompts, ratios={"a": 2, "b": 1}) for _ in range(2))
    assert one.next(20) == [p for _ in range(10) for p in other.next(2)]


@pytest.mark.parametrize(
    "changed",
    [{"seed": 4}, {"ratios": {"a": 1.0, "b": 1.0}}, {"shuffle": False}, {"prompts": make(a=7, b=5)}],
)
def test_a_position_in_another_stream_is_refused(changed):
    setting = {"prompts": make(a=7, b=4), "seed": 3, "ratios": None, "shuffle": True}
    state = PromptStream(**setting).state_dict()
    with pytest.raises(ValueError, match=rf"another stream: .*{next(iter(changed))}"):
        PromptStream(**{**setting, **changed}).load_state_dict(state)


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ({"a": 0.5, "z": 0.5}, r"without prompts: \['z'\]; the prompts have \['a', 'b'\]"),
        ({"a": -1.0, "b": 1.0}, "numbers >= 0"),
        ({"a": 0.0}, "at least one above 0"),
        ({"a": math.nan}, "numbers >= 0"),
    ],
)
def test_unusable_ratios(ratios, message):
    with pytest.raises(ValueError, match=message):
        PromptStream(make(a=1, b=1), ratios=ratios)


def test_a_domain_at_zero_is_never_drawn():
    stream = PromptStream(make(a=2, b=2), ratios={"a": 1.0, "b": 0.0})
    assert {p.domain for p in stream.next(10)} == {"a"}
