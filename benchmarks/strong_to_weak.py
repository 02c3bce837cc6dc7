"""Strong to weak: a small student learns from experts grown from a larger base. Does reward correction matter?

The quickstart's world with a second, wider base and experts trained from it. The small base is the student; lambda = 1,
lambda = 1.5 with the student's own beginning as reference (the default), and lambda = 1.5 with the teachers' base as
reference (reward correction, arXiv 2602.12125) share everything else. Writes benchmarks/results/strong_to_weak.json.

    python benchmarks/strong_to_weak.py [--seeds 2] [--output runs/strong_to_weak]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from surpass.cli.stages import Stages
from surpass.cli.world import Recipe, experts_of, measure, run_config, write_base
from surpass.evaluate.pooling import pooled_row
from surpass.evaluate.summary import Evaluation
from surpass.methods.exopd import ExOPD
from surpass.report.tables import results_table

WIDE = 192
SCALE = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/strong_to_weak"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(stderr=True)
    recipe = Recipe()
    seasons = [
        season(recipe, options.output / f"seed_{seed}", seed, console) for seed in range(options.seeds)
    ]
    rows = [
        {"model": name, "domain": domain}
        | pooled_row([s[name].domains[domain] for s in seasons], recipe.eval_samples)
        for name in seasons[0]
        for domain in recipe.domains
    ]
    results = {"seeds": list(range(options.seeds)), "lambda": SCALE, "rows": rows}
    (Path(__file__).parent / "results" / "strong_to_weak.json").write_text(json.dumps(results, indent=1))
    Console(width=100).print(results_table(results, "strong to weak"))


def season(recipe: Recipe, folder: Path, seed: int, console: Console) -> dict[str, Evaluation]:
    """One seed: evaluations of both bases, the wide experts and the three students."""
    wide = Stages(folder / "wide", 1 + len(recipe.domains), console, f"seed {seed}, wide")
    strong = replace(recipe, hidden=WIDE)
    wide_base = write_base(strong, wide, seed)
    experts = experts_of(strong, wide, seed, wide_base)
    stages = Stages(folder, 4, console, f"seed {seed}")
    base = write_base(recipe, stages, seed)
    models = {"base": base, "wide-base": wide_base, **{f"wide-{d}": path for d, path in experts.items()}}
    for name, scale, reference in (
        ("OPD", 1.0, "student"),
        ("ExOPD", SCALE, "student"),
        ("ExOPD-corrected", SCALE, str(wide_base)),
    ):
        config = run_config(recipe, seed, base, "embedded:" + "+".join(recipe.domains), "merge")
        config.teachers = {domain: str(path) for domain, path in experts.items()}
        config.reference = reference
        models[name] = stages.train(name, config, ExOPD(estimator="full", reward_scale=scale))
    return {
        name: stages.evaluate(name, path, lambda p: measure(recipe, p, seed)) for name, path in models.items()
    }


if __name__ == "__main__":
    main()
