import pytest
import torch
from world import policy  # pyright: ignore[reportMissingImports]

from surpass.models.policy import Policy
from surpass.roles.role import snapshot
from surpass.roles.sync import CopyEvery, Ema, Frozen, Live


def weights(reader: Policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in reader.model.parameters()])


def fill(reader: Policy, value: float) -> None:
    with torch.no_grad():
        for p in reader.model.parameters():
            p.fill_(value)


def test_a_frozen_role_stays():
    role, before = policy(1), weights(policy(1))
    Frozen().after_update(role, policy(0), 1)
    assert torch.equal(weights(role), before)


def test_the_moving_average_follows_its_recursion():
    role, student = policy(1), policy(0)
    expected = weights(role)
    for update in range(1, 4):
        fill(student, float(update))
        Ema(0.75).after_update(role, student, update)
        expected = 0.75 * expected + 0.25 * update
        torch.testing.assert_close(weights(role), expected)


@pytest.mark.parametrize(("keep", "whose"), [(0.0, 0), (1.0, 1)])
def test_ends_of_the_moving_average_are_a_copy_and_a_frozen_role(keep, whose):
    role = policy(1)
    Ema(keep).after_update(role, policy(0), 1)
    assert torch.equal(weights(role), weights(policy(whose)))


def test_the_moving_average_leaves_the_student_alone():
    student = policy(0)
    Ema(0.5).after_update(policy(1), student, 1)
    assert torch.equal(weights(student), weights(policy(0)))


def test_a_copy_is_taken_at_every_so_many_updates():
    role, student, found = policy(1), policy(0), []
    fill(role, 0.0)
    for update in range(1, 8):
        fill(student, float(update))
        CopyEvery(3).after_update(role, student, update)
        found.append(float(weights(role)[0]))
    assert found == [0.0, 0.0, 3.0, 3.0, 3.0, 6.0, 6.0]


def test_a_live_role_is_the_student_itself():
    student = policy(0)
    Live().after_update(student, student, 1)
    Live().after_update(Policy(student.model, student.tokenizer, "same model"), student, 1)
    with pytest.raises(ValueError, match="on the student's own policy"):
        Live().after_update(policy(0), student, 1)


def test_a_snapshot_is_a_frozen_copy():
    student = policy(0)
    copy = snapshot(student)
    fill(student, 1.0)
    assert torch.equal(weights(copy), weights(policy(0)))
    assert not any(p.requires_grad for p in copy.model.parameters())
    assert all(p.requires_grad for p in student.model.parameters())


@pytest.mark.parametrize("keep", [-0.1, 1.1])
def test_a_share_outside_zero_and_one_is_an_error(keep):
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        Ema(keep)


def test_a_period_below_one_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        CopyEvery(0)
