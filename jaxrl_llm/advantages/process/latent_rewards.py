"""Turn rewards that a small network decodes from named factors, trained on returns alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxrl_llm.advantages.process.turn_credit import taken_turns
from jaxrl_llm.experience import Method
from jaxrl_llm.ranges import Count, Natural, Positive, ranged


def decoded_factors(layers: list[tuple[Array, Array]], factors: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """One number for each vector of factors: linear layers with a ReLU between them.

    >>> decoded_factors([(jnp.array([[2.0], [1.0]]), jnp.array([0.5]))], jnp.array([[1.0, 3.0]])).tolist()
    [5.5]
    """
    x = factors.astype(jnp.float32)
    for number, (matrix, bias) in enumerate(layers):
        x = jnp.matmul(jax.nn.relu(x) if number else x, matrix, precision=jax.lax.Precision.HIGHEST) + bias
    return x[..., 0]


def mean_return_error(
    layers: list[tuple[Array, Array]],
    factors: Float[Array, "B S D"],
    taken: Array,
    rewards: Float[Array, "B"],
    weight: Float[Array, "B"],
) -> Float[Array, ""]:
    """mean over rows of (mean_s r_s - R / n)^2, r_s the decoded reward of each of the n turns taken."""
    n = jnp.maximum(taken.sum(1), 1)
    there = jnp.where(taken.any(1), weight.astype(jnp.float32), 0.0)
    total = jnp.where(taken, decoded_factors(layers, jnp.where(taken[..., None], factors, 0.0)), 0.0).sum(1)
    error = jnp.square((total - jnp.where(there > 0, rewards, 0.0)) / n)
    return (there * error).sum() / jnp.maximum(there.sum(), 1e-9)


@ranged
def latent_rewards(
    *, factors: Count, width: Count = 256, learning_rate: Positive = 3e-4, updates: Count = 4, seed: Natural = 0
) -> Method:
    """LaRe: turn rewards decoded from named factors by a small network that is trained on returns alone.

        r_s = decoder(z_s),   the decoder descends mean (sum_s r_s / n - R / n)^2

    with three layers and ReLU between them. Your function fills `turn_factors`, z [B, S, D], such as the drop of a
    distance. Where a network reads the text itself, use `return_decomposition`.

    Args:
      factors: D, the number of factors.
      width: of the two hidden layers.
      learning_rate: of Adam.
      updates: Adam steps on each batch, taken before the batch is decoded.
      seed: of the initial weights.

    Returns:
      A method that remembers decoder and optimiser; its update gives one reward per turn, a constant for the policy's
      gradient, 0 for turns that were not taken.

    Reference: LaRe (2412.11120).
    Certainty: verified
    """
    optimizer = optax.adam(learning_rate)

    def init():
        sizes, keys = (factors, width, width, 1), jax.random.split(jax.random.key(seed), 3)
        # The usual bound of a linear layer, and no bias.
        made = lambda key, i, o: jax.random.uniform(key, (i, o), jnp.float32, -(i**-0.5), i**-0.5)  # noqa: E731
        layers = [
            (made(k, i, o), jnp.zeros(o, jnp.float32)) for k, i, o in zip(keys, sizes[:-1], sizes[1:], strict=True)
        ]
        return {"layers": layers, "optimizer": optimizer.init(layers)}

    def update(
        memory,
        turn_factors: Float[Array, "B S D"],
        rewards: Float[Array, "B"],
        turn: Int[Array, "B T"],
        mask: Float[Array, "B T"],
        weight: Float[Array, "B"],
    ):
        taken = taken_turns(turn, mask, turn_factors.shape[1]) & (weight > 0)[:, None]

        def one(_, now):
            layers, state = now
            gradient = jax.grad(mean_return_error)(layers, turn_factors, taken, rewards, weight)
            change, state = optimizer.update(gradient, state, layers)
            return optax.apply_updates(layers, change), state

        layers, state = jax.lax.fori_loop(0, updates, one, (memory["layers"], memory["optimizer"]))
        found = decoded_factors(layers, jnp.where(taken[..., None], turn_factors, 0.0))
        return jnp.where(taken, found, 0.0), {"layers": layers, "optimizer": state}

    return Method(init, update)
