"""Fixtures of whole runs."""

import os
from pathlib import Path

import pytest
from tiny_runs import Checkpoints, make_checkpoints

REPOSITORY = Path(__file__).parents[2]
DATA = Path(os.environ.get("SURPASS_DATA", REPOSITORY.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return make_checkpoints(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def gsm8k() -> str:
    path = DATA / "gsm8k" / "train.jsonl"
    if not path.is_file():
        pytest.skip(f"needs gsm8k/train.jsonl below SURPASS_DATA (looked in {DATA})")
    return str(path)
