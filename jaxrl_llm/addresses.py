"""Storage addresses, such as s3://bucket/runs/demo, as opposed to local paths."""

from __future__ import annotations

import os
from pathlib import Path


def is_address(path: str | os.PathLike | None) -> bool:
    """Whether a path is an address and not a local directory.

    >>> is_address("s3://bucket/run"), is_address("runs/demo")
    (True, False)
    """
    return path is not None and "://" in os.fspath(path)


def working_directory(address: str) -> Path:
    """The local working copy of a run at an address: a directory under XDG_CACHE_HOME or ~/.cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    scheme, _, rest = address.partition("://")
    return cache.joinpath(
        "jaxrl_llm", "runs", scheme, *(part for part in rest.split("/") if part not in ("", ".", ".."))
    )
