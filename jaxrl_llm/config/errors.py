"""The error class and the field metadata shared by all sections of a config."""

from __future__ import annotations

from jaxrl_llm.bounds import shortened


class ConfigError(ValueError):
    """A config that cannot be used; the message names the field, the value and the remedy."""

    def __init__(self, message: str):
        super().__init__(shortened(message))


# Metadata of a field that does not affect the numbers of a run: it may change when the run is resumed.
FREE = {"decides_numbers": False}
# Metadata of a field that only affects where, and in which parts, numbers are computed: sums may be reordered.
PLACEMENT = {"decides_numbers": False, "placement": True}
