"""Where real data lies if there is any."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("SURPASS_DATA", REPOSITORY.parent / "shared" / "data"))


@pytest.fixture
def gsm8k() -> Path:
    path = DATA / "gsm8k" / "train.jsonl"
    if not path.is_file():
        pytest.skip(f"needs gsm8k/train.jsonl below SURPASS_DATA (looked in {DATA})")
    return path
