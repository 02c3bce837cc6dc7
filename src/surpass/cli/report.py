"""surpass report RUN: an HTML report that opens from disk without a network."""

from __future__ import annotations

import argparse
from pathlib import Path

from surpass.report.page import write_report


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="surpass report", description="Write the HTML report of a run.")
    parser.add_argument("run", type=Path, help="folder of a run, for example runs/latest")
    parser.add_argument("--out", type=Path, help="file to write; default: report.html in the run's folder")
    given = parser.parse_args(arguments)
    print(write_report(given.run, given.out))
    return 0
