"""docs/configuration.md, made of afd/config.py: keys, defaults and bounds from the types, meanings from the source.

`python -m tests.config_page` writes the page; tests/test_architecture.py compares it.
"""

from __future__ import annotations

import ast
import inspect
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec
from msgspec import inspect as types

from afd import config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration

A TOML file has these sections and keys; `--set SECTION.KEY=VALUE` and the flags of a command override it. Unknown keys
and impossible values are refused with one line. `afd up --config FILE --dry-run` prints what each process gets. Times
are in seconds unless the name says otherwise.
"""


def meanings(section: type[Any]) -> dict[str, str]:
    """The string behind each key of a section, those of its base included."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if base.__module__ != config.__name__:
            continue
        body = ast.parse(inspect.getsource(base)).body[0].body  # type: ignore[attr-defined]
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def values(annotation: Any) -> str:
    """What a key takes."""
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, get_args(annotation)))  # in the order in which they were written
    kind = types.type_info(annotation)
    if isinstance(kind, types.EnumType):
        return ", ".join(kind.cls)
    if isinstance(kind, types.BoolType):
        return "true, false"
    if isinstance(kind, types.StrType):
        return "text"
    assert isinstance(kind, types.IntType | types.FloatType)
    number = "whole number" if isinstance(kind, types.IntType) else "number"
    if kind.gt is not None:
        return f"{number} > {kind.gt}"
    if kind.le is None:
        return f"{number} >= {kind.ge}"
    return f"{kind.ge} to {kind.le}"


def page() -> str:
    """The whole text."""
    parts = [HEAD]
    for section in msgspec.structs.fields(config.ClusterConfig):
        told = meanings(section.type)
        summary = " ".join((inspect.getdoc(section.type) or "").split())
        rows = [f"\n## [{section.name}]\n\n{summary}\n\n| key | default | values | |\n|---|---|---|---|\n"]
        for field in msgspec.structs.fields(section.type):
            default = msgspec.json.encode(field.default).decode()  # the same in TOML
            rows.append(f"| `{field.name}` | `{default}` | {values(field.type)} | {told.get(field.name, '')} |\n")
        parts.append("".join(rows))
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
