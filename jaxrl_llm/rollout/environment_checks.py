"""Checks of environments before anything is compiled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.experience import Prompts
from jaxrl_llm.rollout.environments import Environment, Step, starts


def require_environment(environment: Environment, prompts: Prompts, *, vocabulary_size: int | None = None) -> None:
    """Check the limits of an environment, and the results of `reset` and `step`, before anything is compiled.

    Args:
      environment: the environment to check.
      prompts: any prompts of the widths of the run; only their shapes are read.
      vocabulary_size: size of the policy's vocabulary; None leaves ids unchecked.

    Raises:
      ValueError: naming the field or the part of `step`'s result, and the remedy.
    """
    require_limits(environment, vocabulary_size)
    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), jax.eval_shape(starts, prompts))
    key = jax.eval_shape(lambda: jax.random.key(0))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    turn = jax.ShapeDtypeStruct((environment.max_turn_tokens,), jnp.int32)
    state = jax.eval_shape(environment.reset, row, key)
    made = jax.eval_shape(environment.step, state, turn, number, key)
    if not isinstance(made, tuple) or len(made) != len(Step._fields):
        raise ValueError(
            f"the environment's step returns a {type(made).__name__}; it must return Step({', '.join(Step._fields)})"
        )
    made = Step(*made)
    before, after = (jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree) for tree in (state, made.state))
    if jax.tree.structure(state) != jax.tree.structure(made.state) or before != after:
        raise ValueError(
            f"the environment's step turns a state of {before} into one of {after}; both must have the same structure, "
            "shapes and types, so cast values that differ (for example jnp.int32(0) in reset)"
        )
    wanted: dict[str, tuple[tuple[int, ...], Any, str]] = {
        "observation": ((environment.max_observation_tokens,), jnp.integer, "max_observation_tokens token ids"),
        "observation_length": ((), jnp.integer, "one integer"),
        "reward": ((), jnp.floating, "one float"),
        "done": ((), jnp.bool_, "one boolean"),
        "duration": ((), jnp.floating, "one float"),
    }
    for name, (shape, kind, meaning) in wanted.items():
        found = getattr(made, name)
        if getattr(found, "shape", None) != shape or not jnp.issubdtype(found.dtype, kind):
            raise ValueError(
                f"the environment's step returns {name} of shape {getattr(found, 'shape', None)} and type "
                f"{getattr(found, 'dtype', type(found).__name__)}; it must be {meaning}, shape {shape}"
                + (
                    ": pad the observation, or raise max_observation_tokens to its longest"
                    if name == "observation"
                    else ""
                )
            )


def require_limits(environment: Any, vocabulary_size: int | None = None) -> None:
    """Check the limits of an environment of either form.

    Raises:
      ValueError: naming the limit and the remedy.
    """
    purpose = {
        "max_turns": "it stops an environment that never ends",
        "max_turn_tokens": "it stops a turn that never ends",
        "max_observation_tokens": "it is the width reserved for every observation",
    }
    for name, why in purpose.items():
        value = getattr(environment, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"the environment's {name} is {value!r}; set it to an integer of at least 1: {why}")
    ids = environment.end_of_turn_ids
    known = all(isinstance(i, int) and 0 <= i < (vocabulary_size or i + 1) for i in ids)
    if not ids or not known:
        raise ValueError(
            f"the environment's end_of_turn_ids is {ids!r}; set it to the ids that end a turn, also end of sequence; "
            + ("ids start at 0" if vocabulary_size is None else f"ids are below {vocabulary_size}, the vocabulary size")
        )
