"""surpass methods [NAME]: what each method is."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from surpass.cli.console import output
from surpass.methods.registry import METHODS, MethodDescription, describe


def main(arguments: list[str]) -> int:
    """A table of all methods, or everything about one."""
    parser = argparse.ArgumentParser(
        prog="surpass methods", description="What each method is: equation, source, fields and defaults."
    )
    parser.add_argument("name", nargs="?", help="a method, or your own: path/to/file.py:ClassName")
    name = parser.parse_args(arguments).name
    console = output()
    if name is None:
        console.print(overview())
        console.print("surpass methods NAME: equation, source and settings of one of them", style="dim")
    else:
        show(describe(name), console)
    return 0


def overview() -> Table:
    """One line per method, in the order of the registry."""
    table = Table(title="methods", title_justify="left")
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("what it does")
    table.add_column("arXiv", no_wrap=True)
    for name in METHODS:
        method = describe(name)
        table.add_row(name, Text(method.summary), method.sources[0] if method.sources else "")
    return table


def show(method: MethodDescription, console: Console) -> None:
    """The whole page of one method. Texts go in as they are: brackets of equations are no markup."""
    console.print(Text(method.name, style="bold"), Text(method.summary))
    console.print(Padding(Text(method.notes), (1, 0)))
    if method.sources:
        console.print("arXiv:", ", ".join(method.sources), highlight=False)
    table = Table(title="settings (--method.NAME VALUE)", title_justify="left", show_lines=True)
    for column in ("name", "type", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for field in method.fields:
        table.add_row(*(Text(cell) for cell in (field.name, field.type, field.default, field.doc)))
    console.print(table)
