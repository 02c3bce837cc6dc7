"""Overlong prompts are errors, or counted; nothing is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surpass.prompts.limits import check_lengths
from surpass.records import Prompt


@given(st.lists(st.integers(1, 9), min_size=1), st.integers(1, 9))
def test_kept_and_dropped_are_all_there_is(lengths, limit):
    prompts = [Prompt(id=str(i), messages="q") for i in range(len(lengths))]
    rendered = [list(range(n)) for n in lengths]
    if min(lengths) > limit:
        with pytest.raises(ValueError, match=f"longer than {limit} tokens"):
            check_lengths(prompts, rendered, limit, "drop")
        return
    fitting = check_lengths(prompts, rendered, limit, "drop")
    assert {p.id for p in fitting.prompts} | set(fitting.dropped) == {p.id for p in prompts}
    assert fitting.ids == [ids for ids in rendered if len(ids) <= limit]
    assert all(n > limit for n in fitting.dropped.values())
    if fitting.dropped:
        assert f"dropped {len(fitting.dropped)} of {len(prompts)}" in str(fitting)
        with pytest.raises(ValueError, match=f"{len(fitting.dropped)} of {len(prompts)} prompts are longer"):
            check_lengths(prompts, rendered, limit)


def test_empty_and_unmatched_renderings_are_errors():
    prompt = Prompt(id="p", messages="")
    with pytest.raises(ValueError, match="prompt 'p' has no tokens"):
        check_lengths([prompt], [[]], 5)
    with pytest.raises(ValueError, match="1 prompts but 0 renderings"):
        check_lengths([prompt], [], 5)
