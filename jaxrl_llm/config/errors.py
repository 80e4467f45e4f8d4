"""Errors and rules that the sections of a config share."""

from __future__ import annotations

from jaxrl_llm.bounds import shortened


class ConfigError(ValueError):
    """A config that cannot be used; the message names the field, the value and the remedy."""

    def __init__(self, message: str):
        super().__init__(shortened(message))


# Of a field that decides no number of a run: it may be another when the run is resumed.
FREE = {"decides_numbers": False}
# Of a field that says where and in which pieces a number is computed: the order of sums may change, and no more.
PLACEMENT = {"decides_numbers": False, "placement": True}
