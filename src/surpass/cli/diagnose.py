"""surpass diagnose: before training, is on-policy distillation likely to work with this teacher?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from surpass.cli.parsing import parse, run_config, run_parser
from surpass.evaluate.diagnosis import Diagnosis, diagnose
from surpass.models.policy import Policy, load_policy
from surpass.models.tokenizers import check_same_tokens
from surpass.prompts.templates import check_same_template
from surpass.rollout.local import LocalEngine
from surpass.train.build import make_judge, make_sampling, read_prompts


def main(arguments: list[str]) -> int:
    """Exit status 0: likely to work; 1: not, or a tokenizer or template stands in the way."""
    parser = run_parser(
        "surpass diagnose", "Is on-policy distillation likely to work? Evidence and a verdict."
    )
    parser.add_argument("--out", type=Path, default=Path("runs/diagnosis.json"), help="file for the figures")
    parsed = parse(parser, arguments)
    config = run_config(parsed)
    if not config.teacher:
        raise ValueError("name the teacher to look at: --teacher PATH")
    prompts = read_prompts(config, config.prompts, config.data.split, config.data.limit or 64)
    judge = make_judge(config, prompts)

    def load(path: str) -> Policy:
        return load_policy(
            path, dtype=config.model.dtype, device=config.model.device, attention=config.model.attention
        )

    student, teacher = load(config.student), load(config.teacher)
    named = config.reference not in (None, "student")
    reference = load(str(config.reference)) if named else student
    check_same_tokens(
        student.tokenizer, teacher.tokenizer, min(student.vocabulary, teacher.vocabulary), "the teacher"
    )
    if config.data.teacher_template == "same":
        check_same_template(student.tokenizer, teacher.tokenizer, config.data.template_args)
    found = diagnose(
        student,
        teacher,
        reference,
        lambda policy: LocalEngine(
            policy, max_rows=config.rollout.max_rows, max_tokens=config.rollout.max_tokens
        ),
        prompts,
        judge,
        make_sampling(config),
        samples=config.eval.samples,
        seed=config.seed,
        token_budget=config.train.token_budget,
        template_args=config.data.template_args,
    )
    show(found, Console())
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    figures = {
        "verdict": found.verdict,
        "reasons": found.reasons,
        "gain": found.gain,
        "novelty": found.novelty,
    }
    parsed.out.write_text(json.dumps(figures | asdict(found.states), indent=1))
    print(f"written to {parsed.out}")
    return 0 if found.verdict == "likely" else 1


def show(found: Diagnosis, console: Console) -> None:
    """The evidence as a table, then the verdict."""
    states, covered = found.states, found.covered
    table = Table(title="on the student's own answers", title_justify="left")
    table.add_column("figure")
    table.add_column("student", justify="right")
    table.add_column("teacher", justify="right")
    for name, estimate in found.student.overall.estimates.items():
        theirs = found.teacher.overall.estimates[name]
        table.add_row(name, f"{estimate.value:.3f}", f"{theirs.value:.3f}")
    table.add_row("solved by this one alone", str(len(covered.student_only)), str(len(covered.teacher_only)))
    table.add_row("entropy, nats", f"{states.student_entropy:.3f}", f"{states.teacher_entropy:.3f}")
    table.add_row("mass on shared likely tokens", f"{states.student_mass:.3f}", f"{states.teacher_mass:.3f}")
    table.add_row("KL to the other, nats a token", f"{states.reverse_kl:.4f}", f"{states.forward_kl:.4f}")
    console.print(table)
    console.print(f"near-certain tokens of the teacher: {states.deterministic:.1%}")
    limit = "below 1.25" if states.limit is None else f"{states.limit:g}"
    console.print(f"largest lambda that keeps their mode (99 %): {limit}")
    for reason in found.reasons:
        console.print(f"- {reason}", highlight=False)
    console.print(f"verdict: {found.verdict}", style="bold")
