"""surpass plan METHOD: what a run would cost and what would fail, before anything loads."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from surpass.cli.console import output
from surpass.cli.train import read_settings
from surpass.methods.registry import METHODS
from surpass.train.plan import Plan, plan, total_memory


def main(arguments: list[str]) -> int:
    """Exit status 0 when nothing stands in the way, 1 when the run would fail."""
    if not arguments or arguments[0].startswith("-"):
        print(
            f"usage: surpass plan METHOD [the same settings as surpass train]\n\nmethods: {', '.join(METHODS)}"
        )
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    name, *rest = arguments
    config, method, _ = read_settings("plan", name, rest)
    result = plan(config, method)
    show(result, output())
    return 1 if result.problems else 0


def show(result: Plan, console: Console) -> None:
    """The plan as tables."""
    models = _table("models", "role", "checkpoint", "parameters", "weights")
    for size in result.models:
        count = _si(size.parameters)
        count += f" ({_si(size.active)} active)" if size.active != size.parameters else ""
        models.add_row(size.name, size.path, count, _bytes(size.bytes))
    console.print(models)
    if result.memory:
        memory = _table("memory on one device", "part", "size")
        for part, size in result.memory.items():
            memory.add_row(part, _bytes(size))
        memory.add_row("total", _bytes(total_memory(result)), style="bold")
        console.print(memory)
        step = _table("one step, every answer at full length", "phase", "tokens", "FLOPs", "share")
        total = sum(result.flops.values())
        for phase, flops in result.flops.items():
            key = "generated" if phase == "rollout" else "trained" if phase == "update" else "scored"
            step.add_row(phase, _si(result.tokens[key]), f"{flops:.2e}", f"{flops / total:.0%}")
        console.print(step)
    if result.prompts:
        p = result.prompts
        console.print(
            f"prompts: {p['count']}, mean {p['mean']:.0f} and longest {p['longest']} tokens, domains {', '.join(p['domains'])}"
        )
    console.print(f"roles beside the student: {', '.join(result.roles) or 'none'}")
    for problem in result.problems:
        console.print(f"would fail: {problem}", style="red", markup=False)
    if not result.problems:
        console.print("nothing stands in the way", style="green")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or column == "checkpoint" else "right")
    return table


def _si(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.2f} {unit}"
    return f"{number:.0f}"


def _bytes(number: float) -> str:
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number:.0f} B"
