"""All methods by name, methods of the user's own, and what each says of itself."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import re
import sys
import textwrap
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from surpass.methods.base import Method
from surpass.methods.brts import BRTS
from surpass.methods.context_distillation import ContextDistillation
from surpass.methods.dapo import DAPO
from surpass.methods.decoupling import Decoupling
from surpass.methods.dr_grpo import DrGRPO
from surpass.methods.exopd import ExOPD
from surpass.methods.gkd import GKD
from surpass.methods.grpo import GRPO
from surpass.methods.gspo import GSPO
from surpass.methods.mad_opd import MADOPD, OPAD
from surpass.methods.minillm import MiniLLM
from surpass.methods.opd import OPD
from surpass.methods.paced import PACED
from surpass.methods.reopd import REOPD
from surpass.methods.rethinking_opd import RethinkingOPD
from surpass.methods.rloo import RLOO
from surpass.methods.sequence_kd import SequenceKD
from surpass.methods.sft import SFT
from surpass.methods.sod import SOD
from surpass.methods.supervised_kd import SupervisedKD
from surpass.methods.tip import TIP
from surpass.methods.trd import TRD
from surpass.methods.uni_opd import UniOPD

METHODS: dict[str, type[Method]] = {
    "sft": SFT,
    "sequence_kd": SequenceKD,
    "supervised_kd": SupervisedKD,
    "gkd": GKD,
    "minillm": MiniLLM,
    "opd": OPD,
    "exopd": ExOPD,
    "reopd": REOPD,
    "uni_opd": UniOPD,
    "tip": TIP,
    "paced": PACED,
    "rethinking_opd": RethinkingOPD,
    "brts": BRTS,
    "decoupling": Decoupling,
    "trd": TRD,
    "sod": SOD,
    "mad_opd": MADOPD,
    "opad": OPAD,
    "context_distillation": ContextDistillation,
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "rloo": RLOO,
}


@dataclass(frozen=True)
class FieldDescription:
    """One hyper-parameter: its name, type and default as text, and what its docstring says."""

    name: str
    type: str
    default: str
    doc: str


@dataclass(frozen=True)
class MethodDescription:
    """What `surpass methods` shows.

    summary: one line. equation: the formulae, dedented. notes: the whole page, equation included.
    sources: arXiv ids, the method's own first. fields: in the order they are declared, base class first.
    """

    name: str
    summary: str
    equation: str
    notes: str
    sources: tuple[str, ...]
    fields: tuple[FieldDescription, ...]


def method_class(name: str) -> type[Method]:
    """The class of a method: a known name, or one's own as `path/file.py:Class` or `module:Class`.

    Raises ValueError for an unknown name (with the nearest known one) and for a class that is not a method.
    """
    if ":" in name:
        return _own(name)
    if name in METHODS:
        return METHODS[name]
    normal = name.lower().replace("-", "_").replace(" ", "_")
    near = difflib.get_close_matches(normal, METHODS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"unknown method {name!r}; {hint}Known methods: {', '.join(METHODS)}; "
        "your own: path/file.py:Class or module:Class"
    )


def describe(name: str) -> MethodDescription:
    """Summary, equation, source and hyper-parameters of a method, read from its docstrings."""
    chosen = method_class(name)
    notes = (sys.modules[chosen.__module__].__doc__ or "").strip()
    own = inspect.getdoc(chosen) or notes
    sources = re.findall(r"\b\d{4}\.\d{5}\b", f"{own}\n{notes}")
    return MethodDescription(
        name=name,
        summary=own.strip().splitlines()[0] if own.strip() else "",
        equation=_indented(notes),
        notes=notes,
        sources=tuple(dict.fromkeys(sources)),
        fields=_fields(chosen),
    )


def _own(name: str) -> type[Method]:
    where, _, class_name = name.rpartition(":")
    module = _module(where, name)
    chosen = getattr(module, class_name, None)
    if chosen is None:
        found = [n for n, value in vars(module).items() if _is_method(value)]
        raise ValueError(f"{where} has no {class_name!r}; methods found there: {', '.join(found) or 'none'}")
    if not _is_method(chosen):
        raise ValueError(
            f"{name} is not a method: expected a class derived from surpass.methods.base.Method and decorated with "
            "@dataclass(kw_only=True)"
        )
    return chosen


def _module(where: str, name: str) -> ModuleType:
    if not where.endswith(".py"):
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"cannot import the method {name!r}: {error}; give a file (path/file.py:Class) or an importable module"
            ) from error
    path = Path(where).resolve()
    if not path.is_file():
        raise ValueError(f"cannot read the method {name!r}: there is no file {where}")
    key = f"surpass_own_{path.stem}_{abs(hash(path)):x}"
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their annotations up in sys.modules, so the module must be there before it runs.
    sys.modules[key] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module


def _is_method(value: Any) -> bool:
    # A class without its own decorator would inherit the parent's fields and lose its own.
    return (
        inspect.isclass(value)
        and issubclass(value, Method)
        and is_dataclass(value)
        and "__dataclass_fields__" in vars(value)
    )


def _indented(text: str) -> str:
    """The indented lines of a docstring, runs of them separated by an empty line."""
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("    "):
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return "\n\n".join(textwrap.dedent("\n".join(block)) for block in blocks if block)


def _fields(chosen: type[Method]) -> tuple[FieldDescription, ...]:
    """Types, defaults and attribute docstrings; the class nearest in the line of descent has the last word."""
    types: dict[str, str] = {}
    docs: dict[str, str] = {}
    for level in reversed(chosen.__mro__):
        if not issubclass(level, Method):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(level))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, after in zip(tree.body, [*tree.body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            attribute = statement.target.id
            types[attribute] = ast.unparse(statement.annotation)
            if (
                isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                docs[attribute] = inspect.cleandoc(after.value.value)
    return tuple(
        FieldDescription(f.name, types.get(f.name, str(f.type)), _default(f), docs.get(f.name, ""))
        for f in fields(chosen)  # type: ignore[arg-type]
    )


def _default(field: Any) -> str:
    if field.default is not MISSING:
        return repr(field.default)
    return repr(field.default_factory()) if field.default_factory is not MISSING else "required"
