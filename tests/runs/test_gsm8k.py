"""Real word problems through whole runs: BPE tokenizers, chat templates, two architectures, random weights.

A random model of this size solves nothing; what it can do is follow the gradient, and that is what is asked of it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import config, metrics, run, write_lines

from surpass.methods.exopd import ExOPD
from surpass.methods.grpo import GRPO
from surpass.methods.sft import SFT
from surpass.models.zoo import bpe_tokenizer, save_tiny

ARCHITECTURES = ["qwen3", "llama"]


@pytest.fixture(scope="module")
def problems(gsm8k: str) -> list[dict[str, str]]:
    """The shortest eight problems, so that memorising them takes a minute of nobody's time."""
    rows = [json.loads(line) for line in Path(gsm8k).read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: (len(row["question"]) + len(row["answer"]), row["question"]))[:8]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def models(
    request: pytest.FixtureRequest, problems: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str]:
    """A student and a teacher of one architecture over one BPE vocabulary learnt from the problems."""
    tokenizer = bpe_tokenizer([row["question"] + row["answer"] for row in problems], 512)
    folder = tmp_path_factory.mktemp(request.param)
    paths = [
        save_tiny(
            folder / name,
            request.param,
            tokenizer,
            hidden=32,
            heads=4,
            layers=1,
            seed=seed,
            max_position_embeddings=512,
            initializer_range=0.2,
        )
        for seed, name in enumerate(("student", "teacher"))
    ]
    return str(paths[0]), str(paths[1])


def test_sft_memorises_eight_solutions(
    models: tuple[str, str], problems: list[dict[str, str]], tmp_path: Path
) -> None:
    rows = [{"question": row["question"], "response": row["answer"]} for row in problems]
    file = write_lines(tmp_path / "eight.jsonl", rows)
    settings = config(
        models[0],
        tmp_path / "run",
        prompts=file,
        **{"train.steps": 40, "train.prompts_per_step": 8, "rollout.max_new_tokens": 128, "data.limit": None},
    )
    losses = [row["loss"] for row in metrics(run(settings, SFT()))]
    # Cross-entropy begins near log 512 = 6.2 nats; eight texts are learnt to a fifth of that by heart.
    assert losses[0] > 5.0
    assert losses[-1] < losses[0] / 5


def test_full_exopd_lowers_the_divergence_to_its_target(
    models: tuple[str, str], problems: list[dict[str, str]], tmp_path: Path
) -> None:
    """The same prompts again and again: reverse KL to teacher^1.25 reference^-0.25 has to fall."""
    file = write_lines(tmp_path / "eight.jsonl", list(problems))
    settings = config(
        models[0],
        tmp_path / "run",
        prompts=file,
        teacher=models[1],
        **{
            "data.preset": "gsm8k",
            "data.limit": None,
            "train.steps": 30,
            "train.prompts_per_step": 8,
            "rollout.max_new_tokens": 24,
        },
    )
    rows = metrics(run(settings, ExOPD(estimator="full", samples=2)))
    divergence = [row["reverse_kl"] for row in rows]
    assert divergence[0] > 0.5
    # One layer cannot reach the target of another; it comes down by half and stays there.
    assert sum(divergence[-5:]) / 5 < 0.65 * divergence[0]
    # It goes towards the teacher and away from where it began, and both are measured on the way.
    assert rows[-1]["tokens/scored"] == 2 * rows[-1]["tokens/generated"]


def test_grpo_raises_a_reward_it_can_reach(
    models: tuple[str, str], problems: list[dict[str, str]], tmp_path: Path
) -> None:
    """Right answers are out of reach, digits are not: their share in the answer rises, judged beside the verifier."""
    file = write_lines(tmp_path / "eight.jsonl", list(problems))
    (tmp_path / "own.py").write_text(
        "def digits(completions, **_):\n"
        "    texts = [turns[-1]['content'] for turns in completions]\n"
        "    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in texts]\n"
    )
    settings = config(
        models[0],
        tmp_path / "run",
        prompts=file,
        **{
            "data.preset": "gsm8k",
            "data.limit": None,
            "judge.rewards": {f"{tmp_path / 'own.py'}:digits": 1.0},
            "train.steps": 20,
            "train.prompts_per_step": 8,
            "rollout.max_new_tokens": 12,
            "optimiser.learning_rate": 3e-2,
        },
    )
    rows = metrics(run(settings, GRPO(samples=8)))
    digits = [row["reward/digits"] for row in rows]
    assert sum(digits[-3:]) / 3 > sum(digits[:3]) / 3 + 0.2
    assert {"reward/math", "judge/math/timeouts"} <= set(rows[0])
