"""Returns the memory used by compilation to the system before the compiled program runs.

On a CPU the arrays of a program need the same memory, and the C library keeps memory that the compiler has freed: for a
step with eight unrolled layers, three quarters of a GiB.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
# After shorter compilations the call, which scans all free memory, is not worth its time.
SECONDS = 1.0


@functools.cache
def give_back_after_compiling() -> bool:
    """Return freed memory after each long compilation from now on; False if the C library offers no such call."""
    try:
        trim = ctypes.CDLL(None).malloc_trim  # GNU's
    except (AttributeError, OSError, TypeError):
        return False

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED and duration_secs >= SECONDS:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return True
