"""Reinforcement fine-tuning of language models in JAX, from a laptop CPU to a TPU pod.

Sub-packages are imported at their first use, so `import jaxrl_llm` is fast and does not import jax.

>>> import jaxrl_llm
>>> jaxrl_llm.losses.policy_gradient.__name__, jaxrl_llm.Loss.__name__
('policy_gradient', 'Loss')
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrl_llm import (
        advantages,
        data,
        evaluation,
        experience,
        losses,
        models,
        parallel,
        planning,
        reporting,
        rewards,
        rollout,
        run,
        schedules,
        selection,
        statistics,
        training,
    )
    from jaxrl_llm.experience import Experience, Loss, Method, Prompts
    from jaxrl_llm.training import Fill, LossTerm, Reward, Rollout, make_train_step

    __version__: str

# Types for users' functions, and the functions that compose them.
_PROTOCOLS = {
    **dict.fromkeys(("Experience", "Loss", "Method", "Prompts"), "experience"),
    **dict.fromkeys(("Fill", "LossTerm", "Reward", "Rollout", "make_train_step"), "training"),
}

__all__ = [
    "Experience",
    "Fill",
    "Loss",
    "LossTerm",
    "Method",
    "Prompts",
    "Reward",
    "Rollout",
    "__version__",
    "advantages",
    "data",
    "evaluation",
    "experience",
    "losses",
    "make_train_step",
    "models",
    "parallel",
    "planning",
    "reporting",
    "rewards",
    "rollout",
    "run",
    "schedules",
    "selection",
    "statistics",
    "training",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("jaxrl_llm")
        except metadata.PackageNotFoundError:  # a checkout that was never installed
            return "unknown"
    if name in _PROTOCOLS:
        return getattr(importlib.import_module(f"jaxrl_llm.{_PROTOCOLS[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"jaxrl_llm.{name}")
    raise AttributeError(f"module 'jaxrl_llm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
