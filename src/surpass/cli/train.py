"""surpass train METHOD: train a model with any method."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from surpass.cli.parsing import parse, run_config, run_parser
from surpass.methods.base import Method
from surpass.methods.registry import METHODS, method_class
from surpass.train.loop import train


def main(arguments: list[str]) -> int:
    """Exit status 0 when trained, 130 after Ctrl-C (state saved), 2 for settings that cannot be read."""
    if not arguments or arguments[0].startswith("-"):
        print(_usage(), end="")
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    name, *rest = arguments
    config, method, parsed = read_settings("train", name, rest)
    model = train(config, method, resume=parsed.resume, overwrite=parsed.overwrite)
    print(f"model   {model}\nreport  surpass report {config.output}")
    return 0


def read_settings(command: str, name: str, arguments: list[str]) -> tuple[Any, Method, Any]:
    """Configuration, method and the whole parsed namespace of `surpass COMMAND METHOD ...`."""
    cls = method_class(name)
    _same_method(command, name, cls, arguments)
    summary = (cls.__doc__ or "").strip().split("\n")[0]
    parser = run_parser(f"surpass {command} {name}", summary)
    parser.add_argument(
        "--method_name", default=name, help="as config.yaml has it; must be this method's name"
    )
    parser.add_class_arguments(cls, "method")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of --output")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that stands in --output")
    parsed = parse(parser, arguments)
    return run_config(parsed), _method(cls, parsed.method), parsed


def _same_method(command: str, name: str, cls: type[Method], arguments: list[str]) -> None:
    """Leave with status 2 where a given file is no YAML, or another method's: its fields would only seem misspelt."""
    places = [i for i, argument in enumerate(arguments) if argument.split("=")[0] == "--config"]
    for i in places:
        file = Path(arguments[i].partition("=")[2] or "".join(arguments[i + 1 : i + 2]))
        try:
            stored = yaml.safe_load(file.read_text()) if file.is_file() else None
        except yaml.YAMLError as error:
            print(f"surpass {command} {name}: {file} is not valid YAML: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        other = stored.get("method_name", name) if isinstance(stored, dict) else name
        if other not in (name, cls.__name__):
            print(
                f"surpass {command} {name}: {file} is the configuration of method {other}, not of {cls.__name__}",
                file=sys.stderr,
            )
            raise SystemExit(2)


def _method(cls: type[Method], parsed: Any) -> Method:
    return (
        parsed if isinstance(parsed, cls) else cls(**{f.name: getattr(parsed, f.name) for f in fields(cls)})
    )


def _usage() -> str:
    return (
        "usage: surpass train METHOD --student DIR --prompts FILE [--config run.yaml] [--any.field value]\n\n"
        f"methods: {', '.join(METHODS)}\n"
        "         or your own: path/to/file.py:ClassName\n\n"
        "surpass train METHOD --help lists every setting; surpass methods METHOD explains the method.\n"
    )
