"""surpass league: every method on the same embedded tasks, from the same base, under the same token budget.

The world is the quickstart's: its base is the student, its experts are the teachers, both domains are asked. A method
may spend a budget of generated + scored + trained tokens, whatever mixture of these it needs; learning rate and schedule
are the same for all methods of a kind and are not tuned per method. Writes `league.json`, which the method gallery reads.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from surpass.cli.stages import Stages
from surpass.cli.world import Recipe, experts_of, measure, run_config, write_base
from surpass.evaluate.pooling import pooled_row
from surpass.evaluate.summary import Evaluation
from surpass.methods.base import Method
from surpass.methods.registry import METHODS, method_class
from surpass.report.tables import results_table

# Learning rates by what a method learns from; each was the quickstart's own for that kind before the league was run.
RATES = {"rewards": 1e-4, "teacher": 2e-3, "text": 2e-3}
# Settings that make a method cheap enough or applicable here; everything else is the method's default.
SETTINGS: dict[str, dict[str, Any]] = {
    "opd": {"estimator": "full"},
    "exopd": {"estimator": "full", "reward_scale": 1.5},
    "dapo": {"samples": 8},
    "dr_grpo": {"horizon": 12},
    "rethinking_opd": {"top_k": 16},
}
# Not entered: plain SFT has no teacher text here but the base's own data.
LEFT_OUT = ("sft", "sod", "mad_opd", "opad")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="surpass league", description="Every method, one world, one token budget."
    )
    parser.add_argument(
        "--methods", nargs="*", help="only these; default: all that apply to single-turn tasks"
    )
    parser.add_argument("--seeds", type=int, default=1, help="repeat with this many seeds")
    parser.add_argument(
        "--budget", type=int, default=200_000, help="generated + scored + trained tokens of one run"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/league"), help="folder of runs and league.json"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    given = parser.parse_args(arguments)
    names = given.methods or [name for name in METHODS if name not in LEFT_OUT]
    for name in names:
        method_class(name)
    torch.set_num_threads(given.threads)
    console = Console(stderr=True)
    seasons = [
        season(Recipe(), given.output / f"seed_{s}", s, names, given.budget, console)
        for s in range(given.seeds)
    ]
    results = table(Recipe(), seasons, given.budget)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "league.json").write_text(json.dumps(results, indent=1))
    Console().print(results_table(results, "league"))
    for name, reason in results["failed"].items():
        console.print(f"{name}: {reason}", markup=False, highlight=False)
    print(f"results  {given.output / 'league.json'}")
    return 0


def season(
    recipe: Recipe, folder: Path, seed: int, names: list[str], budget: int, console: Console
) -> dict[str, tuple[Evaluation, dict[str, int]] | str]:
    """One seed: evaluation and tokens of the base, the experts and every method; a reason in words where one failed."""
    stages = Stages(folder, len(names) + 1 + len(recipe.domains), console, f"seed {seed}")
    base = write_base(recipe, stages, seed)
    experts = experts_of(recipe, stages, seed, base)
    found: dict[str, tuple[Evaluation, dict[str, int]] | str] = {}
    for name, path in [("base", base), *((f"expert-{d}", p) for d, p in experts.items())]:
        found[name] = stages.evaluate(name, path, lambda p: measure(recipe, p, seed)), stages.tokens(name)
    for name in names:
        method = method_class(name)(**SETTINGS.get(name, {}))
        config = run_config(recipe, seed, base, "embedded:" + "+".join(recipe.domains), "merge")
        config.optimiser.learning_rate = RATES[kind(method)]
        config.train.max_tokens, config.train.steps = budget, 10_000
        config.train.prompts_per_step = max(8, recipe.merge_prompts // method.samples)
        config.train.sample_every = 0
        if method.needs().teacher and "teacher" not in method.roles():
            config.teachers = {domain: str(path) for domain, path in experts.items()}
        try:
            model = stages.train(name, config, method)
        except (ValueError, RuntimeError) as error:
            found[name] = str(error)
            continue
        found[name] = stages.evaluate(name, model, lambda p: measure(recipe, p, seed)), stages.tokens(name)
    return found


def kind(method: Method) -> str:
    """What a method learns from: rewards alone, a teacher's distribution, or text."""
    needs = method.needs()
    if needs.reward and not needs.teacher:
        return "rewards"
    return "teacher" if needs.rollouts else "text"


def table(recipe: Recipe, seasons: list[dict[str, Any]], budget: int) -> dict[str, Any]:
    """league.json: rows like results.json, methods that failed with their reason, and the budget."""
    rows, failed = [], {}
    for name in seasons[0]:
        parts = [season[name] for season in seasons]
        if reasons := [part for part in parts if isinstance(part, str)]:
            failed[name] = reasons[0]
            continue
        for domain in recipe.domains:
            row = pooled_row([evaluation.domains[domain] for evaluation, _ in parts], recipe.eval_samples)
            spent = {
                f"tokens_{k}": round(sum(t[k] for _, t in parts) / len(parts))
                for k in ("generated", "trained")
            }
            rows.append({"model": name, "domain": domain, **row, **spent})
    return {"seeds": list(range(len(seasons))), "budget": budget, "rows": rows, "failed": failed}
