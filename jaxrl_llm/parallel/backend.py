"""The kind of device that programs are made for: that of this process, or of a machine that is planned for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import jax

_PLANNED: ContextVar[str | None] = ContextVar("planned backend", default=None)


def backend_in_use() -> str:
    """ "cpu", "gpu" or "tpu": what "auto" choices look at."""
    return _PLANNED.get() or jax.default_backend()


@contextmanager
def planned_for(platform: str | None) -> Iterator[None]:
    """Programs are traced for this kind of device; None leaves that of the process."""
    token = _PLANNED.set(platform)
    try:
        yield
    finally:
        _PLANNED.reset(token)


# Communication of several GPUs under computation; XLA does so by itself on TPUs. Every jax in our range must know the
# options that stand here: an unknown one fails the compilation.
OVERLAPPED_ON_GPUS = MappingProxyType({"xla_gpu_enable_latency_hiding_scheduler": True})


def compiler_options(mesh: Any) -> dict[str, Any] | None:
    """What `jax.jit` tells the compiler of a program for this mesh; None leaves all to XLA_FLAGS and its defaults."""
    several = mesh is not None and mesh.size > 1
    return dict(OVERLAPPED_ON_GPUS) if several and backend_in_use() == "gpu" else None


def options_of_one_run() -> dict[str, Any] | None:
    """What `jax.jit` tells the compiler of a program that runs once: on a CPU, not to spend seconds on its code.

    The numbers are those of a program that is optimised fully: the passes that may reorder arithmetic are the same.
    """
    return {"xla_backend_optimization_level": 1} if backend_in_use() == "cpu" else None
