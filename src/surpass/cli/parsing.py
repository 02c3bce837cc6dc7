"""Typed parsers from the dataclasses: YAML and command line, with errors that name the nearest valid key."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings

from surpass.config import RunConfig

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def run_parser(prog: str, description: str) -> ArgumentParser:
    """A parser with `--config` and every field of `RunConfig`."""
    # No abbreviations: `--train.step` is a mistake to be told, not another name of `--train.steps`.
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_class_arguments(RunConfig)
    return parser


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Any:
    """Parse and build the dataclasses. Exits with status 2 and a message that names the nearest valid key."""
    try:
        return parser.instantiate(parser.parse_args(list(arguments)))
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        message = str(error)
        print(f"{parser.prog}: {message}{_nearest(parser, message)}", file=sys.stderr)
        print(f"{parser.prog} --help lists every setting.", file=sys.stderr)
        raise SystemExit(2) from error


def run_config(parsed: Any) -> RunConfig:
    """The `RunConfig` part of what was parsed."""
    return RunConfig(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(RunConfig)})


def _nearest(parser: ArgumentParser, message: str) -> str:
    known = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
    wrong = (
        re.findall(r"--([\w.]+)", message)
        if "unrecognized" in message
        else re.findall(r"option '([\w.]+)'", message)
    )
    group = re.search(r"Group '([\w.]+)'", message)
    hints = []
    for key in wrong:
        full = f"{group.group(1)}.{key}" if group else key
        near = difflib.get_close_matches(full, known, 1, cutoff=0.5)
        near = near or [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
        if near:
            hints.append(f"{full}: did you mean {near[0]}?")
    return f"\n  {'; '.join(hints)}" if hints else ""
