"""Execution of functions and untrusted code in separate processes, with limits and isolation.

This package does not import jax, so its processes start as fast as Python.
"""

from __future__ import annotations

from jaxrl_llm.sandbox.isolation import Limits, SandboxError, missing
from jaxrl_llm.sandbox.programs import (
    Outcome,
    Program,
    Verdict,
    facilities,
    python_tool,
    require_isolation,
    run_programs,
)
from jaxrl_llm.sandbox.workers import Returned, Workers

__all__ = [
    "Limits",
    "Outcome",
    "Program",
    "Returned",
    "SandboxError",
    "Verdict",
    "Workers",
    "facilities",
    "missing",
    "python_tool",
    "require_isolation",
    "run_programs",
]
