"""Shipped recipes by name, and a cache for lists whose computation needs jax."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxrl_llm import __version__
from jaxrl_llm.bounds import shown, too_long_a_path


def nearest(name: str, choices: Iterable[str]) -> str:
    """A phrase for messages that suggests the closest known name, or lists all known names."""
    known = list(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(known))


def recipe_directory() -> Path:
    """configs/methods: inside the package if installed from a wheel, else beside the package."""
    package = Path(__file__).parent
    inside = package / "configs" / "methods"
    return inside if inside.is_dir() else package.parent / "configs" / "methods"


def method_files() -> list[Path]:
    """All files below configs/methods: the recipes of published methods and their bases."""
    return sorted(recipe_directory().rglob("*.yaml"), key=lambda file: file.stem)


def recipe_path(name: str) -> Path:
    """The file of a shipped recipe: a published method, or another recipe such as demo.

    Raises:
      ValueError: for an unknown name, with the nearest known one.
    """
    files = {file.stem: file for file in (*recipe_directory().parent.glob("*.yaml"), *method_files())}
    if name not in files:
        raise ValueError(f"there is no recipe {name!r}; {nearest(name, files)} (or give the path of a YAML file)")
    return files[name]


def config_path(word: str) -> Path:
    """The config file for a command-line word: a path, or a bare word that is the name of a recipe.

    Raises:
      ValueError: for a missing file, with the nearest one.
    """
    path = Path(word)
    # A folder of runs may have the name of a recipe. Both are False for a name that is too long.
    if os.path.exists(path) and not (word.isidentifier() and os.path.isdir(path)):
        return path
    if too_long_a_path(word) is not None:
        raise ValueError(f"config {word[:60]}... does not exist: its name is too long; give the path of a YAML file")
    if word.isidentifier():
        return recipe_path(word)
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
    hint = f"did you mean {path.parent / near[0]}?" if near else "give the path of a YAML file, or the name of a recipe"
    raise ValueError(f"config {word} does not exist; {hint}")


def unknown_key(prefix: str, key: str, value: Any, known: Iterable[str]) -> str:
    """A message about a key that no config has; `prefix` is its section with a point behind, or ""."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{close[0]}?" if close else f"known keys: {', '.join(known)}"
    return f"config key {prefix}{key} (value {shown(value)}) does not exist; {hint}"


def kept(name: str, make: Callable[[], Any]) -> Any:
    """The result of `make` as JSON values, cached on disk until a file of the package or a recipe changes.

    Importing all methods takes seconds; reading the cache does not.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxrl_llm" / "lists"
    files = sorted([*Path(__file__).parent.rglob("*.py"), *recipe_directory().parent.rglob("*.yaml")])
    stamps = [(str(file), (found := file.stat()).st_size, found.st_mtime_ns) for file in files]
    key = hashlib.sha256(repr((__version__, name, stamps)).encode()).hexdigest()[:16]
    place = cache / f"{''.join(c if c.isalnum() else '_' for c in name)}.json"
    try:
        held = json.loads(place.read_text())
        if held["key"] == key:
            return held["value"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    value = json.loads(json.dumps(make(), default=str))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partial = place.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"key": key, "value": value}))
        partial.replace(place)
    except OSError:  # without a writable home the list is recomputed each time
        pass
    return value
