"""Writes docs/api.md: the public names of the rooms that recipes do not name. Run by docs/build.py."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

API_PAGE = Path(__file__).parent / "api.md"
INTRODUCTION = """\
# Python

The public functions and classes of every room, written by `python docs/build.py` from their docstrings; do not edit it.
Rewards, advantages, losses, selections and schedules are in [methods](methods.md), the keys of a config in
[config](config.md).
"""
ROOMS = (
    "training",
    "experience",
    "signatures",
    "statistics",
    "rollout",
    "rollout.plans",
    "models",
    "data",
    "evaluation",
    "parallel",
    "sandbox",
)


def api_page() -> str:
    """The whole of docs/api.md."""
    parts = [INTRODUCTION.strip()]
    for room in ROOMS:
        module = importlib.import_module(f"jaxrl_llm.{room}")
        parts.append(f"## jaxrl_llm.{room}\n\n{_prose(inspect.getdoc(module) or '')}")
        parts += [_section(name, getattr(module, name)) for name in sorted(_public(module), key=str.lower)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _public(module: Any) -> list[str]:
    """What a room offers; of a module without `__all__`, what it defines itself."""
    offered = getattr(module, "__all__", None)
    if offered is None:
        offered = [
            n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__ and n[0] != "_"
        ]
    return [name for name in offered if callable(getattr(module, name)) and inspect.getdoc(getattr(module, name))]


def _section(name: str, thing: Any) -> str:
    """Signature and docstring of one name."""
    kind = "class" if inspect.isclass(thing) else "def"
    parts = [f"### {name}", f"```python\n{kind} {name}{_signature(thing)}\n```"]
    return "\n\n".join([*parts, f"```text\n{inspect.getdoc(thing)}\n```"])


def _signature(thing: Any) -> str:
    """As it is written: a parameter a line where one line would be long."""
    try:
        declared = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    told, keyword_only = [], False
    for p in declared.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            told, keyword_only = [*told, "*"], True
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        note = "" if p.annotation is p.empty else f": {_annotation(p.annotation)}"
        default = "" if p.default is p.empty else f" = {_default(p.default)}"
        told.append(f"{stars}{p.name}{note}{default}")
    back = declared.return_annotation
    arrow = "" if back in (declared.empty, None, "None") or inspect.isclass(thing) else f" -> {_annotation(back)}"
    line = f"({', '.join(told)}){arrow}"
    return line if len(line) < 100 else "(\n    " + ",\n    ".join(told) + f",\n){arrow}"


def _annotation(value: Any) -> str:
    text = value if isinstance(value, str) else inspect.formatannotation(value)
    return re.sub(r"\bjaxrl_llm(\.\w+)*\.(\w+)", r"\2", text)


def _default(value: Any) -> str:
    """A default as text; of what has no short form, its name."""
    text = repr(value)
    short = len(text) <= (400 if isinstance(value, str | tuple) else 40)
    return text if short and not text.startswith("<") else getattr(value, "__name__", type(value).__name__)


def _prose(text: str) -> str:
    return text.replace("<", "&lt;")
