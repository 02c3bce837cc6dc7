"""The world of the quickstart and the league: a tiny base that slips, one expert per domain, and how models are measured."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from surpass.cli.stages import Stage, Stages
from surpass.config import DataConfig, OptimiserConfig, RolloutConfig, RunConfig, TrainConfig
from surpass.evaluate.evaluation import evaluate
from surpass.evaluate.summary import Evaluation
from surpass.judge.build import build_judge
from surpass.judge.verifiers import verifier_for
from surpass.methods.grpo import GRPO
from surpass.methods.sft import SFT
from surpass.models.policy import load_policy, save_policy
from surpass.models.zoo import char_tokenizer, save_tiny
from surpass.prompts.sources import load_prompts
from surpass.prompts.templates import render
from surpass.records import Ragged
from surpass.rollout.engine import Sampling
from surpass.rollout.local import LocalEngine
from surpass.tasks import task_prompts


@dataclass(frozen=True)
class Recipe:
    """Sizes and schedules. OPD and ExOPD share everything but lambda: steps, prompts, tokens and learning rate."""

    domains: tuple[str, ...] = ("sort", "missing")
    """Embedded tasks; one expert is trained for each."""
    hidden: int = 96
    layers: int = 2
    max_new_tokens: int = 12
    slip: float = 0.07
    """Share of characters of the base's training answers that are replaced: a base that knows the tasks but slips."""
    base_examples: int = 38_400
    base_batch: int = 96
    base_rate: float = 6e-3
    expert_steps: int = 30
    expert_prompts: int = 32
    expert_samples: int = 8
    expert_rate: float = 1e-4
    merge_steps: int = 100
    merge_prompts: int = 64
    merge_rate: float = 2e-3
    scales: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0, 2.5)
    """The sweep over lambda; 1 is OPD."""
    extrapolation: float = 1.5
    """lambda of the run that is called ExOPD."""
    expo_alphas: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Weight-space extrapolation; the first is the row called ExPO, all are in the sweep."""
    eval_prompts: int = 256
    eval_samples: int = 8


def write_base(recipe: Recipe, stages: Stages, seed: int) -> Path:
    """A random tiny model, fine-tuned on answers that slip: it knows the tasks, and fails them often enough."""
    blank = stages.make(
        "blank",
        Stage({"hidden": recipe.hidden, "layers": recipe.layers, "seed": seed}),
        lambda out: save_tiny(
            out, "qwen3", char_tokenizer(), hidden=recipe.hidden, layers=recipe.layers, seed=seed
        ),
    )
    data = stages.folder / "base_answers.jsonl"
    write_slipping_answers(recipe, data, seed)
    return stages.train("base", run_config(recipe, seed, blank, str(data), "base"), SFT())


def experts_of(recipe: Recipe, stages: Stages, seed: int, base: Path) -> dict[str, Path]:
    """One expert per domain, by GRPO from the base."""
    return {
        domain: stages.train(
            f"expert-{domain}",
            run_config(recipe, seed, base, f"embedded:{domain}", "expert"),
            GRPO(samples=recipe.expert_samples),
        )
        for domain in recipe.domains
    }


def write_slipping_answers(recipe: Recipe, path: Path, seed: int) -> None:
    """The base's training data: right answers in which each character slips with a small probability."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"slips/{seed}")
    with path.open("w") as file:
        for prompt in task_prompts("+".join(recipe.domains), recipe.base_examples, seed):
            answer = "".join(
                rng.choice("0123456789") if rng.random() < recipe.slip else c for c in str(prompt.answer)
            )
            file.write(
                json.dumps(
                    {
                        "id": prompt.id,
                        "prompt": list(prompt.messages),
                        "completion": answer,
                        "domain": prompt.domain,
                    }
                )
                + "\n"
            )


def run_config(recipe: Recipe, seed: int, student: Path, prompts: str, stage: str) -> RunConfig:
    """The settings of one stage: base, expert or merge."""
    steps, count, rate = {
        "base": (recipe.base_examples // recipe.base_batch, recipe.base_batch, recipe.base_rate),
        "expert": (recipe.expert_steps, recipe.expert_prompts, recipe.expert_rate),
        "merge": (recipe.merge_steps, recipe.merge_prompts, recipe.merge_rate),
    }[stage]
    schedule = "constant" if stage == "expert" else "cosine"
    return RunConfig(
        student=str(student),
        prompts=prompts,
        seed=seed,
        data=DataConfig(limit=None if stage == "base" else 4096),
        rollout=RolloutConfig(max_new_tokens=recipe.max_new_tokens, max_rows=1024),
        optimiser=OptimiserConfig(
            learning_rate=rate, schedule=schedule, warmup_steps=50 if stage == "base" else 5, beta2=0.95
        ),
        train=TrainConfig(
            steps=steps, prompts_per_step=count, sample_every=max(1, steps // 4), samples_kept=6
        ),
    )


def measure(recipe: Recipe, path: Path, seed: int) -> Evaluation:
    """pass@1 and pass@8 on held-out problems of every domain; the same problems and random numbers for all models."""
    policy = load_policy(str(path))
    count = recipe.eval_prompts * len(recipe.domains)
    prompts = load_prompts(
        "embedded:" + "+".join(recipe.domains), split="eval", limit=count, seed=1_000 + seed
    )
    prompts = list({str(p.messages): p for p in prompts}.values())
    judge = build_judge(prompts, verifier_for(prompts))
    ids = Ragged.from_list([render(p, policy.tokenizer) for p in prompts])
    sampling = Sampling(max_new_tokens=recipe.max_new_tokens)
    return evaluate(
        LocalEngine(policy, max_rows=1024),
        prompts,
        ids,
        judge,
        policy.tokenizer,
        n=recipe.eval_samples,
        sampling=sampling,
        ks=(1, recipe.eval_samples),
        seed=seed,
    )


def save_weights(like: Path, tensors: dict[str, torch.Tensor], out: Path) -> None:
    """A checkpoint with the architecture and tokenizer of `like` and other weights."""
    policy = load_policy(str(like))
    policy.model.load_state_dict(tensors, strict=False)
    save_policy(policy, out)
