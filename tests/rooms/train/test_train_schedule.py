"""Learning rate, the order of updates, and what AdamW decays."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surpass.config import OptimiserConfig
from surpass.train.loop import update_rows
from surpass.train.optimiser import learning_rate, make_optimiser, set_learning_rate


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    config = OptimiserConfig(learning_rate=4.0, warmup_steps=4)
    assert [learning_rate(config, step, 10) for step in range(6)] == [1.0, 2.0, 3.0, 4.0, 4.0, 4.0]


def test_linear_and_cosine_decay_by_hand() -> None:
    linear = OptimiserConfig(learning_rate=8.0, schedule="linear")
    assert [learning_rate(linear, step, 4) for step in range(5)] == [8.0, 6.0, 4.0, 2.0, 0.0]
    cosine = OptimiserConfig(learning_rate=8.0, schedule="cosine", warmup_steps=2)
    found = [learning_rate(cosine, step, 6) for step in range(7)]
    # 0.5 (1 + cos(pi s)) at s = 0, 1/4, 1/2, 3/4, 1 after two steps of warm-up.
    half = 2**0.5 / 2
    assert found == pytest.approx([4, 8, 8, 4 * (1 + half), 4, 4 * (1 - half), 0], abs=1e-12)


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(0, 5),
    st.integers(1, 30),
)
def test_after_warm_up_the_rate_never_rises_and_stays_in_bounds(
    schedule: str, warmup: int, steps: int
) -> None:
    config = OptimiserConfig(learning_rate=1.0, schedule=schedule, warmup_steps=warmup)  # type: ignore[arg-type]
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    decaying = rates[warmup:]
    assert decaying == sorted(decaying, reverse=True)


def test_vectors_are_not_decayed_and_frozen_weights_not_touched() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1))
    model[2].requires_grad_(False)
    optimiser = make_optimiser(model, OptimiserConfig(weight_decay=0.1))
    decayed, plain = optimiser.param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(3, 2)] and decayed["weight_decay"] == 0.1
    assert [tuple(p.shape) for p in plain["params"]] == [(3,), (3,), (3,)] and plain["weight_decay"] == 0.0
    set_learning_rate(optimiser, 0.25)
    assert {group["lr"] for group in optimiser.param_groups} == {0.25}


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no trainable parameters; check model.lora.targets"):
        make_optimiser(torch.nn.Linear(1, 1).requires_grad_(False), OptimiserConfig())


def test_one_update_takes_the_batch_as_it_is() -> None:
    (rows,) = update_rows(5, 1, 1, seed=0, step=0)
    assert rows.tolist() == [0, 1, 2, 3, 4]


@given(st.integers(1, 12), st.integers(1, 3), st.data())
def test_every_epoch_has_every_answer_once(count: int, epochs: int, data: st.DataObject) -> None:
    parts = update_rows(count, epochs, minibatches := data.draw(st.integers(1, count)), seed=1, step=2)
    per_epoch = len(parts) // epochs
    assert per_epoch == minibatches and all(len(rows) for rows in parts)
    for epoch in range(epochs):
        rows = torch.cat(parts[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert sorted(rows.tolist()) == list(range(count))


def test_the_order_depends_on_seed_step_and_epoch_alone() -> None:
    def order(seed: int, step: int) -> list[list[int]]:
        return [rows.tolist() for rows in update_rows(8, 2, 2, seed, step)]

    torch.manual_seed(1)
    first = order(0, 0)
    torch.manual_seed(2)
    assert order(0, 0) == first
    assert order(1, 0) != first != order(0, 1)
    assert first[:2] != first[2:]


@pytest.mark.parametrize("minibatches", range(1, 9))
def test_as_many_updates_as_were_asked_for(minibatches: int) -> None:
    sizes = [len(rows) for rows in update_rows(8, 1, minibatches, seed=0, step=0)]
    assert len(sizes) == minibatches and max(sizes) - min(sizes) <= 1
