"""surpass eval: how good is a model, with intervals."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from surpass.cli.console import output
from surpass.cli.parsing import parse, run_config, run_parser
from surpass.evaluate.evaluation import evaluate
from surpass.evaluate.summary import Summary
from surpass.judge.votes import vote_of
from surpass.models.policy import load_policy
from surpass.prompts.templates import render
from surpass.records import Ragged
from surpass.rollout.local import LocalEngine
from surpass.train.build import make_judge, make_sampling, read_prompts, verifiers_of
from surpass.train.progress import display


def main(arguments: list[str]) -> int:
    parser = run_parser(
        "surpass eval", "pass@k (unbiased), avg@n, maj@k, lengths and truncation, with 95 % intervals."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/evaluation"), help="folder of evaluation.json, samples.jsonl"
    )
    parsed = parse(parser, arguments)
    config = run_config(parsed)
    policy = load_policy(
        config.student,
        dtype=config.model.dtype,
        device=config.model.device,
        attention=config.model.attention,
        trust_remote_code=config.model.trust_remote_code,
    )
    source = config.eval.prompts or config.prompts
    if not source:
        raise ValueError("no prompts: set --prompts FILE, a hub id or embedded:NAME")
    prompts = read_prompts(config, source, config.eval.split, config.eval.limit)
    judge = make_judge(config, prompts)
    ids = [render(p, policy.tokenizer, template_args=config.data.template_args) for p in prompts]
    with display(Console(stderr=True)) as progress:
        task = progress.add_task("answering", total=len(prompts) * config.eval.samples, figures="")
        result = evaluate(
            LocalEngine(policy, max_rows=config.rollout.max_rows, max_tokens=config.rollout.max_tokens),
            prompts,
            Ragged.from_list(ids),
            judge,
            policy.tokenizer,
            n=config.eval.samples,
            sampling=make_sampling(config),
            ks=config.eval.ks,
            seed=config.seed,
            vote=vote_of(verifiers_of(config, prompts)),
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            out=parsed.out,
        )
    output().print(table([*result.domains.values(), result.overall], config.student))
    print(f"written to {parsed.out}")
    return 0


def table(summaries: list[Summary], title: str) -> Table:
    """One column per domain, one line per estimate with its interval."""
    out = Table(title=title, title_justify="left")
    out.add_column("")
    for summary in summaries:
        out.add_column(summary.domain, justify="right", no_wrap=True)
    for name in summaries[0].estimates:
        cells = [s.estimates[name] for s in summaries]
        out.add_row(name, *(f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" for e in cells))
    out.add_row("length", *(f"{s.mean_length:.1f}" for s in summaries))
    out.add_row("cut off", *(f"{s.clipped_ratio:.1%}" for s in summaries))
    out.add_row("not judged", *(str(s.failures) for s in summaries))
    return out
