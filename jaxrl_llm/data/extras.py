"""Packages of the `hf` extra, imported where they are used, so that the rest of the library does without them."""

from __future__ import annotations

import importlib
from typing import Any


def imported(module: str) -> Any:
    """A module of the `hf` extra.

    Raises:
      ValueError: if it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"package {module.partition('.')[0]!r} is needed for Hugging Face files but is not installed ({error}); "
            "install it with: pip install 'jaxrl_llm[hf]'"
        ) from error
