"""Writes docs/config.md from the dataclasses of `jaxrl_llm.config`. Run by docs/build.py."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from blocks import escaped, markdown_table

from jaxrl_llm.config import Config

CONFIG_PAGE = Path(__file__).parent / "config.md"
INTRODUCTION = """\
# Every key of a config

Written by `python docs/build.py` from the dataclasses of `jaxrl_llm/config/`; do not edit it. A config is a YAML file.
`extends: other.yaml` takes another one as its base, a path from the file's directory or the name of a shipped recipe
(`extends: demo`): mappings merge, lists and single values are replaced. Any key can be set on the command line,
`section.key=value`, with a YAML value; an entry of a list is named by number, `name` or function:
`losses.clipped_surrogate.clip_high=0.3`, `stages.rl.training.steps=50`.

What the lists `rewards`, `credit`, `losses`, `source`, `rollout.plan`, `views` and `data.selection` may hold are
functions: [methods](methods.md) has them all with their hyper-parameters, [the engine](engine.md) explains how they go
together. `jaxrl explain CONFIG` shows what a config comes to, defaults included.

Keys marked *free* decide no number: they may change when a run is resumed. So may the keys that say how functions,
judges and environments are called, such as `deadline_s`: [resume and branch](how_to/resume.md) lists them.
"""
# What the docstring of `Config` does not say of its own keys.
TOP = {
    "name": "of the run; the run directory is `runs/NAME`",
    "losses": "loss functions, with `coefficient` beside their hyper-parameters",
    "rewards": "reward functions, with `weight` beside their hyper-parameters; the first is the verifier",
    "credit": "`name: function`, in order; what becomes of rewards",
    "seed": "of everything that is random",
    "run_dir": "where the run is written, a directory or an address (s3://, gs://, ...); left out, `runs/NAME`",
    "environment": "options of the task's environment, or `python: module:function` and its keyword arguments",
    "views": "functions that make another sequence of a row, by name",
    "source": "where rows come from: `sampler`, `replay`, `demonstrations`, `solved_answers`, `pairs`, `labels`, ...",
    "stages": "further steps of the run, each with a `name` and the sections in which it differs",
    "task": "a built-in task",
    "networks": "networks beside the policy, by name",
    "about": "what the recipe stands for; shown by `jaxrl methods`",
    "shows": "what a user should see move, by metric: `{correct_share: rises, completion_tokens: falls}`",
}


def config_page() -> str:
    """The whole of docs/config.md."""
    parts = [INTRODUCTION.strip()]
    for title, kind, meaning in _sections(Config, ""):
        rows = [[f"`{key}`", told, default, escaped(text)] for key, told, default, text in _keys(kind)]
        about = f"{escaped(meaning)}\n\n" if meaning else ""
        parts.append(f"## {title}\n\n{about}{markdown_table(['key', 'type', 'default', 'meaning'], rows)}")
    return "\n\n".join(parts) + "\n"


def _sections(kind: type, prefix: str) -> Iterator[tuple[str, type, str]]:
    """(title, dataclass, what it is) of a config and of all sections in it, each once."""
    yield prefix or "At the top", kind, "" if kind is Config else _first_line(kind)
    hints = get_type_hints(kind)
    for one in fields(kind):
        for inner in _dataclasses(hints[one.name]):
            several = get_origin(hints[one.name]) is dict
            name = f"{prefix}.{one.name}" if prefix else one.name
            several_kinds = len(_dataclasses(hints[one.name])) > 1
            title = f"{name}.NAME" if several else name
            first, *rest = _sections(inner, title)
            about = _first_line(inner)
            named = f"{title}: {about[:1].lower()}{about[1:].rstrip('.')}" if several_kinds else title
            yield named, *first[1:]
            yield from rest


def _dataclasses(hint: Any) -> list[type]:
    """The dataclasses that a type speaks of."""
    if is_dataclass(hint):
        return [hint] if isinstance(hint, type) else []
    found: list[type] = []
    for inner in get_args(hint):
        found += [one for one in _dataclasses(inner) if one not in found]
    return found


def _keys(kind: type) -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of a dataclass's attributes that are not sections themselves."""
    hints, meanings = get_type_hints(kind), {} if kind is not Config else dict(TOP)
    for base in reversed(kind.__mro__):
        meanings |= attributes_of(inspect.getdoc(base) or "")
    for one in fields(kind):
        inner = _dataclasses(hints[one.name])
        if inner:
            told = "section, by name" if get_origin(hints[one.name]) is dict else "section"
            default, text = "", meanings.get(one.name, "") or _first_line(inner[0])
        else:
            told, default, text = f"`{_type(hints[one.name])}`", _default(one), meanings.get(one.name, "")
        free = one.metadata.get("decides_numbers") is False
        yield one.name, told.replace("|", "\\|"), default, f"{text}{' *(free)*' if free else ''}"


def attributes_of(docstring: str) -> dict[str, str]:
    """Name -> meaning of the block `Attributes:` of a docstring; names that share a line share their meaning."""
    found: dict[str, str] = {}
    _, _, block = docstring.partition("Attributes:\n")
    names: list[str] = []
    for line in block.splitlines():
        if not line.strip():
            break
        entry = re.match(r"  ([\w, ]+): (.*)", line)
        if entry and not line.startswith("   "):
            names = [name.strip() for name in entry.group(1).split(",")]
            found |= dict.fromkeys(names, entry.group(2))
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _first_line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").splitlines()[0]


def _default(one: Any) -> str:
    if one.default is MISSING and one.default_factory is MISSING:
        return "*needed*"
    value = one.default if one.default is not MISSING else one.default_factory()
    if value is None or value == () or value == {} or value == "":
        return ""
    listed = list(value) if isinstance(value, tuple) else value
    return f"`{str(listed).lower() if isinstance(value, bool) else listed}`"


def _type(hint: Any) -> str:
    """A type as a user writes its values."""
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "anything"}
    if hint in names:
        return names[hint]
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(str(value) for value in inner)
    if origin in (Union, types.UnionType):
        return " | ".join(_type(one) for one in inner)
    if origin in (tuple, list):
        return f"list of {_type(inner[0])}" if inner else "list"
    if origin is dict:
        return "mapping"
    return getattr(hint, "__name__", str(hint))
