"""Main memory that compiling took is given back before the program that was compiled runs.

On a CPU a program's arrays live in the same memory, and the C library keeps what the compiler freed: of a step with
eight unrolled layers, three quarters of a GiB.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
# Shorter compilations leave nothing worth the call, which goes over all free memory.
SECONDS = 1.0


@functools.cache
def give_back_after_compiling() -> bool:
    """From now on give freed memory back after each long compilation; False where the C library offers no such call."""
    try:
        trim = ctypes.CDLL(None).malloc_trim  # GNU's
    except (AttributeError, OSError, TypeError):
        return False

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED and duration_secs >= SECONDS:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return True
