"""surpass compare RUN...: runs side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from surpass.cli.console import output
from surpass.evaluate.compare import comparison_table, gather
from surpass.report.page import write_comparison


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="surpass compare", description="A table and plots of several runs.")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument(
        "--knob",
        action="append",
        default=[],
        help="setting that is meant to differ, e.g. method.reward_scale",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/comparison.html"), help="page to write")
    given = parser.parse_args(arguments)
    output().print(comparison_table(gather(given.runs)))
    print(write_comparison(given.runs, given.out, given.knob))
    return 0
