"""Scalar heads: a linear read-out of hidden states, for value models and token reward models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxrl_llm.models.model import Model
from jaxrl_llm.models.parameters import ParameterSpec, initialise


def hidden_width(model: Model) -> int:
    """Width of the model's hidden states, found without computing any."""
    token = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0))
    return jax.eval_shape(lambda p: model.apply(p, token, token, None)[0], params).shape[-1]


def head_specs(width: int, outputs: int) -> dict[str, ParameterSpec]:
    """The parameters of a head. Small at first, so that its outputs start near 0."""
    return {"weight": ParameterSpec((width, outputs), ("embed", None), 1.0 / (width + 1))}


def init_head(model: Model, key: Array, *, outputs: int) -> PyTree:
    """Parameters of a head for the hidden states of `model`.

    Args:
      model: whose hidden states it reads.
      key: random key.
      outputs: numbers a token.

    Returns:
      {"weight": [D, outputs]}.
    """
    return initialise(head_specs(hidden_width(model), outputs), key)


def head_outputs(head: PyTree, hidden: Float[Array, "*B D"]) -> Float[Array, "*B N"]:
    """hidden @ weight, in float32."""
    return jnp.einsum("...d,dn->...n", hidden.astype(jnp.float32), head["weight"].astype(jnp.float32))


def at_first(values: Float[Array, "B T ..."], mask: Float[Array, "B T"]) -> Float[Array, "B ..."]:
    """Each row's entry at its first token that counts; the first entry where none does."""
    first: Int[Array, "B"] = jnp.argmax(mask > 0, axis=1)
    return jax.vmap(lambda row, i: row[i])(values, first)
