import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rooms_learn import close, gradient

from surpass.learn.aggregate import Loss, Term, denominator, denominators, reduce
from surpass.records import Ragged

REDUCTIONS = [
    ("token_mean", None),
    ("sequence_mean", None),
    ("sequence_sum", None),
    ("constant_length", 7),
    ("joint", None),
]
EXACT = {"rtol": 0.0, "atol": 1e-12}


def step(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.rand(sum(lengths), generator=generator) < 0.6
    mask[0] = True
    return values, Ragged.from_lengths(mask, torch.tensor(lengths))


def by_hand(values, mask, reduction, horizon):
    rows = [(values[mask.owner == i], mask[i]) for i in range(len(mask)) if mask[i].any()]
    if reduction in ("token_mean", "joint"):
        return torch.cat([v[m] for v, m in rows]).mean()
    if reduction == "sequence_mean":
        return torch.stack([v[m].mean() for v, m in rows]).mean()
    return torch.stack([v[m].sum() for v, m in rows]).mean() / (horizon or 1)


@pytest.mark.parametrize(("reduction", "horizon"), REDUCTIONS)
@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=7), data=st.data())
def test_any_split_gives_the_same_loss_and_gradient(reduction, horizon, lengths, data):
    lengths[0] = max(lengths[0], 1)
    values, mask = step(lengths, seed=data.draw(st.integers(0, 99)))
    order = torch.tensor(data.draw(st.permutations(range(len(lengths)))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(lengths)))))
    parts = [p for p in order.tensor_split(cuts) if len(p)]
    whole = by_hand(values, mask, reduction, horizon)
    # Each part first says what it adds to the denominator, as micro-batches and ranks do.
    micro = [(values[mask.tokens_of(p)], mask.select(p)) for p in parts]
    total = torch.stack([denominator(m, reduction, horizon) for _, m in micro]).sum()
    found = torch.stack([reduce(v, m, reduction, total) for v, m in micro]).sum()
    close(found, whole, **EXACT)
    close(gradient(found, values), gradient(whole, values), **EXACT)


def test_equal_lengths_make_the_means_equal():
    values, _ = step([4, 4, 4])
    mask = Ragged.from_lengths(torch.ones(12, dtype=torch.bool), torch.tensor([4, 4, 4]))
    found = {r: reduce(values, mask, r, denominator(mask, r, h)) for r, h in REDUCTIONS}  # type: ignore[arg-type]
    close(found["sequence_mean"], found["token_mean"], **EXACT)
    close(found["constant_length"], found["token_mean"] * 4 / 7, **EXACT)
    close(found["sequence_sum"], found["token_mean"] * 4, **EXACT)


def test_unequal_lengths_weigh_tokens_by_row_under_sequence_mean():
    mask = Ragged.from_lengths(torch.ones(5, dtype=torch.bool), torch.tensor([1, 4]))
    values = torch.zeros(5, requires_grad=True)
    found = reduce(values, mask, "sequence_mean", denominator(mask, "sequence_mean"))
    assert gradient(found, values).tolist() == [0.5, 0.125, 0.125, 0.125, 0.125]


def test_joint_terms_share_one_denominator():
    lengths = torch.tensor([2, 3])
    masks = {
        "reward": Ragged.from_lengths(torch.tensor([True, True, False, False, False]), lengths),
        "teacher": Ragged.from_lengths(torch.tensor([False, False, True, True, True]), lengths),
    }
    terms = [Term(name, torch.ones(5, requires_grad=True), name, "joint") for name in masks]
    alone = Term("alone", terms[0].values, "reward", "token_mean")
    found = denominators([*(t.key for t in terms), alone.key], masks)
    assert [float(found[t.key]) for t in (*terms, alone)] == [5.0, 5.0, 2.0]
    contributions = [t.contribution(masks[t.stream], found[t.key]).item() for t in terms]
    assert contributions == pytest.approx([0.4, 0.6])


def test_values_outside_the_mask_are_never_read():
    mask = Ragged.from_lengths(torch.tensor([True, False, True]), torch.tensor([2, 1]))
    values = torch.tensor([1.0, torch.nan, 3.0], requires_grad=True)
    for reduction, horizon in REDUCTIONS:
        found = reduce(values, mask, reduction, denominator(mask, reduction, horizon))  # type: ignore[arg-type]
        assert found.isfinite()
        assert gradient(found, values)[1] == 0


def test_errors_say_what_is_wrong():
    empty = Ragged.from_lengths(torch.zeros(3, dtype=torch.bool), torch.tensor([1, 2]))
    for reduction, horizon in REDUCTIONS:
        nothing = denominator(empty, reduction, horizon)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="stream 'tool'"):
            reduce(torch.ones(3), empty, reduction, nothing, "tool")  # type: ignore[arg-type]
    one = Ragged.from_lengths(torch.ones(3, dtype=torch.bool), torch.tensor([3]))
    with pytest.raises(ValueError, match="expected 3 per-token values, found 2"):
        reduce(torch.ones(2), one, "token_mean", torch.tensor(3.0))
    with pytest.raises(ValueError, match="unknown reduction 'mean'"):
        denominator(one, "mean")  # type: ignore[arg-type]
    for reduction, horizon in [("constant_length", None), ("constant_length", 0), ("token_mean", 5)]:
        with pytest.raises(ValueError, match="horizon"):
            denominator(one, reduction, horizon)  # type: ignore[arg-type]
    values = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="different names"):
        Loss((Term("a", values), Term("a", values)))


def test_a_constant_is_refused_as_a_loss():
    mask = Ragged.from_lengths(torch.tensor([True, False]), torch.tensor([2]))
    term = Term("distil", torch.ones(2))
    with pytest.raises(ValueError, match="'distil' has no gradient"):
        term.contribution(mask, torch.tensor(1.0))
    with torch.no_grad():
        assert term.contribution(mask, torch.tensor(1.0)).item() == 1.0
    # A micro-batch without tokens of the stream has nothing to differentiate.
    none = mask.like(torch.zeros(2, dtype=torch.bool))
    assert term.contribution(none, torch.tensor(1.0)).item() == 0.0
