"""The kind of device that programs are compiled for: this process's, or that of a planned machine."""

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
    """A context in which programs are traced for this kind of device; None: that of the process."""
    token = _PLANNED.set(platform)
    try:
        yield
    finally:
        _PLANNED.reset(token)


# Overlap of communication and computation on several GPUs, the default on TPUs. All supported jax versions must know
# these options: an unknown one fails the compilation.
OVERLAPPED_ON_GPUS = MappingProxyType({"xla_gpu_enable_latency_hiding_scheduler": True})


def compiler_options(mesh: Any) -> dict[str, Any] | None:
    """Compiler options of `jax.jit` for this mesh; None leaves everything to XLA_FLAGS and the defaults."""
    several = mesh is not None and mesh.size > 1
    return dict(OVERLAPPED_ON_GPUS) if several and backend_in_use() == "gpu" else None


def options_of_one_run() -> dict[str, Any] | None:
    """Compiler options of `jax.jit` for a program that runs once: on a CPU, less optimisation of the code.

    The numbers equal those of a fully optimised program: the passes that may reorder arithmetic are the same.
    """
    return {"xla_backend_optimization_level": 1} if backend_in_use() == "cpu" else None
