"""Masks of parts of a row: the answer after the thought, rewarded completions, demonstrations."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Source
from jaxrl_llm.ranges import Share, ranged


@ranged
def answer_part(
    tokens: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    marker_id: int,
    dropped: Share | None = None,
    seed: int = 0,
) -> Float[Array, "B T"]:
    """The mask without the thought: tokens from the last marker on, the marker kept; all where there is none.

    For the field `mask` of a preference loss, which then compares answers and leaves thoughts unconstrained.

    Args:
      tokens: of completions.
      mask: of them.
      marker_id: the token that ends a thought.
      dropped: keep the thought except for this random share of its tokens; None drops all of it.
      seed: of that choice, which is the same at every step for the same batch positions.

    Returns:
      The new mask.

    Reference: PRefLexOR (2410.12375).
    Certainty: verified
    """
    chex.assert_equal_shape([tokens, mask])
    width = tokens.shape[1]
    marked = (tokens == marker_id) & (mask > 0)
    last = jnp.where(marked.any(1), width - 1 - jnp.argmax(marked[:, ::-1], axis=1), 0)
    answer = jnp.arange(width) >= last[:, None]
    if dropped is not None:
        answer |= jax.random.uniform(jax.random.key(seed), tokens.shape) >= dropped
    return jnp.where(answer, mask, 0.0)


@ranged
def rewarded_part(
    rewards: Float[Array, "B"], mask: Float[Array, "B T"], weight: Float[Array, "B"], *, least: float = 1.0
) -> Float[Array, "B T"]:
    """The mask of completions whose reward is at least `least`: where a teacher's distribution is imitated.

    For a field such as `rewarded_mask`, which a loss reads in place of `mask`; it includes the weights of the rows.
    With no such completion in a batch the loss is 0.

    Args:
      rewards: of each row.
      mask: non-zero on tokens that count.
      weight: of each row.
      least: smallest reward of a row that is kept.

    Returns:
      0, or the row's weight, on each token.

    Reference: KEPO (2602.00400).
    Certainty: verified
    """
    chex.assert_equal_shape([rewards, weight])
    return jnp.where(mask > 0, jnp.where(rewards >= least, weight.astype(jnp.float32), 0.0)[:, None], 0.0)


def demonstrated_part(source: Int[Array, "B T"], weight: Float[Array, "B"]) -> Float[Array, "B T"]:
    """Mask of the tokens of a row that come from a demonstration, such as a hint, for a likelihood term.

    For a field that a loss reads in place of `mask`; it includes the weights of the rows.

    >>> from jaxrl_llm.experience import Source
    >>> demonstrated_part(jnp.array([[Source.DEMONSTRATION, Source.SAMPLED, Source.PAD]]), jnp.array([1.0])).tolist()
    [[1.0, 0.0, 0.0]]

    Args:
      source: origin of each token.
      weight: of each row.

    Reference: UFT (2505.16984).
    Certainty: verified
    """
    chex.assert_rank([source, weight], [2, 1])
    return jnp.where(source == Source.DEMONSTRATION, weight.astype(jnp.float32)[:, None], 0.0)


def over_mask(values: Float[Array, "B"], mask: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """A number of each row on all of its tokens that count, such as an advantage on those of a view; 0 elsewhere.

    >>> over_mask(jnp.array([2.0]), jnp.array([[1.0, 0.0]])).tolist()
    [[2.0, 0.0]]

    Args:
      values: one per row.
      mask: non-zero on tokens that count.
    """
    chex.assert_rank([values, mask], [1, 2])
    return jnp.where(mask > 0, values.astype(jnp.float32)[:, None], 0.0)
