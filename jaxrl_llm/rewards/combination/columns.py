"""Columns of `reward_components` by the names that the recipe gives its reward functions."""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float


def reward_column(
    reward_components: Float[Array, "B K"], *, column: str, reward_names: tuple[str, ...]
) -> Float[Array, "B"]:
    """One reward by its name, before weights, to be filled as a field of its own by an entry of credit.

    Args:
      reward_components: one column per reward function.
      column: name of the reward function in the recipe.
      reward_names: names of the columns in their order; filled from the run.

    Returns:
      One reward per row, float32; NaN where it does not apply.

    Raises:
      ValueError: for a name that no column has.

    >>> reward_column(jnp.array([[1.0, 0.5]]), column="short", reward_names=("exact_answer", "short")).tolist()
    [0.5]
    """
    return named_columns(reward_components, reward_names, [column])[0]


def named_columns(
    reward_components: Float[Array, "B K"], reward_names: Sequence[str], wanted: Sequence[str]
) -> list[Float[Array, "B"]]:
    """Columns by name, in the order of `wanted`, float32.

    Raises:
      ValueError: for another number of names than of columns, or a name that no column or more than one column has.
    """
    chex.assert_rank(reward_components, 2)
    if len(reward_names) != reward_components.shape[1]:
        raise ValueError(
            f"reward_names is {tuple(reward_names)}, but there are {reward_components.shape[1]} reward components; "
            "give one name for each reward function"
        )
    for name in wanted:
        if (found := list(reward_names).count(name)) != 1:
            raise ValueError(
                f"{name!r} is asked for by name, but {found or 'none'} of the rewards {', '.join(reward_names)} "
                f"{'have' if found else 'has'} it; list it under rewards, with `name: {name}` beside its "
                "hyper-parameters where a function is listed twice"
            )
    return [reward_components[:, list(reward_names).index(name)].astype(jnp.float32) for name in wanted]
