"""Code that may hang, crash or do harm: in processes of its own, with limits, and in isolation where a model wrote it.

This room imports nothing of jax: its processes start in the time that Python takes.
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
