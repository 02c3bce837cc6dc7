"""surpass data show | merge | embedded: prompts as a model reads them, merged checkpoints, embedded tasks as files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from surpass.cli.console import output
from surpass.cli.parsing import parse
from surpass.config import DataConfig, RunConfig
from surpass.models.policy import Dtype, Policy, load_config, load_policy, save_policy
from surpass.models.tokenizers import check_same_tokens
from surpass.prompts.templates import render, template_fingerprint
from surpass.records import Prompt
from surpass.roles.weight_space import average, expo
from surpass.tasks import task_prompts
from surpass.train.build import read_prompts

USAGE = """\
usage: surpass data COMMAND ...

commands:
  show       prompts as a model reads them, their lengths and domains
  merge      average checkpoints, or extrapolate them away from their base (ExPO)
  embedded   write an embedded task to a JSONL file

surpass data COMMAND --help says more about each.
"""


def main(arguments: list[str]) -> int:
    """Exit status 0 when done, 2 for an unknown command."""
    commands = {"show": show, "merge": merge, "embedded": embedded}
    if not arguments or arguments[0] not in commands:
        print(USAGE, end="")
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    commands[arguments[0]](arguments[1:])
    return 0


def show(arguments: list[str]) -> None:
    """Lengths and domains of all prompts, and the first few as text."""
    parser = ArgumentParser(
        prog="surpass data show",
        description="Prompts as a model reads them.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--student", type=str, required=True, help="checkpoint whose tokenizer is used")
    parser.add_argument(
        "--prompts", type=str | dict[str, str], required=True, help="file, hub id or embedded:NAME"
    )
    parser.add_argument("--count", type=int, default=3, help="how many to print")
    parser.add_argument("--seed", type=int, default=0, help="of embedded tasks")
    parser.add_class_arguments(DataConfig, "data")
    given = parse(parser, arguments)
    config = RunConfig(given.student, given.prompts, seed=given.seed, data=given.data)
    tokenizer, reads = _tokenizer(given.student), _max_length(given.student)
    prompts = read_prompts(config, config.prompts, config.data.split, config.data.limit)
    args = config.data.template_args
    rendered = [render(p, tokenizer, template_args=args) for p in prompts]
    console = output()
    console.print(_domains(prompts, [len(ids) for ids in rendered]))
    print(
        f"template {template_fingerprint(tokenizer, args)}; the model reads {reads} tokens, answer included"
    )
    for prompt, ids in list(zip(prompts, rendered, strict=True))[: given.count]:
        console.rule(Text(f"{prompt.id} ({prompt.domain}): {len(ids)} tokens"), align="left")
        console.print(Text(str(tokenizer.decode(ids))))


def merge(arguments: list[str]) -> None:
    """The mean of the experts' weights, or with a base `mean + alpha * (mean - base)`."""
    parser = argparse.ArgumentParser(
        prog="surpass data merge", description="Merge checkpoints by arithmetic."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the merged checkpoint")
    parser.add_argument("--experts", nargs="+", required=True, help="checkpoints to average")
    parser.add_argument("--base", help="checkpoint they were trained from, to extrapolate away from")
    parser.add_argument("--alpha", type=float, help="how far: 0 is the average, 0.5 half as far again")
    given = parser.parse_args(arguments)
    if (given.base is None) != (given.alpha is None):
        raise ValueError("extrapolation needs both --base DIR and --alpha NUMBER; an average needs neither")
    if (given.out / "config.json").exists():
        raise ValueError(f"{given.out} already holds a checkpoint; choose another --out")
    dtype = _dtype(given.experts[0])
    experts = [load_policy(path, dtype=dtype) for path in given.experts]
    base = load_policy(given.base, dtype=dtype) if given.base else None
    first = experts[0]
    for other in [*experts[1:], *([base] if base else [])]:
        check_same_tokens(
            first.tokenizer, other.tokenizer, min(first.vocabulary, other.vocabulary), other.name
        )
    weights = [_weights(expert) for expert in experts]
    merged = average(weights) if base is None else expo(weights, _weights(base), given.alpha)
    first.model.load_state_dict(merged)
    save_policy(first, given.out)
    print(f"merged {len(experts)} checkpoints into {given.out}")


def embedded(arguments: list[str]) -> None:
    """Prompts of an embedded task as a file that `--prompts` reads back, verifier included."""
    parser = argparse.ArgumentParser(
        prog="surpass data embedded", description="Write an embedded task to a file."
    )
    parser.add_argument("name", help="a task, or several joined by +: sort, missing, chain, lookup")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--count", type=int, default=1024, help="how many prompts")
    parser.add_argument("--split", choices=["train", "eval"], default="train", help="they share no question")
    parser.add_argument("--seed", type=int, default=0, help="of the questions")
    parser.add_argument("--difficulty", type=int, default=1, help="1 is the task's usual size")
    given = parser.parse_args(arguments)
    if given.out.suffix != ".jsonl":
        raise ValueError(f"--out is a .jsonl file, found {given.out}")
    prompts = task_prompts(given.name, given.count, given.seed, given.split, given.difficulty)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("".join(json.dumps(_row(p, given.name)) + "\n" for p in prompts))
    print(f"wrote {len(prompts)} prompts to {given.out}")


def _row(prompt: Prompt, task: str) -> dict[str, Any]:
    return {
        "id": prompt.id,
        "prompt": list(prompt.messages),
        "answer": prompt.answer,
        "response": prompt.response,
        "domain": prompt.domain,
        "tags": list(prompt.tags),
        **prompt.privileged,
        "verifier": f"embedded:{task}",
    }


def _domains(prompts: list[Prompt], lengths: list[int]) -> Table:
    table = Table(title=f"{len(prompts)} prompts", title_justify="left")
    table.add_column("domain")
    for column in ("prompts", "with answer", "mean tokens", "longest"):
        table.add_column(column, justify="right")
    table.add_column("only teachers may read")
    for domain in sorted({p.domain for p in prompts}):
        rows = [i for i, p in enumerate(prompts) if p.domain == domain]
        found = [lengths[i] for i in rows]
        answered = sum(prompts[i].answer is not None for i in rows)
        secrets = dict.fromkeys(name for i in rows for name in prompts[i].privileged)
        table.add_row(
            Text(domain),
            *(str(n) for n in (len(rows), answered, f"{sum(found) / len(rows):.1f}", max(found))),
            ", ".join(secrets),
        )
    return table


def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load a tokenizer from {path!r}: {error}") from error


def _max_length(path: str) -> int | str:
    config = load_config(path).get_text_config()
    return int(getattr(config, "max_position_embeddings", 0)) or "any number of"


def _dtype(path: str) -> Dtype:
    """The precision a checkpoint was saved in."""
    name = str(getattr(load_config(path), "dtype", None) or "float32").removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "float32"  # type: ignore[return-value]


def _weights(policy: Policy) -> dict[str, torch.Tensor]:
    return dict(policy.model.state_dict())
