"""`surpass`: the command line. Each command lives in its own file and is imported when it is used."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence

COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": (
        "surpass.cli.quickstart",
        "experts by RL, merged into one student that outgrows them; needs no download",
    ),
    "train": (
        "surpass.cli.train",
        "train a model with any method: surpass train METHOD --student DIR --prompts FILE",
    ),
    "eval": (
        "surpass.cli.evaluate",
        "pass@k, avg@k, maj@k, lengths and truncation of a model, with intervals",
    ),
    "methods": ("surpass.cli.methods", "what each method is: equation, source, fields and defaults"),
    "diagnose": (
        "surpass.cli.diagnose",
        "before training: is distillation from this teacher likely to work, and why",
    ),
    "league": ("surpass.cli.league", "every method on the same embedded tasks under the same token budget"),
    "plan": (
        "surpass.cli.plan",
        "before anything loads: parameters, memory, tokens and FLOPs per step, what would fail",
    ),
    "compare": ("surpass.cli.compare", "runs side by side: table and plots"),
    "report": ("surpass.cli.report", "an HTML report of a run, with a token viewer"),
    "data": (
        "surpass.cli.data",
        "look at prompts as a model reads them; merge checkpoints; write embedded tasks to files",
    ),
}


def usage() -> str:
    lines = "\n".join(f"  {name:<12}{summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: surpass COMMAND ...\n\n"
        "Post-train language models by distillation and reinforcement learning, so that a student can outgrow its teachers.\n\n"
        f"commands:\n{lines}\n\nsurpass COMMAND --help says more about each.\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status. Errors a user can mend are printed in words, without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"surpass {version('surpass')}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"surpass: unknown command {command!r}{hint}\n\n{usage()}", file=sys.stderr, end="")
        return 2
    run: Callable[[list[str]], int] = importlib.import_module(COMMANDS[command][0]).main
    try:
        return run(rest)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        if not (_for_users(error) or isinstance(error, OSError)):
            raise
        print(f"surpass {command}: {error}", file=sys.stderr)
        return 1


def _for_users(error: BaseException) -> bool:
    """True for errors this package raised on purpose: their message says what to do, a traceback would not."""
    trace = error.__traceback__
    module = ""
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        trace = trace.tb_next
    return module.startswith("surpass.")


if __name__ == "__main__":
    sys.exit(main())
