"""surpass quickstart: train experts by RL, then distil them on-policy into one student that outgrows them. No download.

Every stage is an ordinary run of `surpass.train`, kept in its own folder and reused by the next call where nothing it
depends on has changed. OPD and ExOPD share everything but lambda: prompts, steps, learning rate and schedule.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from surpass.cli.stages import Stage, Stages
from surpass.cli.world import Recipe, experts_of, measure, run_config, save_weights, write_base
from surpass.evaluate.pooling import pooled_row
from surpass.evaluate.summary import Evaluation
from surpass.methods.exopd import ExOPD
from surpass.methods.opd import OPD
from surpass.report.page import write_quickstart_report
from surpass.report.tables import results_table
from surpass.roles.weight_space import average, expo


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="surpass quickstart",
        description="Experts by RL, merged on-policy into one student that outgrows them. Needs no download.",
    )
    parser.add_argument("--seeds", type=int, default=1, help="repeat the experiment and report the spread")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/quickstart"), help="folder of results and report"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; for models this small one is enough"
    )
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
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    shown = {name: folder / "seed_0" / stage for name, stage in named(recipe).items()}
    runs = {name: path for name, path in shown.items() if (path / "metrics.jsonl").exists()}
    report = write_quickstart_report(folder, results, runs)
    out = Console()
    out.print(results_table(results))
    for knob, label in (("sweep", "lambda"), ("expo_sweep", "alpha")):
        for domain in recipe.domains:
            points = ", ".join(
                f"{r[label]:g}: {r['pass@1']:.1%}" for r in results[knob] if r["domain"] == domain
            )
            out.print(
                f"{'ExOPD' if label == 'lambda' else 'ExPO':<6}{domain:<9}pass@1 by {label}: {points}",
                highlight=False,
            )
    where = f"results  {folder / 'results.json'}\nreport   {report}"
    out.print(where, markup=False, highlight=False, soft_wrap=True)
    return report


@dataclass
class Measured:
    """One seed: evaluation and tokens (generated, trained) of every stage's model, by the stage's name."""

    seed: int
    models: dict[str, Evaluation]
    tokens: dict[str, dict[str, int]]


def named(recipe: Recipe) -> dict[str, str]:
    """The models of the results table and the stage each one is."""
    experts = {f"expert-{domain}": f"expert-{domain}" for domain in recipe.domains}
    merged = {"average": "average", "ExPO": f"ExPO-{recipe.expo_alphas[0]:g}", "OPD": "OPD"}
    return {"base": "base", **experts, **merged, "ExOPD": f"ExOPD-{recipe.extrapolation:g}"}


def experiment(recipe: Recipe, folder: Path, seed: int, console: Console) -> Measured:
    """Base, one expert per domain, the weight-space baselines, and the merges over lambda."""
    stages = Stages(folder, 1 + len(recipe.domains) + len(recipe.scales), console, f"seed {seed}")
    base = write_base(recipe, stages, seed)
    experts = experts_of(recipe, stages, seed, base)
    models = {"base": base, **{f"expert-{domain}": path for domain, path in experts.items()}}
    for scale in recipe.scales:
        name = "OPD" if scale == 1.0 else f"ExOPD-{scale:g}"
        method = OPD(estimator="full") if scale == 1.0 else ExOPD(estimator="full", reward_scale=scale)
        config = run_config(recipe, seed, base, "embedded:" + "+".join(recipe.domains), "merge")
        config.teachers = {domain: str(path) for domain, path in experts.items()}
        models[name] = stages.train(name, config, method)

    origin = load_file(base / "model.safetensors")
    trained = [load_file(path / "model.safetensors") for path in experts.values()]
    made_of = [stages.fingerprint(path) for path in (base, *experts.values())]
    combined = {"average": average(trained)}
    combined |= {f"ExPO-{alpha:g}": expo(trained, origin, alpha) for alpha in recipe.expo_alphas}
    for name, weights in combined.items():
        stage = Stage({"name": name, "of": made_of})
        models[name] = stages.make(name, stage, lambda out, weights=weights: save_weights(base, weights, out))

    evaluations = {
        name: stages.evaluate(name, path, lambda p: measure(recipe, p, seed)) for name, path in models.items()
    }
    return Measured(seed, evaluations, {name: stages.tokens(name) for name in models})


def summary(recipe: Recipe, measured: list[Measured]) -> dict[str, Any]:
    """results.json: one row per model and domain, and the sweeps over lambda and over ExPO's alpha."""

    def row(stage: str, domain: str) -> dict[str, Any]:
        return pooled_row([m.models[stage].domains[domain] for m in measured], recipe.eval_samples)

    def spent(stage: str) -> dict[str, int]:
        return {
            f"tokens_{kind}": round(sum(m.tokens[stage][kind] for m in measured) / len(measured))
            for kind in ("generated", "trained")
        }

    def swept(knob: str, value: float, stage: str) -> list[dict[str, Any]]:
        rows = [(domain, row(stage, domain)) for domain in recipe.domains]
        return [{knob: value, "domain": d, **{k: r[k] for k in ("pass@1", "low", "high")}} for d, r in rows]

    scales = {scale: "OPD" if scale == 1.0 else f"ExOPD-{scale:g}" for scale in recipe.scales}
    alphas = {0.0: "average", **{alpha: f"ExPO-{alpha:g}" for alpha in recipe.expo_alphas}}
    return {
        "seeds": [m.seed for m in measured],
        "extrapolation": recipe.extrapolation,
        "rows": [
            {"model": name, "domain": domain, **row(stage, domain), **spent(stage)}
            for name, stage in named(recipe).items()
            for domain in recipe.domains
        ],
        "sweep": [point for scale, stage in scales.items() for point in swept("lambda", scale, stage)],
        "expo_sweep": [point for alpha, stage in alphas.items() for point in swept("alpha", alpha, stage)],
    }
