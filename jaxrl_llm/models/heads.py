"""Heads: outputs computed from hidden states, for value models, token-level rewards and sequence rewards.

A head is a small tree of parameters. The caller chooses its inputs: hidden states of the policy (a shared backbone,
which the head's loss then also trains), or of a copy (its own backbone).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxrl_llm.models.model import Model
from jaxrl_llm.models.parameters import ParameterSpec, initialise

Backbone = Literal["own", "shared"]


@dataclass(frozen=True)
class HeadConfig:
    """Sizes and initialisation of a head.

        one layer     h W                 W ~ normal(0, initial_scale / (D + 1))
        two layers    silu(h V + b) W     W ~ normal(0, initial_scale / (M + 1)), V ~ normal(0, 1 / sqrt(D)), b = 0

    Hidden states are normalised, with entries of about 1, so the outputs of a new head are about
    initial_scale / sqrt(D), or six tenths of initial_scale / sqrt(M).

    Attributes:
      outputs: N, numbers a token.
      layers: 1 or 2.
      width: M, of the hidden layer; None takes that of the model. With two layers only.
      initial_scale: of the last layer; 0 makes every first output exactly 0.
    """

    outputs: int = 1
    layers: Literal[1, 2] = 1
    width: int | None = None
    initial_scale: float = 1.0

    def __post_init__(self):
        if self.outputs < 1:
            raise ValueError(f"head.outputs is {self.outputs}; it must be at least 1")
        if self.layers not in (1, 2):
            raise ValueError(f"head.layers is {self.layers}; a head has 1 layer or 2")
        if self.width is not None and self.layers == 1:
            raise ValueError(
                f"head.width is {self.width}, but a head of one layer has no hidden layer; set head.layers to 2, or "
                "leave the width out"
            )
        if self.width is not None and self.width < 1:
            raise ValueError(f"head.width is {self.width}; it must be at least 1")
        if not (math.isfinite(self.initial_scale) and self.initial_scale >= 0):
            raise ValueError(
                f"head.initial_scale is {self.initial_scale}; it must be 0 (outputs start at exactly 0) or above"
            )


def hidden_width(model: Model) -> int:
    """Width of the model's hidden states, found by abstract evaluation."""
    token = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0))
    return jax.eval_shape(lambda p: model.apply(p, token, token, None)[0], params).shape[-1]


def head_specs(width: int, config: HeadConfig) -> dict[str, ParameterSpec]:
    """The parameters of a head that reads hidden states of this width."""
    specs, inputs = {}, width
    if config.layers == 2:
        inputs = config.width or width
        specs = {
            "hidden": ParameterSpec((width, inputs), ("embed", None), width**-0.5),
            "hidden_bias": ParameterSpec((inputs,), (None,), 0.0, fill=0.0),
        }
    axes = (None if config.layers == 2 else "embed", None)
    scale = config.initial_scale / (inputs + 1)
    return specs | {"weight": ParameterSpec((inputs, config.outputs), axes, scale, fill=0.0)}


def init_head(model: Model, key: Array, config: HeadConfig = HeadConfig()) -> dict[str, Array]:
    """Parameters of a head for the hidden states of `model`.

    Args:
      model: the model whose hidden states it reads.
      key: random key.
      config: sizes and initial scale.

    Returns:
      {"weight": [D, N]}; with two layers {"hidden": [D, M], "hidden_bias": [M], "weight": [M, N]}.
    """
    return initialise(head_specs(hidden_width(model), config), key)


def from_policy(
    model: Model, policy: PyTree, key: Array, config: HeadConfig = HeadConfig(), *, backbone: Backbone = "own"
) -> dict[str, PyTree]:
    """Parameters of a model with a head, initialised from a policy: a new head, and a copy of the policy as backbone.

    Args:
      model: the policy.
      policy: its parameters.
      key: random key of the head.
      config: of the head.
      backbone: "own" copies the policy; "shared" has no copy, so the head reads the policy itself.

    Returns:
      {"head": ..., "backbone": ...}, or {"head": ...}.

    Raises:
      ValueError: for another backbone.
    """
    if backbone not in ("own", "shared"):
        raise ValueError(f"backbone is {backbone!r}; it must be 'own' or 'shared'")
    params = {"head": init_head(model, key, config)}
    return params | ({"backbone": jax.tree.map(jnp.copy, policy)} if backbone == "own" else {})


def head_outputs(head: PyTree, hidden: Float[Array, "*B D"]) -> Float[Array, "*B N"]:
    """The outputs of a head: h W, or silu(h V + b) W; in float32 for hidden states of any dtype.

    Raises:
      ValueError: for hidden states of another width than the head's.
    """
    inputs = head["hidden" if "hidden" in head else "weight"].shape[0]
    if hidden.shape[-1] != inputs:
        raise ValueError(
            f"the head reads hidden states of width {inputs}, but these have width {hidden.shape[-1]}; make the head "
            "with init_head for this model"
        )
    # A head is a small part of the model, so full precision costs little; accelerators would round to fewer bits.
    product = lambda x, w: jnp.matmul(x, w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)  # noqa: E731
    hidden = hidden.astype(jnp.float32)
    if "hidden" in head:
        hidden = jax.nn.silu(product(hidden, head["hidden"]) + head["hidden_bias"].astype(jnp.float32))
    return product(hidden, head["weight"])


def token_outputs(
    model: Model, params: PyTree, head: PyTree, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
) -> Float[Array, "B T N"]:
    """A token-level head: outputs for every token, given the tokens up to and including it; 0 at padding.

    Args:
      model: the backbone.
      params: its parameters: the policy's own where the backbone is shared.
      head: parameters of the head.
      tokens: token ids, padded on either side.
      positions: index of each token in its own sequence, -1 for padding (`positions_of` makes them of a mask).

    Raises:
      ValueError: for a head of another width, or positions of another shape than tokens.
    """
    _check_positions(tokens, positions)
    outputs = head_outputs(head, model.apply(params, tokens, positions, None)[0])
    return jnp.where(positions[..., None] >= 0, outputs, 0.0)


def sequence_reward(
    model: Model, params: PyTree, head: PyTree, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
) -> Float[Array, "B"]:
    """A scalar reward head: one number per sequence, read at its last real token.

    An empty completion is judged at the last token of its prompt; a row without any token has reward 0.

    Args:
      model, params, head, tokens, positions: as for `token_outputs`; the head has one output.

    Raises:
      ValueError: for a head of another width or with several outputs, or positions of another shape than tokens.
    """
    _check_positions(tokens, positions)
    if (outputs := head["weight"].shape[-1]) != 1:
        raise ValueError(
            f"the head has {outputs} outputs, but a sequence reward is one number; make it with outputs=1, or read "
            "all of them with at_last(token_outputs(...), positions)"
        )
    last = at_last(model.apply(params, tokens, positions, None)[0], positions)
    return jnp.where(_any_token(positions), head_outputs(head, last)[:, 0], 0.0)


def positions_of(mask: Bool[Array, "*B T"]) -> Int[Array, "*B T"]:
    """Positions from a mask of real tokens: 0, 1, ... along each row, and -1 at padding on either side.

    >>> positions_of(jnp.array([[0, 0, 1, 1], [1, 1, 1, 0]])).tolist()
    [[-1, -1, 0, 1], [0, 1, 2, -1]]
    """
    real = mask.astype(bool)
    return jnp.where(real, jnp.cumsum(real, axis=-1, dtype=jnp.int32) - 1, -1)


def at_first(values: Float[Array, "B T ..."], mask: Float[Array, "B T"]) -> Float[Array, "B ..."]:
    """Each row's entry at its first token of the mask; the first entry if the mask is empty."""
    first: Int[Array, "B"] = jnp.argmax(mask > 0, axis=1)
    return jax.vmap(lambda row, i: row[i])(values, first)


def at_last(values: Float[Array, "B T ..."], positions: Int[Array, "B T"]) -> Float[Array, "B ..."]:
    """Each row's entry at its last real token; 0 for a row without any."""
    last = jax.vmap(lambda row, i: row[i])(values, jnp.argmax(positions, axis=1))
    return jnp.where(_any_token(positions).reshape(-1, *[1] * (last.ndim - 1)), last, 0)


def _any_token(positions: Int[Array, "B T"]) -> Bool[Array, "B"]:
    return (positions >= 0).any(axis=1)


def _check_positions(tokens: Array, positions: Array) -> None:
    if tokens.ndim != 2 or positions.shape != tokens.shape:
        raise ValueError(
            f"tokens have shape {tokens.shape} and positions {positions.shape}; both must be [rows, width], one "
            "position a token and -1 at padding"
        )
