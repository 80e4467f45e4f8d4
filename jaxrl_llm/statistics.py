"""Statistics of groups given as ids, and of tokens; absent rows are ignored.

The samples of one prompt share an integer id in [0, B); groups may have any size and any order of rows. Every function
returns one number per row: the statistic of the row's own group. A row of weight 0 is absent: it does not contribute,
even if it holds NaN, and a group without rows has statistic 0. Weights are relative: multiplying all weights of a group
by a constant does not change its mean and standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def present(values: Float[Array, "B"], weight: Float[Array, "B"]) -> Float[Array, "B"]:
    """`values` in float32, 0 in absent rows (which may hold NaN)."""
    return jnp.where(weight > 0, values.astype(jnp.float32), 0.0)


def by_row(function: Callable[..., Array], *rows: Array, together: int = 32) -> Array:
    """The results of a function of one row, for a few rows at a time and once more for the gradient.

    What compares every row with every other one is then never held for all rows at once.

    >>> by_row(lambda x: (x > jnp.array([1.0, 3.0])).sum(), jnp.array([2.0, 4.0])).tolist()
    [1, 2]
    """
    return jax.lax.map(lambda row: jax.checkpoint(function)(*row), rows, batch_size=together)


def group_sum(values: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"]) -> Float[Array, "B"]:
    """sum_j w_j x_j over the row's group.

    >>> group_sum(jnp.array([1.0, 2.0, 4.0]), jnp.array([0, 2, 0]), jnp.ones(3)).tolist()
    [5.0, 2.0, 5.0]
    """
    _check(values, group, weight)
    total = jax.ops.segment_sum(present(values, weight) * weight.astype(jnp.float32), group, num_segments=len(group))
    return total[group]


def group_size(group: Int[Array, "B"], weight: Float[Array, "B"]) -> Int[Array, "B"]:
    """Number of rows of the row's group that are present."""
    chex.assert_rank([group, weight], 1)
    return jax.ops.segment_sum((weight > 0).astype(jnp.int32), group, num_segments=len(group))[group]


def group_min(values: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"]) -> Float[Array, "B"]:
    """Smallest value in the row's group."""
    return -group_max(-values.astype(jnp.float32), group, weight)


def group_max(values: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"]) -> Float[Array, "B"]:
    """Largest value in the row's group."""
    _check(values, group, weight)
    candidates = jnp.where(weight > 0, values.astype(jnp.float32), -jnp.inf)
    largest = jax.ops.segment_max(candidates, group, num_segments=len(group))[group]
    return jnp.where(group_size(group, weight) > 0, largest, 0.0)


def group_mean(values: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"]) -> Float[Array, "B"]:
    """Weighted mean of the row's group; exactly x if all of its values are x."""
    # Relative to the smallest value: equal values then differ by exactly 0; the rounding error of a plain sum would be
    # magnified by the division by a vanishing standard deviation.
    origin = group_min(values, group, weight)
    total = group_sum(jnp.ones_like(origin), group, weight)
    offset = group_sum(values.astype(jnp.float32) - origin, group, weight)
    return origin + offset / jnp.where(total > 0, total, 1.0)


def group_std(
    values: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"], *, ddof: int = 1
) -> Float[Array, "B"]:
    """Standard deviation of the row's group; 0 for a single value or equal values.

        sqrt(sum_j w_j (x_j - mean)^2 / (W - ddof * sum_j w_j^2 / W)), W = sum_j w_j

    For weights 0 and 1 the divisor is n - ddof: `ddof` 1 is unbiased, 0 the population's deviation.
    """
    weight = weight.astype(jnp.float32)
    centred = values.astype(jnp.float32) - group_mean(values, group, weight)
    squares = group_sum(jnp.square(present(centred, weight)), group, weight)
    total = group_sum(jnp.ones_like(centred), group, weight)
    effective = group_sum(weight, group, weight) / jnp.where(total > 0, total, 1.0)
    enough = (group_size(group, weight) > ddof) & (squares > 0)
    variance = jnp.where(enough, squares, 1.0) / jnp.where(enough, total - ddof * effective, 1.0)
    return jnp.where(enough, jnp.sqrt(variance), 0.0)


def group_rank(values: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"]) -> Int[Array, "B"]:
    """Rank of the row in its group, 0 for the smallest value; ties in order of rows, absent rows last.

    >>> group_rank(jnp.array([3.0, 9.0, 1.0, 2.0]), jnp.array([0, 1, 0, 0]), jnp.ones(4)).tolist()
    [2, 0, 0, 1]
    """
    _check(values, group, weight)
    order = jnp.lexsort((present(values, weight), weight <= 0, group))
    sizes = jax.ops.segment_sum(jnp.ones_like(group), group, num_segments=len(group))
    start = jnp.cumsum(sizes) - sizes
    position = jnp.zeros_like(group).at[order].set(jnp.arange(len(group), dtype=group.dtype))
    return position - start[group]


def group_leader(group: Int[Array, "B"], weight: Float[Array, "B"]) -> Float[Array, "B"]:
    """1 on the first present row of each group, 0 elsewhere: a sum over groups is a sum over these rows."""
    chex.assert_rank([group, weight], 1)
    rows = jnp.arange(len(group))
    first = jax.ops.segment_min(jnp.where(weight > 0, rows, len(group)), group, num_segments=len(group))
    return (rows == first[group]).astype(jnp.float32)


def subgroup_ids(group: Int[Array, "B"], key: Int[Array, "B"]) -> Int[Array, "B"]:
    """Ids in [0, B) of the subgroups of rows with the same group and key.

    >>> subgroup_ids(jnp.array([4, 0, 4, 4]), jnp.array([7, 7, 9, 7])).tolist()
    [1, 0, 2, 1]
    """
    chex.assert_rank([group, key], 1)
    chex.assert_equal_shape([group, key])
    order = jnp.lexsort((key, group))
    pairs = jnp.stack([group[order], key[order]])
    new = jnp.any(pairs[:, 1:] != pairs[:, :-1], axis=0)
    ids = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(new, dtype=jnp.int32)])
    return jnp.zeros(len(group), jnp.int32).at[order].set(ids)


def token_weights(mask: Float[Array, "B T"], weight: Float[Array, "B"]) -> Float[Array, "B T"]:
    """The weight of each token: the row's weight on trained tokens, 0 elsewhere."""
    chex.assert_rank([mask, weight], [2, 1])
    return jnp.where(mask > 0, 1.0, 0.0) * weight.astype(jnp.float32)[:, None]


def moments(values: Array, weights: Array, *, ddof: int = 1) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted mean and variance of all entries of weight above 0; equal entries have variance exactly 0.

    The divisor of the variance is W - ddof * sum w^2 / W with W = sum w: n - ddof for weights 0 and 1.
    """
    chex.assert_equal_shape([values, weights])
    values = jnp.where(weights > 0, values.astype(jnp.float32), 0.0)
    total = weights.sum()
    divisor = jnp.where(total > 0, total, 1.0)
    # Relative to the smallest entry, so that equal entries differ by exactly 0 (see `group_mean`).
    smallest = jnp.min(jnp.where(weights > 0, values, jnp.inf))
    origin = jnp.where(total > 0, smallest, 0.0)
    mean = origin + (weights * (values - origin)).sum() / divisor
    squares = (weights * jnp.square(values - mean)).sum()
    enough = ((weights > 0).sum() > ddof) & (squares > 0)
    effective = total - ddof * jnp.square(weights).sum() / divisor
    return mean, jnp.where(enough, squares / jnp.where(enough, effective, 1.0), 0.0)


def sampled_entropy(
    old_logprobs: Float[Array, "B T"], mask: Float[Array, "B T"], weight: Float[Array, "B"]
) -> Float[Array, ""]:
    """Entropy in nats per token, estimated by -log pi of the sampled tokens; 0 without tokens."""
    chex.assert_rank([old_logprobs, mask, weight], [2, 2, 1])
    counts = token_weights(mask, weight)
    surprise = jnp.where(counts > 0, -old_logprobs.astype(jnp.float32), 0.0)
    total = counts.sum()
    return (counts * surprise).sum() / jnp.where(total > 0, total, 1.0)


def behind_tokens(
    values: Float[Array, "B T"], scores: Float[Array, "B"], length: Int[Array, "B"]
) -> Float[Array, "B T"]:
    """Values of a head after each token, from its values before each token and its score after the last one.

    >>> behind_tokens(jnp.array([[1.0, 2.0, 9.0]]), jnp.array([3.0]), jnp.array([2])).tolist()
    [[2.0, 3.0, 3.0]]
    """
    chex.assert_rank([values, scores, length], [2, 1, 1])
    following = jnp.concatenate([values[:, 1:], scores[:, None]], axis=1)
    last = jnp.arange(values.shape[1]) >= (length - 1)[:, None]
    return jnp.where(last, scores[:, None], following).astype(jnp.float32)


def at_turns(
    values: Float[Array, "B T"], turn: Int[Array, "B T"], mask: Float[Array, "B T"], turns: int, *, end: bool = True
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    """The entry of each turn at its last (or first) counted token, and whether the turn has one; 0 if it has none.

    >>> found, taken = at_turns(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[0, 0, 1]]), jnp.ones((1, 3)), 3)
    >>> found.tolist(), taken.tolist()
    ([[2.0, 3.0, 0.0]], [[True, True, False]])
    """
    chex.assert_rank([values, turn, mask], 2)
    counted = (mask > 0) & (turn >= 0) & (turn < turns)
    ids = jnp.where(counted, turn, turns).astype(jnp.int32)
    place = jnp.arange(turn.shape[1])
    chosen = jax.ops.segment_max if end else jax.ops.segment_min
    at = jax.vmap(lambda row: chosen(place, row, num_segments=turns + 1))(ids)[:, :turns]
    taken = (at >= 0) & (at < turn.shape[1])
    found = jnp.take_along_axis(values.astype(jnp.float32), jnp.clip(at, 0, turn.shape[1] - 1), axis=1)
    return jnp.where(taken, found, 0.0), taken


def gaussian_heads(reward_scores: Float[Array, "B 2K"]) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
    """(means, deviations) of K heads: the first half of the outputs, and the exponential of the second.

    Raises:
      ValueError: for an odd number of outputs.
    """
    if reward_scores.ndim != 2 or reward_scores.shape[1] % 2:
        raise ValueError(
            f"the head has scores of shape {reward_scores.shape}; K Gaussian heads are 2K outputs: K means, then K "
            "logarithms of deviations (networks: {reward: {head: {outputs: 10}}})"
        )
    mean, log_deviation = jnp.split(reward_scores.astype(jnp.float32), 2, axis=1)
    return mean, jnp.exp(log_deviation)


def _check(values, group, weight):
    chex.assert_rank([values, group, weight], 1)
    chex.assert_equal_shape([values, group, weight])
