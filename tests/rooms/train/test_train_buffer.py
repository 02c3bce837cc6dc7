"""A rollout batch comes back from disk bit for bit, whatever columns it has."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from surpass.records import Hidden, Prompt, Ragged, Rollouts, Scores
from surpass.train.buffer import load_rollouts, save_rollouts


def batch(full: bool = True) -> Rollouts:
    """Three answers (one empty, one of several authors) with every column there is, or with the necessary ones."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    prompts = (
        Prompt(
            "a", ({"role": "user", "content": "sort 21"},), answer="12", tags=("easy",), parents=("p", "q")
        ),
        Prompt(
            "b", "plain text ☂ \u2028", answer=["1", "one"], privileged={"hint": "h"}, columns={"level": 3}
        ),
        Prompt("c", "x", response="y", domain="code"),
    )
    needed = Rollouts(
        prompts=prompts,
        prompt_ids=Ragged.from_list([[1, 2], [3], [4, 5, 6]], torch.int64),
        response=Ragged.from_list([[7, 2], [], [8, 9, 2]], torch.int64),
        author=torch.tensor([0, 0, 1, 2, 3], dtype=torch.int8),
        sampler_logp=torch.tensor([-0.1, float("nan"), float("-inf"), -0.0, 1e-42]),
        group=torch.tensor([0, 0, 1]),
        finish=torch.tensor([0, 1, 2]),
        version=torch.tensor([3, 3, 4]),
        temperature=0.7,
    )
    if not full:
        return needed
    hidden = (
        Hidden(torch.tensor([0, 1]), noise(2, 4).to(torch.bfloat16), "teacher/a"),
        Hidden(torch.tensor([2, 3, 4]), noise(3, 6), "teacher/b"),
    )
    return needed.with_(
        turn=torch.tensor([0, 0, 0, 1, 1]),
        reward=torch.tensor([1.0, float("nan"), 0.0]),
        feedback=("good", "", "no"),
        components={"math/exact": noise(3)},
        scores={
            "teacher": Scores(
                logp=noise(5),
                entropy=noise(5),
                top1=noise(5),
                support=torch.arange(10).view(5, 2),
                support_logp=noise(5, 2),
                hidden=hidden,
            ),
            "old": Scores(logp=noise(5)),
            "nothing": Scores(),
        },
        token={"support_valid": torch.tensor([True, False, True, True, False]), "weight": noise(5).double()},
        sequence={"advantage": noise(3)},
        masks={"trained": torch.tensor([True, True, False, False, True])},
    )


def same(first: object, second: object) -> None:
    """Equal in type, shape, dtype and every bit."""
    if isinstance(first, Tensor):
        assert isinstance(second, Tensor) and first.dtype == second.dtype and first.shape == second.shape
        # Bytes, so that NaNs and the sign of zero count.
        assert torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
    elif isinstance(first, dict):
        assert isinstance(second, dict) and set(first) == set(second)
        for key, value in first.items():
            same(value, second[key])  # type: ignore[index]
    elif isinstance(first, tuple):
        assert isinstance(second, tuple) and len(first) == len(second)
        for mine, theirs in zip(first, second, strict=True):
            same(mine, theirs)
    elif isinstance(first, Ragged | Rollouts | Scores | Hidden | Prompt):
        assert type(first) is type(second)
        for field in fields(first):
            same(getattr(first, field.name), getattr(second, field.name))
    else:
        assert first == second and type(first) is type(second)


@pytest.mark.parametrize("full", [True, False])
def test_every_column_comes_back(full: bool, tmp_path: Path) -> None:
    save_rollouts(batch(full), tmp_path)
    loaded = load_rollouts(tmp_path)
    assert loaded is not None
    same(batch(full), loaded)


def test_a_selection_of_rows_comes_back(tmp_path: Path) -> None:
    """Selected tensors may be views into larger ones; only what belongs to them is written."""
    rows = batch().select(torch.tensor([2, 0]))
    save_rollouts(rows, tmp_path)
    same(rows, load_rollouts(tmp_path))


def test_no_batch_is_none(tmp_path: Path) -> None:
    assert load_rollouts(tmp_path) is None


def test_nothing_is_pickled(tmp_path: Path) -> None:
    save_rollouts(batch(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rollouts.json", "rollouts.safetensors"]
