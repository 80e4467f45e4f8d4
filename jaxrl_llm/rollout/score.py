"""Teacher-forced scoring: hidden states that predict the completion tokens of given rows."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxrl_llm.models.model import Model
from jaxrl_llm.rollout.generate import completion_positions, prompt_positions


def predicting_hidden(
    model: Model,
    params: PyTree,
    prompt_tokens: Int[Array, "B P"],
    prompt_length: Int[Array, "B"],
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
) -> Float[Array, "B T D"]:
    """Hidden state that predicts each completion token: that of the token before it.

    Positions come from lengths alone, so padding ids are never looked at.
    """
    prompt_width, width = prompt_tokens.shape[1], tokens.shape[1]
    positions = jnp.concatenate(
        [prompt_positions(prompt_length, prompt_width), completion_positions(prompt_length, length, width)], axis=1
    )
    hidden, _ = model.apply(params, jnp.concatenate([prompt_tokens, tokens], axis=1), positions, None)
    return hidden[:, prompt_width - 1 : -1]


def prompt_hidden(
    model: Model, params: PyTree, prompt_tokens: Int[Array, "B P"], prompt_length: Int[Array, "B"]
) -> Float[Array, "B P D"]:
    """Hidden state at each prompt token, which predicts the next one."""
    positions = prompt_positions(prompt_length, prompt_tokens.shape[1])
    return model.apply(params, prompt_tokens, positions, None)[0]
