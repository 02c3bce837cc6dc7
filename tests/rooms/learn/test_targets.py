import pytest
import torch
from rooms_learn import REFERENCE, STUDENT, TEACHER, close, gradient, logits, random_logp, row

from surpass.learn.divergence import Divergence, reverse_kl
from surpass.learn.targets import log_linear, log_linear_sampled, log_normaliser, mixture


@pytest.mark.parametrize(
    ("reward_scale", "probabilities", "log_z"),
    [
        (0.5, (0.555006, 0.296663, 0.148331), -0.047706),
        (1.0, (0.7, 0.2, 0.1), 0.0),
        (1.25, (0.761421, 0.159052, 0.079526), 0.055797),
        (2.0, (0.890909, 0.072727, 0.036364), 0.318454),
    ],
)
def test_extrapolated_target(reward_scale, probabilities, log_z):
    logps, weights = [row(TEACHER), row(REFERENCE)], [reward_scale, 1 - reward_scale]
    close(log_linear(logps, weights).exp()[0], probabilities)
    close(log_normaliser(logps, weights)[0], log_z)


def test_sampled_form_and_its_expected_gradient():
    leaf = logits()
    logp = leaf.log_softmax(-1)
    sampled = log_linear_sampled([row(TEACHER)[0], row(REFERENCE)[0]], [1.25, -0.25])
    advantage = sampled - row(STUDENT)[0]
    close(advantage, (0.476376, -0.578752, -0.866434))
    ascent = gradient((STUDENT * advantage * logp[0]), leaf)
    close(ascent, (0.292550, -0.141008, -0.151542))
    target = log_linear([row(TEACHER), row(REFERENCE)], [1.25, -0.25])
    close(ascent, -gradient(reverse_kl(leaf.log_softmax(-1), target), leaf), rtol=0, atol=1e-14)
    # E[A] = log Z - KL(student || target)
    expected = log_normaliser([row(TEACHER), row(REFERENCE)], [1.25, -0.25]) - reverse_kl(
        row(STUDENT), target
    )
    close((STUDENT * advantage).sum(), expected[0], rtol=0, atol=1e-14)


def test_a_role_alone_is_returned_bit_for_bit():
    teacher, poison = random_logp(5, 7).float(), torch.full((5, 7), torch.nan)
    assert torch.equal(log_linear([teacher, poison], [1.0, 0.0]), teacher)
    per_token = log_linear([teacher, poison], [torch.ones(5), torch.zeros(5)])
    assert torch.equal(per_token, teacher)
    assert torch.equal(log_normaliser([teacher, poison], [1.0, 0.0]), torch.zeros(5))
    assert torch.equal(log_linear_sampled([teacher[:, 0], poison[:, 0]], [1.0, 0.0]), teacher[:, 0])


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf, torch.inf])
def test_nothing_leaks_from_positions_of_weight_zero(bad):
    teacher, reference = random_logp(4, 6), random_logp(4, 6, seed=1)
    scale = torch.tensor([1.0, 1.25, 1.0, 2.0], dtype=torch.float64)
    clean = log_linear([teacher, reference], [scale, 1 - scale])
    reference[[0, 2]] = bad
    assert torch.equal(log_linear([teacher, reference], [scale, 1 - scale]), clean)
    assert torch.equal(clean[[0, 2]], teacher[[0, 2]])
    for i, value in enumerate(scale.tolist()):
        alone = log_linear([teacher[i : i + 1], reference[i : i + 1]], [value, 1 - value])
        close(clean[i : i + 1], alone, rtol=0, atol=1e-14)


def test_gradient_of_a_weight_is_clean_where_it_is_zero():
    weight = torch.tensor([0.0, 0.5], dtype=torch.float64, requires_grad=True)
    reference = random_logp(2, 4)
    reference[0] = torch.nan
    value = log_linear([random_logp(2, 4, seed=1), reference], [1.0, weight])
    assert gradient(value, weight).isfinite().all()


def test_a_token_the_teacher_excludes_stays_excluded():
    teacher = torch.tensor([[0.6, 0.4, 0.0]], dtype=torch.float64).log()
    for reference in (row(REFERENCE), torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()):
        target = log_linear([teacher, reference], [1.25, -0.25]).exp()
        assert target[0, 2] == 0
        close(target.sum(), 1.0, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="negative weight"):
        log_linear([row(TEACHER), teacher], [1.25, -0.25])


def test_extreme_logits_stay_finite():
    sharp = torch.tensor([[1e4, -1e4, 0.0]]).log_softmax(-1)
    flat = torch.zeros(1, 3).log_softmax(-1)
    target = log_linear([sharp, flat], [1.25, -0.25])
    assert target.isfinite().all()
    for kind, parameter in [
        ("forward_kl", None),
        ("reverse_kl", None),
        ("jsd", 0.5),
        ("skew_reverse_kl", 0.1),
    ]:
        leaf = torch.tensor([[-1e4, 1e4, 0.0]], requires_grad=True)
        value = Divergence(kind, parameter)(leaf.log_softmax(-1), target)
        assert value.isfinite().all()
        assert gradient(value, leaf).isfinite().all()


def test_mixture_is_arithmetic_and_checked():
    teacher, student = random_logp(3, 5), random_logp(3, 5, seed=1)
    close(
        mixture([teacher, student], [0.3, 0.7]).exp(),
        0.3 * teacher.exp() + 0.7 * student.exp(),
        rtol=0,
        atol=1e-14,
    )
    with pytest.raises(ValueError, match="sum to 1"):
        mixture([teacher, student], [0.5, 0.6])
    with pytest.raises(ValueError, match=">= 0"):
        mixture([teacher, student], [-0.5, 1.5])


def test_no_role_left_is_an_error():
    with pytest.raises(ValueError, match="all target weights are 0"):
        log_linear([random_logp(1, 3)], [0.0])
    with pytest.raises(ValueError, match="one weight per role"):
        log_linear([random_logp(1, 3)], [0.5, 0.5])


def test_a_weight_of_one_beside_another_is_normalised():
    teacher, reference, weight = random_logp(3, 5), random_logp(3, 5, seed=1), torch.full((3,), 0.5)
    found = log_linear([teacher, reference], [torch.ones(3), weight])
    close(found.exp().sum(-1), torch.ones(3), rtol=0, atol=1e-14)
    close(found, log_linear([teacher, reference], [1.0, 0.5]), rtol=0, atol=1e-14)
