"""The Python of the guide runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from surpass.methods.registry import METHODS

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", ["concepts.md", "python.md"])
def test_the_snippets_of_a_page_run_one_after_the_other(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(ROOT / "docs" / name)
    assert blocks
    namespace: dict[str, object] = {}
    for i, block in enumerate(blocks):
        exec(compile(block, f"{name}, snippet {i + 1}", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_of_the_project_lead_somewhere(page: Path):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    local = [t for t in targets if not t.startswith(("http://", "https://"))]
    assert [t for t in local if not (page.parent / t).exists()] == []


def test_the_readme_lists_every_method():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(rows) == sorted(METHODS)


def test_the_method_of_the_readme_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from surpass.cli.main import main
    from surpass.models.zoo import save_tiny

    monkeypatch.chdir(tmp_path)
    own = next(block for block in python_blocks(ROOT / "README.md") if "class Sharpened" in block)
    (tmp_path / "sharpened.py").write_text(own)
    save_tiny("base")
    save_tiny("expert", seed=1)
    settings = [
        "--student",
        "base",
        "--teacher",
        "expert",
        "--prompts",
        "embedded:sort",
        "--output",
        "runs/own",
    ]
    sizes = ["--rollout.max_new_tokens", "8", "--train.steps", "2", "--train.prompts_per_step", "4"]
    assert main(["train", "sharpened.py:Sharpened", *settings, *sizes, "--method.sharpness", "1.5"]) == 0
    assert (tmp_path / "runs" / "own" / "model" / "model.safetensors").exists()
