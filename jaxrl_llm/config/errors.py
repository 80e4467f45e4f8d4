"""Errors and rules that the sections of a config share."""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """A config that cannot be used; the message names the field, the value and the remedy."""


# Of a field that decides no number of a run: it may be another when the run is resumed.
FREE = {"decides_numbers": False}


def at_least(owner: str, config: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ValueError(f"{owner}.{name} is {value}; it must be at least {minimum}")
