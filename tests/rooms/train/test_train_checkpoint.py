"""Checkpoints appear whole or not at all, only the newest are kept, and they restore what was saved."""

from pathlib import Path

import pytest
import torch
from world import policy

import surpass.train.checkpoint as module
from surpass.models.policy import Lora, Policy, add_lora
from surpass.train.checkpoint import (
    CheckpointError,
    Position,
    checkpoints,
    latest_checkpoint,
    load_position,
    restore,
    save_checkpoint,
    save_model,
)


def stepped(student: Policy) -> torch.optim.AdamW:
    """An optimiser that has moved every trainable weight once."""
    trainable = [p for p in student.model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimiser.step()
    return optimiser


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_weights_moments_roles_generators_and_position_come_back(tmp_path: Path) -> None:
    student, role = policy(0), policy(1)
    optimiser = stepped(student)
    position = Position(3, 1, 7, {"generated": 5}, {"drawn": {"": 12}}, {"seen": 4}, {"x": 0.1}, {"seed": 0})
    torch.manual_seed(5)
    where = save_checkpoint(tmp_path, student, optimiser, position, {"anchor": role}, None, keep=1)
    drawn = torch.rand(3)
    fresh, moved = policy(2), policy(3)
    other = torch.optim.AdamW(fresh.model.parameters(), lr=0.1)
    found, buffer = restore(where, fresh, other, {"anchor": moved})
    assert found == position and buffer is None
    assert torch.equal(torch.rand(3), drawn)
    for mine, theirs in ((student, fresh), (role, moved)):
        for a, b in zip(mine.model.parameters(), theirs.model.parameters(), strict=True):
            assert torch.equal(a, b)
    before, after = optimiser.state_dict()["state"], other.state_dict()["state"]
    assert sorted(before) == sorted(after)
    for index, moments in before.items():
        assert all(torch.equal(moments[key], after[index][key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_rates_come_from_the_present_settings(tmp_path: Path) -> None:
    student = policy(0)
    where = save_checkpoint(tmp_path, student, stepped(student), Position(), {}, None, keep=1)
    other = torch.optim.AdamW(student.model.parameters(), lr=0.5)
    restore(where, student, other, {})
    assert other.param_groups[0]["lr"] == 0.5


def test_an_adapter_comes_back_and_the_base_is_not_written(tmp_path: Path) -> None:
    student = add_lora(policy(0), Lora(rank=2))
    optimiser = stepped(student)
    where = save_checkpoint(tmp_path, student, optimiser, Position(), {}, None, keep=1)
    assert (where / "model" / "adapter_model.safetensors").exists()
    assert not (where / "model" / "model.safetensors").exists()
    fresh = add_lora(policy(0), Lora(rank=2))
    restore(where, fresh, torch.optim.AdamW([p for p in fresh.model.parameters() if p.requires_grad]), {})
    for (name, a), (_, b) in zip(
        student.model.named_parameters(), fresh.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    student = policy(0)
    optimiser = stepped(student)
    for step, update in ((2, 0), (2, 1), (10, 0), (9, 3)):
        save_checkpoint(tmp_path, student, optimiser, Position(step, update), {}, None, keep=2)
    assert names(tmp_path) == ["step_000009_update_0003", "step_000010"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000010"
    save_checkpoint(tmp_path, student, optimiser, Position(11), {}, None, keep=0)
    assert len(names(tmp_path)) == 3


def test_a_position_inside_a_batch_is_newer_than_its_beginning(tmp_path: Path) -> None:
    student = policy(0)
    optimiser = stepped(student)
    for update in (0, 1, 12):
        save_checkpoint(tmp_path, student, optimiser, Position(4, update), {}, None, keep=9)
    assert [path.name for path in checkpoints(tmp_path)][-1] == "step_000004_update_0012"


def test_what_a_killed_run_left_half_written_is_not_a_checkpoint(tmp_path: Path) -> None:
    student = policy(0)
    optimiser = stepped(student)
    whole = save_checkpoint(tmp_path, student, optimiser, Position(1), {}, None, keep=2)
    half = tmp_path / ".step_000002.unfinished"
    half.mkdir()
    (half / "optimiser.safetensors").write_bytes(b"half")
    (tmp_path / "step_000003").mkdir()  # a folder without state.json, however it came there
    assert checkpoints(tmp_path) == [whole]
    made = save_checkpoint(tmp_path, student, optimiser, Position(2), {}, None, keep=2)
    assert latest_checkpoint(tmp_path) == made and not half.exists()


@pytest.mark.parametrize("step", [1, 2])
def test_a_failure_while_writing_leaves_the_older_one_as_it_was(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 1 is written anew over itself, step 2 beside it: in both cases the first stays readable."""
    student = policy(0)
    optimiser = stepped(student)
    first = save_checkpoint(tmp_path, student, optimiser, Position(1, updates=1), {}, None, keep=1)
    before = {p: p.read_bytes() for p in sorted(first.rglob("*")) if p.is_file()}

    def broken(*given: object) -> None:
        raise RuntimeError("a part of it cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_save_optimiser", broken)
        with pytest.raises(CheckpointError, match="a part of it cannot be written") as error:
            save_checkpoint(tmp_path, student, optimiser, Position(step, updates=9), {}, None, keep=1)
    assert str(first) in str(error.value)
    assert {p: p.read_bytes() for p in sorted(first.rglob("*")) if p.is_file()} == before
    assert names(tmp_path) == ["step_000001"]


def test_a_model_replaces_the_older_one_only_when_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(policy(0), tmp_path / "model", tmp_path / "checkpoints")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_policy", lambda *given: 1 / 0)
        with pytest.raises(CheckpointError, match="There is no earlier checkpoint"):
            save_model(policy(1), tmp_path / "model", tmp_path / "checkpoints")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    save_model(policy(1), tmp_path / "model", tmp_path / "checkpoints")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() != before
    assert names(tmp_path) == ["model"]


def test_what_is_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint of a run"):
        load_position(tmp_path)
    (tmp_path / "state.json").write_text('{"step": 1, "unknown": 2}')
    with pytest.raises(CheckpointError, match="unknown"):
        load_position(tmp_path)


def test_another_vocabulary_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    student = policy(0)
    where = save_checkpoint(tmp_path, student, stepped(student), Position(), {}, None, keep=1)
    other = policy(0, vocabulary=6)
    before = [p.clone() for p in other.model.parameters()]
    with pytest.raises(CheckpointError, match="of another shape"):
        restore(where, other, torch.optim.AdamW(other.model.parameters()), {})
    assert all(torch.equal(a, b) for a, b in zip(before, other.model.parameters(), strict=True))
