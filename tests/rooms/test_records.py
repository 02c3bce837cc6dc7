"""The flat layout against plain Python lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surpass.records import Author, Finish, Hidden, Prompt, Ragged, Rollouts, Scores

sequences = st.lists(st.lists(st.integers(-9, 9), max_size=5), max_size=6)
nonempty = st.lists(st.lists(st.integers(-9, 9), max_size=5), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(sequences)
def test_layout(lists):
    ragged = Ragged.from_list(lists)
    assert ragged.values.dtype == torch.int64
    assert ragged.tolist() == lists
    assert len(ragged) == len(lists)
    assert [ragged[i].tolist() for i in range(len(lists))] == lists
    assert ragged.lengths.tolist() == [len(s) for s in lists]
    assert ragged.owner.tolist() == [i for i, s in enumerate(lists) for _ in s]
    assert ragged.position.tolist() == [t for s in lists for t in range(len(s))]
    assert ragged.sum().tolist() == [sum(s) for s in lists]
    assert ragged.mean().tolist() == pytest.approx([sum(s) / len(s) if s else 0.0 for s in lists])
    assert ragged.extreme(largest=True, empty=-99).tolist() == [max(s, default=-99) for s in lists]
    assert ragged.extreme(largest=False, empty=99).tolist() == [min(s, default=99) for s in lists]
    per_sequence = torch.arange(len(lists))
    assert torch.equal(ragged.expand(per_sequence), ragged.owner)


@settings(max_examples=80, deadline=None)
@given(sequences, st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_suffix_sum(lists, discount):
    found = Ragged.from_list(lists).suffix_sum(discount).tolist()
    expected = [
        sum(discount ** (u - t) * s[u] for u in range(t, len(s))) for s in lists for t in range(len(s))
    ]
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


@settings(max_examples=80, deadline=None)
@given(nonempty, st.data())
def test_select_and_cat(lists, data):
    ragged = Ragged.from_list(lists)
    rows = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=8))
    index = torch.tensor(rows, dtype=torch.int64)
    assert ragged.select(index).tolist() == [lists[i] for i in rows]
    joined = Ragged.cat([ragged, ragged.select(index)])
    assert joined.tolist() == lists + [lists[i] for i in rows]


def test_booleans_are_counted():
    mask = Ragged.from_lengths(torch.tensor([True, True, False]), torch.tensor([2, 0, 1]))
    assert mask.sum().tolist() == [2, 0, 0]


def test_vectors_per_token():
    ragged = Ragged.from_list([torch.ones(2, 3), torch.zeros(0, 3), 2 * torch.ones(1, 3)])
    assert ragged.sum().tolist() == [[2.0] * 3, [0.0] * 3, [2.0] * 3]
    assert ragged.mean().tolist() == [[1.0] * 3, [0.0] * 3, [2.0] * 3]
    empty = Ragged.from_list([torch.zeros(0, 3), torch.zeros(0, 3)])
    assert empty.values.dtype == torch.float32
    assert empty.values.shape == (0, 3)


def test_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="lengths sum to 4, but there are 3 values"):
        Ragged.from_lengths(torch.zeros(3), torch.tensor([1, 3]))
    with pytest.raises(ValueError, match=">= 0"):
        Ragged.from_lengths(torch.zeros(3), torch.tensor([4, -1]))
    with pytest.raises(ValueError, match="expected 3 values, found 2"):
        Ragged.from_lengths(torch.zeros(3), torch.tensor([3])).like(torch.zeros(2))


def rollouts(lists, temperature=1.0, scored=True):
    """Every column is a function of the token's number, so that a cut can be checked against lists."""
    response, count = Ragged.from_list(lists, dtype=torch.int64), len(lists)
    number = torch.arange(len(response.values))
    spread = number[number % 2 == 0].flip(0)  # hidden states of some tokens, in another order
    scores = {
        "teacher": Scores(
            logp=-number.float(),
            support=torch.stack([number, number + 1], -1),
            hidden=(Hidden(spread, spread.float().unsqueeze(-1), "teacher"),),
        )
    }
    return Rollouts(
        prompts=tuple(Prompt(str(i), f"question {i}") for i in range(count)),
        prompt_ids=Ragged.from_list([[i + 1] * (i + 1) for i in range(count)]),
        response=response,
        author=torch.where(number % 3 == 0, int(Author.TOOL), int(Author.STUDENT)),
        sampler_logp=-number.float() / 2,
        group=torch.arange(count) // 2,
        finish=torch.full((count,), int(Finish.EOS)),
        version=torch.zeros(count, dtype=torch.int64),
        temperature=temperature,
        reward=torch.arange(count).float(),
        components={"format": torch.arange(count).float() / 2},
        feedback=tuple(f"text {i}" for i in range(count)),
        scores=scores if scored else {},
        token={"number": number},
        sequence={"row": torch.arange(count)},
        masks={"even": number % 2 == 0},
    )


@settings(max_examples=60, deadline=None)
@given(nonempty, st.data())
def test_select_cuts_every_column_alike(lists, data):
    batch = rollouts(lists)
    rows = data.draw(st.lists(st.integers(0, len(lists) - 1), min_size=1, max_size=8))
    cut = batch.select(torch.tensor(rows))
    number = cut.token["number"]
    assert cut.response.tolist() == [lists[i] for i in rows]
    assert [p.id for p in cut.prompts] == [str(i) for i in rows]
    assert cut.prompt_ids.tolist() == [[i + 1] * (i + 1) for i in rows]
    assert number.tolist() == [n for i in rows for n in batch.ragged(batch.token["number"])[i].tolist()]
    assert torch.equal(cut.sampler_logp, -number.float() / 2)
    assert torch.equal(cut.mask("even"), number % 2 == 0)
    assert torch.equal(cut.mask("tool"), number % 3 == 0)
    assert cut.reward is not None
    assert cut.reward.tolist() == rows
    assert cut.components["format"].tolist() == [i / 2 for i in rows]
    assert cut.feedback == tuple(f"text {i}" for i in rows)
    assert cut.sequence["row"].tolist() == rows
    assert cut.group.tolist() == [i // 2 for i in rows]
    score = cut.scores["teacher"]
    assert score.logp is not None
    assert score.support is not None
    assert torch.equal(score.logp, -number.float())
    assert torch.equal(score.support, torch.stack([number, number + 1], -1))
    # Each even-numbered token has its hidden state, once, also where a row is repeated.
    placed = {int(t): float(s) for part in score.hidden for t, s in zip(part.tokens, part.states)}
    assert placed == {t: float(n) for t, n in enumerate(number.tolist()) if n % 2 == 0}


@settings(max_examples=40, deadline=None)
@given(nonempty, nonempty)
def test_cat_keeps_rows_and_separates_groups(left, right):
    joined = Rollouts.cat([rollouts(left, scored=False), rollouts(right, scored=False)])
    assert joined.response.tolist() == left + right
    assert len(joined.prompts) == len(left) + len(right)
    assert not set(joined.group[: len(left)].tolist()) & set(joined.group[len(left) :].tolist())
    assert joined.sequence["row"].tolist() == [*range(len(left)), *range(len(right))]


def test_cat_refuses_what_would_be_mixed_silently():
    one = rollouts([[1, 2]], scored=False)
    with pytest.raises(ValueError, match="before they are scored"):
        Rollouts.cat([one, rollouts([[1]])])
    with pytest.raises(ValueError, match="one temperature"):
        Rollouts.cat([one, rollouts([[1]], temperature=0.5, scored=False)])


def test_with_merges_columns_and_unknown_streams_are_named():
    batch = rollouts([[1, 2], [3]])
    more = batch.with_(token={"advantage": torch.zeros(3)}, reward=torch.ones(2))
    assert set(more.token) == {"number", "advantage"}
    assert set(batch.token) == {"number"}
    assert more.reward is not None
    assert more.reward.tolist() == [1.0, 1.0]
    assert torch.equal(batch.mask("student"), batch.by(Author.STUDENT))
    with pytest.raises(KeyError, match="even"):
        batch.mask("students")
