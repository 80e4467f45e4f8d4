"""From YAML to a config: files that extend others, overrides, and errors that suggest a remedy; and back."""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pydantic

from jaxrl_llm.addresses import is_address
from jaxrl_llm.bounds import file_bytes, natural, shown, too_long_a_path
from jaxrl_llm.config.errors import ConfigError
from jaxrl_llm.config.inputs import MODEL_KINDS, PretrainedConfig, model_kind
from jaxrl_llm.config.whole import Config
from jaxrl_llm.models.transformer_config import TransformerConfig
from jaxrl_llm.shipped import recipe_path, unknown_key
from jaxrl_llm.yaml_text import MOST_BYTES, MOST_LEVELS, yaml_values

_MOST_BASES = 20
_LONGEST_KEY = 200
_LONGEST_KEPT = 10_000  # letters of a file that is parsed once
_LARGEST = 2**63
_PATHS = ("path", "file", "directory", "_dir", "init_from")  # what keys of paths end with


def load_config(path: str | Path, overrides: Sequence[str] = (), **defaults: Any) -> Config:
    """Read a YAML file, follow `extends`, apply `section.key=value` overrides, and check every name and type.

    Args:
      path: the file.
      overrides: dotted assignments; values are YAML.
      defaults: model fields known to the caller (vocabulary_size), which the file may leave out.

    Raises:
      ConfigError: for an invalid config, naming the field, the value and the remedy.
    """
    return parse_config(read_tree(Path(path)), overrides, **defaults)


def parse_config(tree: Mapping[str, Any], overrides: Sequence[str] = (), **model_defaults: Any) -> Config:
    """A `Config` from plain dictionaries, as `load_config` does from a file."""
    values: dict[str, Any] = _copied(tree)
    for override in overrides:
        _assign(values, override)
    values = _copied(values) if overrides else values
    if isinstance(values.get("init_from"), str):
        path, _, step = values["init_from"].rpartition("@")
        taken = natural(step) if path else None
        branch = {"path": values["init_from"]} if taken is None else {"path": path, "step": taken}
        values["init_from"] = branch
    if values.get("mesh") == "auto":
        values["mesh"] = {}
    for name in ("source", "stages"):  # one entry needs no list
        if name in values and not isinstance(values[name], list):
            values[name] = [values[name]]
    _read_rows_of_data_path(values)
    rollout = values.get("rollout")
    if isinstance(rollout, dict) and not isinstance(rollout.get("plan", []), list):
        plan: Any = rollout["plan"] or {}
        several = isinstance(plan, dict) and "python" not in plan
        rollout["plan"] = [{name: hyper} for name, hyper in plan.items()] if several else [plan]
    networks = values.get("networks")
    if isinstance(networks, dict):
        values["networks"] = {name: _with_origin(network) for name, network in networks.items()}
    if isinstance(values.get("model"), dict) and model_kind(values["model"]) == "checkpoint":
        _refuse_shape(values["model"])
    elif isinstance(values.get("model"), dict):
        values["model"] = model_defaults | {k: v for k, v in values["model"].items() if (k, v) != ("path", None)}
    _known_keys(values, Config, "")
    try:
        return _adapter().validate_python(values)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_explained(problem) for problem in error.errors())) from None


# Sources of judged rows, which are read from data.path where they name no file.
ROW_KINDS = ("pairs", "rankings", "ratings", "labels", "steps", "verdicts")


def _read_rows_of_data_path(values: dict[str, Any]) -> None:
    """Make data.path the file of a source of judged rows without one; it holds no problems then."""
    data = values.get("data")
    if not isinstance(data, dict) or data.get("path") is None:
        return
    for entry in values.get("source", ()):
        kind, hyper = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (None, None)
        if kind in ROW_KINDS and isinstance(hyper, dict) and hyper.get("file") is None:
            entry[kind], values["data"] = {**hyper, "file": data["path"]}, {**data, "path": None}


@functools.cache
def _adapter() -> pydantic.TypeAdapter[Config]:
    return pydantic.TypeAdapter(Config)


def _with_origin(network: Any) -> Any:
    """A network section with the key `from`, a keyword of Python, renamed to the attribute `origin`."""
    if not isinstance(network, dict):
        return {} if network is None else network
    return {"origin" if key == "from" else key: value for key, value in network.items()}


def read_tree(path: Path) -> dict[str, Any]:
    """A YAML file merged over the file that it `extends`: mappings are merged, lists and scalars replaced.

    `extends` is a path relative to the directory of the file, or the name of a shipped recipe.

    Raises:
      ConfigError: for a missing file or recipe, invalid YAML, or files that extend each other in a cycle.
    """
    return _read_tree(path, ())


def _read_tree(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in below:
        raise ConfigError(f"config {path} extends itself through {' -> '.join(p.name for p in below)}; break the cycle")
    try:
        text = file_bytes(path, MOST_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else "; give the path of a YAML file"
        raise ConfigError(f"config {path} does not exist{hint}") from None
    except OSError as error:
        raise ConfigError(f"config {path} cannot be read: {error.strerror}; give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except ValueError as error:
        raise ConfigError(f"config {error}") from None
    tree = _values(text, f"config {path}")
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path} holds {type(tree).__name__}, not a mapping of sections")
    if (base := tree.pop("extends", None)) is not None:
        if len(below) >= _MOST_BASES:
            raise ConfigError(f"config {path} is in a chain of more than {_MOST_BASES} `extends`; shorten the chain")
        tree = _merged(_read_tree(_base_path(path, base), (*below, path)), tree)
    return tree


def _base_path(path: Path, base: Any) -> Path:
    """The file that `extends` refers to: a path relative to the file, or for a bare word a shipped recipe."""
    if not isinstance(base, str) or not base or "\0" in base:
        raise ConfigError(
            f"config {path} has extends {shown(base)}; it must be the path of one YAML file, or the name of a recipe"
        )
    if not base.isidentifier() or (path.parent / base).is_file():
        return path.parent / base
    try:
        return recipe_path(base)
    except ValueError as error:
        raise ConfigError(f"config {path} extends {base!r}: {error}") from None


def _values(text: str, where: str) -> Any:
    try:
        # Most recipes extend the same few files.
        return copy.deepcopy(_parsed(text, where)) if len(text) <= _LONGEST_KEPT else yaml_values(text, where)
    except ValueError as error:
        raise ConfigError(str(error)) from None


_parsed = functools.lru_cache(maxsize=1024)(yaml_values)


def _merged(under: Mapping, over: Mapping) -> dict:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _copied(tree: Any, key: str = "", level: int = 0) -> Any:
    if level > MOST_LEVELS:
        raise ConfigError(f"config key {shown(key)} has more than {MOST_LEVELS} levels of nesting; nest it less")
    if isinstance(tree, Mapping):
        for name in tree:
            if len(str(name)) > _LONGEST_KEY:
                raise ConfigError(f"config key {shown(name)} in {key or 'the file'} is too long for a key; shorten it")
        return {
            str(name): _copied(value, f"{key}.{name}" if key else str(name), level + 1) for name, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [_copied(value, f"{key}.{place}", level + 1) for place, value in enumerate(tree)]
    if isinstance(tree, int) and not -_LARGEST <= tree < _LARGEST:
        raise ConfigError(f"config key {key} is {shown(tree, 60)}, which is beyond 64 bits; give a smaller number")
    if isinstance(tree, str) and ("\0" in tree or any("\ud800" <= character <= "\udfff" for character in tree)):
        raise ConfigError(f"config key {key} is {shown(tree)}, with invalid characters; remove them")
    if isinstance(tree, str) and key.endswith(_PATHS) and not is_address(tree) and (excess := too_long_a_path(tree)):
        raise ConfigError(f"config key {key} is {shown(tree)}, which is too long: {excess}")
    return tree


def _assign(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(
            f"override {shown(override)} is not an assignment; write section.key=value, in single quotes if it has "
            "spaces or braces"
        )
    *sections, last = path.split(".")
    inner: Any = tree
    for section, following in zip(sections, [*sections, last][1:], strict=True):
        inner = _inside(inner, section, following, override)
        if not isinstance(inner, dict | list):
            raise ConfigError(
                f"override {shown(override)} goes through {section!r}, which is not a section; override {section!r} "
                "itself"
            )
    if isinstance(inner, list):
        raise ConfigError(
            f"override {shown(override)} sets one entry of the list {'.'.join(sections)}; give a key of the entry, "
            "or the whole list"
        )
    try:
        inner[last] = _values(text, f"the value of override {shown(override)}")
    except ConfigError as error:
        raise ConfigError(f"{error}; put an override with spaces or braces in single quotes: '{path}=...'") from None
    if (key := _without_space(inner[last])) is not None:
        raise ConfigError(
            f"override {shown(override)} has {key!r} without a space after a colon, which YAML reads as one name; "
            f"write {key.replace(':', ': ', 1)!r}, and the whole override in single quotes: '{path}=...'"
        )


def _without_space(value: Any) -> str | None:
    """A key such as `python:mine:graded` of a mapping without a value; None if there is none."""
    if isinstance(value, list):
        return next((found for one in value if (found := _without_space(one)) is not None), None)
    if not isinstance(value, dict):
        return None
    alone = (str(key) for key, inner in value.items() if inner is None and ":" in str(key))
    return next(alone, None) or _without_space(list(value.values()))


def _inside(tree: Any, section: str, following: str, override: str) -> Any:
    """The value that a section of an override refers to: of a key, or an entry of a list by number, name or function.

    An entry that is only the name of a function becomes a mapping if the override sets one of its hyper-parameters.
    """
    if isinstance(tree, list):
        named = [_names_of(entry) for entry in tree]
        place = natural(section)
        if place is None:
            place = next((i for i, all_ in enumerate(named) if section in all_), -1)
        if not 0 <= place < len(tree):
            known = ", ".join(names[0] for names in named if names) or "no entry with a name"
            raise ConfigError(
                f"override {shown(override)} names {section!r}, which is not in that list; its entries are {known}"
            )
        if tree[place] in (section, following):
            tree[place] = {tree[place]: {}}
        tree = tree[place]
        if not isinstance(tree, dict) or section not in tree:
            (only,) = tree.values() if isinstance(tree, dict) and len(tree) == 1 else (None,)
            return only if isinstance(only, dict) and section == only.get("name") else tree
    child = tree.get(section)
    if child is None or (isinstance(child, str) and child == following):
        tree[section] = child = {} if child is None else {child: {}}
    return child


def _names_of(entry: Any) -> list[str]:
    """The names by which an override can refer to an entry of a list."""
    if isinstance(entry, str):
        return [entry]
    if not isinstance(entry, dict):
        return []
    inner = next(iter(entry.values()), None) if len(entry) == 1 else None
    names = [
        *([inner["name"]] if isinstance(inner, dict) and "name" in inner else []),
        *(entry.keys() if len(entry) == 1 else []),
    ]
    return [entry["name"], *names] if isinstance(entry.get("name"), str) else names


def _known_keys(tree: Any, kind: Any, prefix: str) -> None:
    """Raise ConfigError for unknown keys, with the nearest known one; called before types are checked."""
    if not isinstance(tree, dict):
        raise ConfigError(f"config section {prefix.rstrip('.') or 'the file'} is {shown(tree)}; it must be a mapping")
    known = {f.name: f for f in fields(kind)}
    hints = get_type_hints(kind)
    for key, value in tree.items():
        if key not in known:
            raise ConfigError(unknown_key(prefix, key, value, known))
        section = next(iter(_sections(hints[key])), None)
        if prefix == "" and key == "model" and isinstance(value, dict):
            section = MODEL_KINDS[model_kind(value)]
        if section is not None and value is not None:
            _known_keys(value, section, f"{prefix}{key}.")
        named = [t for t in get_args(hints[key]) if is_dataclass(t)] if get_origin(hints[key]) is dict else []
        if named and isinstance(value, dict):
            for name, inner in value.items():
                _known_keys(inner or {}, named[0], f"{prefix}{key}.{name}.")


def _sections(hint: Any) -> list[Any]:
    """The sections that a key of this type may have as its value."""
    return [] if get_origin(hint) is dict else [t for t in (hint, *get_args(hint)) if is_dataclass(t)]


def key_tree(kind: Any = Config) -> dict[str, Any]:
    """The keys of a config and of its sections; None for a key whose value is no section, or one of several kinds."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        sections = _sections(hint)
        found[name] = key_tree(sections[0]) if len(sections) == 1 and name != "model" else None
    return found


def _refuse_shape(tree: Mapping[str, Any]) -> None:
    """Raise ConfigError for a field that describes the shape of a model beside a checkpoint."""
    shape = {f.name for f in fields(TransformerConfig)} - {f.name for f in fields(PretrainedConfig)}
    if given := sorted(shape & tree.keys()):
        raise ConfigError(
            f"config key model.{given[0]} is {tree[given[0]]!r}, but model.path is {tree['path']!r}, whose config.json "
            f"defines it; leave out {', '.join('model.' + name for name in given)}"
        )


def _explained(problem: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in problem["loc"] if part not in MODEL_KINDS)
    if problem["type"] == "missing":
        return f"config key {where} is missing; add it"
    if problem["type"] == "value_error":
        return f"config: {problem['msg'].removeprefix('Value error, ')}"
    if problem["type"] == "dataclass_type":
        return f"config key {where} is {shown(problem['input'])}; it must be a mapping of keys"
    if problem["type"] == "tuple_type":
        return (
            f"config key {where} is {shown(problem['input'])}; it must be a list, such as [{shown(problem['input'])}]"
        )
    if problem["input"] is None:
        return f"config key {where} is null; give a value, or leave the key out for its default"
    return f"config key {where} is {shown(problem['input'])}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def as_tree(config: Config) -> dict[str, Any]:
    """Plain dictionaries and lists, ready for YAML or JSON; `parse_config` reads them back to an equal config."""
    return _copied(asdict(config))


def stage_trees(config: Config) -> list[dict[str, Any]]:
    """The stages of a run as whole configs in plain dictionaries: each stage is merged over the rest of the config."""
    tree = as_tree(config)
    stages = tree.pop("stages")
    return [
        _merged(tree | {"name": f"{config.name}"}, {k: v for k, v in stage.items() if k != "name"}) for stage in stages
    ]
