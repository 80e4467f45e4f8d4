"""Optional packages, imported where they are used, so that the rest of the library works without them."""

from __future__ import annotations

import importlib
from typing import Any

_FOR = {
    "hf": "Hugging Face files",
    "parquet": "Parquet and Arrow files",
    "datasets": "data sets of the hub",
    "textworld": "TextWorld",
}


def imported(module: str, extra: str = "hf") -> Any:
    """Import a module of an extra.

    Raises:
      ValueError: if it is not installed; names the install command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"package {module.partition('.')[0]!r} is needed for {_FOR[extra]} but is not installed ({error}); "
            f"install it with: pip install 'jaxrl_llm[{extra}]'"
        ) from error
