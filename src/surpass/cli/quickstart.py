"""surpass quickstart: train experts by RL, then distil them on-policy into one student that outgrows them. No download.

Reads from top to bottom: `main` parses, `quickstart` repeats the experiment over seeds and writes the results,
`experiment` is the experiment itself. Every stage is an ordinary run of `surpass.train`, kept in its own folder and
reused by the next call where nothing it depends on has changed.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from surpass.cli.stages import Stage, Stages
from surpass.config import DataConfig, ModelConfig, OptimiserConfig, RolloutConfig, RunConfig, TrainConfig
from surpass.evaluate.evaluation import evaluate
from surpass.evaluate.pooling import pooled_row
from surpass.evaluate.summary import Evaluation
from surpass.judge.build import build_judge
from surpass.judge.verifiers import verifier_for
from surpass.methods.exopd import ExOPD
from surpass.methods.grpo import GRPO
from surpass.methods.opd import OPD
from surpass.methods.sft import SFT
from surpass.models.policy import load_policy, save_policy
from surpass.models.zoo import char_tokenizer, save_tiny
from surpass.prompts.sources import load_prompts
from surpass.prompts.templates import render
from surpass.records import Ragged
from surpass.report.page import write_quickstart_report
from surpass.report.tables import results_table
from surpass.roles.weight_space import average, expo
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
    expo_alpha: float = 0.5
    eval_prompts: int = 256
    eval_samples: int = 8


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="surpass quickstart",
        description="Experts by RL, merged on-policy into one student that outgrows them. Needs no download.",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        help="repeat the whole experiment this many times and report the spread",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/quickstart"), help="folder of results, runs and report"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    given = parser.parse_args(arguments)
    if given.seeds < 1:
        parser.error(f"--seeds must be at least 1, found {given.seeds}")
    quickstart(Recipe(), given.output, given.seeds, given.threads, Console(stderr=True))
    return 0


def quickstart(recipe: Recipe, folder: Path, seeds: int, threads: int, console: Console) -> Path:
    """Run the experiment for seeds 0, 1, ...; print the table, write results.json and report.html, give the report."""
    torch.set_num_threads(threads)
    started = time.perf_counter()
    measured = [experiment(recipe, folder / f"seed_{seed}", seed, console) for seed in range(seeds)]
    results = summary(recipe, measured)
    results["seconds"] = round(time.perf_counter() - started, 1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    first = folder / "seed_0"
    folders = {name: first / name for name in measured[0].models} | {
        "ExOPD": first / f"ExOPD-{recipe.extrapolation:g}"
    }
    runs = {name: path for name, path in folders.items() if (path / "metrics.jsonl").exists()}
    report = write_quickstart_report(folder, results, runs)
    out = Console()
    out.print(results_table(results))
    out.print(
        f"results  {folder / 'results.json'}\nreport   {report}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return report


@dataclass
class Measured:
    """One seed: evaluations by model and by lambda, tokens by model."""

    seed: int
    models: dict[str, Evaluation]
    sweep: dict[float, Evaluation]
    tokens: dict[str, dict[str, int]]


def experiment(recipe: Recipe, folder: Path, seed: int, console: Console) -> Measured:
    """Base, one expert per domain, the weight-space baselines, and the merges over lambda."""
    domains, named = recipe.domains, f"ExOPD-{recipe.extrapolation:g}"
    total = 2 + 2 * len(domains) + 2 * len(recipe.scales) + 2
    stages = Stages(folder, total, console, f"seed {seed}")

    base = write_base(recipe, stages, seed)
    experts = experts_of(recipe, stages, seed, base)
    merged = {}
    for scale in recipe.scales:
        method = OPD(estimator="full") if scale == 1.0 else ExOPD(estimator="full", reward_scale=scale)
        config = run_config(recipe, seed, base, "embedded:" + "+".join(domains), "merge")
        config.teachers = {domain: str(path) for domain, path in experts.items()}
        merged[scale] = stages.train("OPD" if scale == 1.0 else f"ExOPD-{scale:g}", config, method)
    weights = {
        name: load_file(path / "model.safetensors") for name, path in [("base", base), *experts.items()]
    }
    combined = {
        "average": average([weights[d] for d in domains]),
        "ExPO": expo([weights[d] for d in domains], weights["base"], recipe.expo_alpha),
    }
    models = {"base": base, **{f"expert-{d}": path for d, path in experts.items()}}
    for name, tensors in combined.items():
        key = Stage(
            {"of": [stages.fingerprint(p) for p in (base, *experts.values())], "alpha": recipe.expo_alpha}
        )
        models[name] = stages.make(name, key, lambda out, tensors=tensors: save_weights(base, tensors, out))
    models |= {"OPD": merged[1.0], "ExOPD": merged[recipe.extrapolation]}
    evaluations = {
        name: stages.evaluate(name, path, lambda p: measure(recipe, p, seed)) for name, path in models.items()
    }
    sweep = {
        scale: evaluations["OPD"]
        if scale == 1.0
        else evaluations["ExOPD"]
        if f"ExOPD-{scale:g}" == named
        else stages.evaluate(f"ExOPD-{scale:g}", path, lambda p: measure(recipe, p, seed))
        for scale, path in merged.items()
    }
    tokens = {name: stages.tokens(name) for name in models}
    tokens["ExOPD"] = stages.tokens(named)
    return Measured(seed, evaluations, sweep, tokens)


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
        model=ModelConfig(),
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


def summary(recipe: Recipe, measured: list[Measured]) -> dict[str, Any]:
    """results.json: one row per model and domain, and the sweep over lambda."""
    rows = []
    for name in measured[0].models:
        for domain in recipe.domains:
            row = pooled_row([m.models[name].domains[domain] for m in measured], recipe.eval_samples)
            spent = {
                f"tokens_{k}": round(sum(m.tokens[name][k] for m in measured) / len(measured))
                for k in ("generated", "trained")
            }
            rows.append({"model": name, "domain": domain, **row, **spent})
    sweep = []
    for scale in recipe.scales:
        for domain in recipe.domains:
            row = pooled_row([m.sweep[scale].domains[domain] for m in measured], recipe.eval_samples)
            sweep.append(
                {"lambda": scale, "domain": domain, **{k: row[k] for k in ("pass@1", "low", "high")}}
            )
    return {
        "seeds": [m.seed for m in measured],
        "extrapolation": recipe.extrapolation,
        "rows": rows,
        "sweep": sweep,
    }
