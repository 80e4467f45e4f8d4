"""The kind of device that programs are made for: that of this process, or of a machine that is planned for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

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
