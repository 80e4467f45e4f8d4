"""Overrides of keys that no config has, found without importing jax."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from jaxrl_llm.shipped import kept, unknown_key
from jaxrl_llm.yaml_text import yaml_values


def refuse_unknown_keys(overrides: Iterable[str]) -> None:
    """Raise ValueError for an override `section.key=value` of a key that no config has, without importing jax.

    Keys within lists and functions, and values that YAML cannot read, are left to `config.load_config`.
    """
    given = list(overrides)
    tree = kept("config keys", _config_keys) if given else {}
    for override in given:
        path, _, text = override.partition("=")
        names, prefix, known = path.split("."), "", tree
        while names and known is not None:
            key = names.pop(0)
            if key not in known:
                value: Any = text
                with contextlib.suppress(ValueError):
                    value = yaml_values(text, override)
                for name in reversed(names):
                    value = {name: value}
                raise ValueError(unknown_key(prefix, key, value, known))
            known, prefix = known[key], f"{prefix}{key}."


def _config_keys() -> dict[str, Any]:
    from jaxrl_llm.config.parsing import key_tree  # slow import of jax: the keys are cached

    return key_tree()
