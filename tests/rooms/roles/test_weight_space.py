import pytest
import torch
from world import policy  # pyright: ignore[reportMissingImports]

from surpass.learn.head import Head
from surpass.learn.targets import log_linear
from surpass.roles.weight_space import average, expo


def state(seed: int) -> dict[str, torch.Tensor]:
    return dict(policy(seed).model.state_dict())


def assert_same(found, expected) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


def test_equal_shares_by_default():
    expected = {name: (value + state(1)[name]) / 2 for name, value in state(0).items()}
    assert_same(average([state(0), state(1)]), expected)


def test_shares_weigh_the_models():
    found = average([state(0), state(1), state(2)], [0.5, 0.25, 0.25])
    expected = {n: 0.5 * v + 0.25 * state(1)[n] + 0.25 * state(2)[n] for n, v in state(0).items()}
    assert_same(found, expected)


def test_a_one_hot_share_is_that_model_bit_for_bit():
    found = average([state(0), state(1)], [0.0, 1.0])
    assert all(torch.equal(value, state(1)[name]) for name, value in found.items())


def test_the_average_does_not_depend_on_the_order():
    assert_same(average([state(0), state(1), state(2)]), average([state(2), state(0), state(1)]))


def test_dtypes_are_kept_and_integers_are_not_averaged():
    first = {"w": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor([3])}
    second = {"w": torch.zeros(2, dtype=torch.bfloat16), "n": torch.tensor([5])}
    found = average([first, second])
    assert found["w"].dtype == torch.bfloat16
    assert found["w"].tolist() == [0.5, 0.5]
    assert found["n"].tolist() == [3]


def test_extrapolation_by_nothing_is_the_average_and_the_base_is_not_read():
    assert_same(expo([state(0), state(1)], state(2), 0.0), average([state(0), state(1)]))


def test_extrapolation_of_one_expert():
    found = expo([state(0)], state(1), 0.5)
    assert_same(found, {n: 1.5 * v - 0.5 * state(1)[n] for n, v in state(0).items()})


def test_extrapolation_by_minus_one_is_the_base():
    assert_same(expo([state(0), state(2)], state(1), -1.0), state(1))


@pytest.mark.parametrize("scale", [0.5, 1.25, 2.0])
def test_for_linear_logits_extrapolation_is_the_log_linear_target(scale):
    generator = torch.Generator().manual_seed(0)
    teacher, base = (torch.randn(5, 3, generator=generator) for _ in range(2))
    hidden = torch.randn(4, 3, generator=generator)
    weight = expo([{"head": teacher}], {"head": base}, scale - 1)["head"]
    found = Head(weight).logits(hidden).log_softmax(-1)
    logps = [Head(w).logits(hidden).log_softmax(-1) for w in (teacher, base)]
    torch.testing.assert_close(found, log_linear(logps, [scale, 1 - scale]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shares", [[0.5, 0.6], [1.0], [0.5, 0.25, 0.25]], ids=str)
def test_shares_that_do_not_fit_are_an_error(shares):
    with pytest.raises(ValueError, match="2 shares that sum to 1"):
        average([state(0), state(1)], shares)


def test_other_parameters_are_an_error():
    other = {**state(1), "extra": torch.zeros(1)}
    with pytest.raises(ValueError, match="extra"):
        average([state(0), other])
    with pytest.raises(ValueError, match="different architectures"):
        expo([state(0)], other, 0.5)


def test_other_sizes_are_an_error():
    with pytest.raises(ValueError, match="different sizes"):
        average([state(0), dict(policy(0, vocabulary=5).model.state_dict())])
