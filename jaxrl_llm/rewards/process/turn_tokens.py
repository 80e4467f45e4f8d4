"""Features of turns from their tokens: hashes of states and actions, counts of marks."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Source
from jaxrl_llm.ranges import Count, Natural, ranged
from jaxrl_llm.token_codes import SEEDS, mixed_bits, turn_codes


@ranged
def transition_ids(
    tokens: Int[Array, "B T"],
    turn: Int[Array, "B T"],
    source: Int[Array, "B T"],
    length: Int[Array, "B"],
    *,
    max_turns: Count,
    history: Natural = 0,
) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """Integer ids of the state before each turn and of its action, equal where the tokens are equal.

    The state is the observation after the previous turn (0 before the first), with `history` combined with that many
    earlier (state, action) pairs; the action is the policy's tokens. `"[state_id, action_id]": transition_ids` fills
    the inputs of `merged_transitions`.

    Args:
      tokens: completion tokens.
      turn: index of the turn that each token belongs to.
      source: a `Source` for each token; observations answer a turn.
      length: completion tokens, observations included.
      max_turns: S.
      history: earlier turns included in a state.

    Returns:
      (state_id, action_id), hashes of 31 bits; different tokens collide with probability 2^-31.

    Reference: SALT (2510.20022).
    Certainty: recalled
    """
    chex.assert_rank([tokens, turn, source, length], [2, 2, 2, 1])
    inside = jnp.arange(tokens.shape[1]) < length[:, None]
    seen = inside & (source == Source.OBSERVATION)
    action, answer = (turn_codes(tokens, turn, which, max_turns)[0] for which in (inside & ~seen, seen))
    state = jnp.concatenate([jnp.zeros_like(answer[:, :1]), answer[:, :-1]], axis=1)
    remembered, pair = state, _mixed(state, action)
    for _ in range(history):
        pair = jnp.concatenate([jnp.zeros_like(pair[:, :1]), pair[:, :-1]], axis=1)
        remembered = _mixed(remembered, pair)
    return tuple((x >> 1).astype(jnp.int32) for x in (remembered, action))  # type: ignore[return-value]


def _mixed(a: Array, b: Array) -> Array:
    """A hash of an ordered pair."""
    return mixed_bits(mixed_bits(a + jnp.uint32(SEEDS[0])) ^ b)


@ranged
def turn_marks(
    tokens: Int[Array, "B T"],
    turn: Int[Array, "B T"],
    length: Int[Array, "B"],
    *,
    mark_ids: tuple[Natural, ...],
    max_turns: Count,
) -> Float[Array, "B S D"]:
    """Counts of given tokens in each turn, observations included: factors for `latent_rewards`.

    Args:
      tokens: completion tokens.
      turn: index of the turn that each token belongs to.
      length: completion tokens, observations included.
      mark_ids: D token ids, such as the result flags of an environment.
      max_turns: S.

    Returns:
      D counts per turn, float32; 0 for turns that were not taken.

    Raises:
      ValueError: without ids.

    Reference: LaRe (2412.11120).
    Certainty: reconstructed
    """
    chex.assert_rank([tokens, turn, length], [2, 2, 1])
    if not mark_ids:
        raise ValueError("mark_ids is empty; give the ids of the tokens that are counted")
    inside = jnp.arange(tokens.shape[1]) < length[:, None]
    mine = inside[..., None] & (turn[..., None] == jnp.arange(max_turns))
    marked = tokens[..., None] == jnp.asarray(mark_ids)
    return jnp.einsum("bts,btd->bsd", mine.astype(jnp.float32), marked.astype(jnp.float32))
