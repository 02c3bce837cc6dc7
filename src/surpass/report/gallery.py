"""The gallery of methods, docs/methods.md: written from the methods' own docstrings and from measured results.

    python -m surpass.report.gallery

A results file (benchmarks/results/*.json) speaks of methods where it has the form of the quickstart's results.json:
`rows`, each with `model`, `domain`, `pass@1`, `low` and `high`. A row belongs to the method its `model` is called like.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from surpass.learn.divergence import Kind
from surpass.methods.base import Reduction
from surpass.methods.registry import METHODS, FieldDescription, MethodDescription, describe

HEAD = """\
# Methods

What each method is, where it comes from, and what was measured here. `surpass methods METHOD` shows the same in a
terminal. This page is generated from the docstrings of `src/surpass/methods/`; after a change run
`python -m surpass.report.gallery`.
"""
UNMEASURED = "Not yet measured."
ALIASES = {"Reduction": get_args(Reduction), "Kind": get_args(Kind)}


def gallery(results: Path) -> str:
    """The whole page as Markdown. results: folder of results files; it may be missing."""
    pages = [describe(name) for name in METHODS]
    measured = read_results(results)
    contents = _table(
        ("method", "what it is", "source"),
        [(f"[`{p.name}`](#{p.name})", p.summary, _arxiv(p.sources[0])) for p in pages],
    )
    aliases = [f"- `{name}`: {', '.join(f'`{v}`' for v in values)}" for name, values in ALIASES.items()]
    types = "\n".join(["\nTypes that several fields share:\n", *aliases])
    return "\n".join([HEAD, contents, types, *(section(page, measured) for page in pages)]) + "\n"


def section(page: MethodDescription, measured: dict[str, list[dict[str, Any]]]) -> str:
    """One method: what it is, equations, source, disagreements of paper and code, fields, measured effect."""
    parts = [f"\n## {page.name}\n", f"{body(page.notes)}\n"]
    parts += [f"Sources: {', '.join(map(_arxiv, page.sources))}.\n", f"### {page.name}: fields\n"]
    parts += [fields_table(page.fields), f"\n### {page.name}: measured effect\n"]
    return "\n".join([*parts, measured_effect(page.name, measured)])


def body(notes: str) -> str:
    """A docstring as Markdown: indented blocks are formulae; what is said of paper against code stands out."""
    parts = []
    for block in notes.split("\n\n"):
        lines = block.splitlines()
        formula = [line for line in lines if line.startswith("    ")]
        if formula:
            parts.append("```text\n" + textwrap.dedent("\n".join(formula)) + "\n```")
        text = "\n".join(line for line in lines if not line.startswith("    "))
        text = re.sub(r"\s*\b(Where\b[^.:]*\bdisagree)\b", r"\n\n**\1**", text).strip()
        if text:
            parts.append(text)
    return "\n\n".join(parts)


def fields_table(fields: Sequence[FieldDescription]) -> str:
    """Every hyper-parameter with its type, default and meaning."""
    rows = [(f"`{f.name}`", _code(f.type), _code(f.default), " ".join(f.doc.split())) for f in fields]
    return _table(("field", "type", "default", "meaning"), rows)


def measured_effect(name: str, measured: dict[str, list[dict[str, Any]]]) -> str:
    """The method's rows beside those of the untrained base and of the methods it extends, its controls."""
    chosen = METHODS[name]
    shown = {"base", *(_labels(n) for n, other in METHODS.items() if issubclass(chosen, other))}
    tables = []
    for title, rows in measured.items():
        if not any(_label(row) == _labels(name) for row in rows):
            continue
        cells = [_cells(row) for row in rows if _label(row) in shown]
        header = ("model", "domain", "pass@1 [95% interval]", "seeds", "tokens trained")
        tables.append(f"From `{title}`:\n\n{_table(header, cells)}")
    return "\n\n".join(tables) or UNMEASURED


def read_results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by file name, of the files that have such rows; others measure something else and are passed over."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        rows = content.get("rows") if isinstance(content, dict) else None
        if isinstance(rows, list) and all(
            {"model", "domain", "pass@1", "low", "high"} <= set(r) for r in rows
        ):
            found[path.name] = [{**row, "seeds": len(content.get("seeds", [0]))} for row in rows]
    return found


def _labels(name: str) -> str:
    """How a method is called in results: by its class (`DrGRPO`) or name (`dr_grpo`), without regard to case and `_`."""
    return METHODS[name].__name__.lower()


def _label(row: dict[str, Any]) -> str:
    return str(row["model"]).lower().replace("_", "")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    value = f"{row['pass@1']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    trained = row.get("tokens_trained")
    return str(row["model"]), str(row["domain"]), value, str(row["seeds"]), f"{trained:,}" if trained else "-"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _code(text: str) -> str:
    # A bar inside a table cell ends the cell, even in code.
    return "`" + text.replace("|", "\\|") + "`"


def _arxiv(identifier: str) -> str:
    return f"[arXiv {identifier}](https://arxiv.org/abs/{identifier})"


if __name__ == "__main__":
    Path("docs/methods.md").write_text(gallery(Path("benchmarks/results")))
