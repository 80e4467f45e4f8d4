"""Options of orbax for processes with private disks: each process writes its own arrays and all metadata.

Arrays are written as one file per chunk (zarr), instead of a database that process 0 merges: the union of the files of
all processes in one directory is the checkpoint.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

# Not a public name of orbax; without it random keys are not written.
from orbax.checkpoint._src.metadata.array_metadata_store import Store


def all_write(apart: bool) -> Any:
    """Orbax's options for processes with private disks (`apart`), or a shared one."""
    return ocp.options.MultiprocessingOptions(primary_host=None if apart else 0)


def directories_first() -> Any:
    """Orbax's options for processes with a disk each: directories are made before anything is written.

    Made in the background, they are announced to all processes by the first that has made its own.
    """
    return ocp.options.AsyncOptions(create_directories_asynchronously=False)


def item_handlers() -> dict[str, Any]:
    """Of a manager of checkpoints whose processes have a disk each."""
    return {"state": tree_handler(), "meta": ocp.JsonCheckpointHandler(multiprocessing_options=all_write(True))}


def tree_handler() -> Any:
    """A handler that writes the arrays of a tree on this process, also if it is not process 0."""
    arrays = type_handlers.ArrayHandler(primary_host=None, array_metadata_store=Store(primary_host=None))
    registry = type_handlers.create_type_handler_registry(
        (jax.Array, arrays), (int, type_handlers.ScalarHandler()), (np.ndarray, type_handlers.NumpyHandler())
    )
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, multiprocessing_options=all_write(True), type_handler_registry=registry
    )
