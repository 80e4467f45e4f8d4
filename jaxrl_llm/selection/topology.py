"""Selection of tasks and trajectories by the graph that the trajectories of a task form.

Turns of one task with equal keys are one node; a trajectory is a path of nodes.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Selection
from jaxrl_llm.ranges import Count, NonNegative, ranged
from jaxrl_llm.selection.pools import Records, items_by_weight, means_of, record_ids
from jaxrl_llm.statistics import group_leader, group_max, group_min, group_size, group_sum, subgroup_ids
from jaxrl_llm.token_codes import turn_codes


@ranged
def turn_keys(
    tokens: Int[Array, "B T"], turn: Int[Array, "B T"], length: Int[Array, "B"], *, turns: Count
) -> Int[Array, "B S"]:
    """A hash of the token sequence of each turn, including tokens of the environment; -1 for missing turns.

    Equal turns have equal keys; different turns collide with probability 2^-31.

    Args:
      tokens: of the completions.
      turn: index of the turn that a token belongs to, from 0.
      length: tokens of each completion.
      turns: S; later turns are ignored.

    Returns:
      A key per turn, non-negative for present turns.

    Reference: TopoCurate (2603.01714).
    Certainty: reconstructed
    """
    chex.assert_rank([tokens, turn, length], [2, 2, 1])
    codes, there = turn_codes(tokens, turn, jnp.arange(tokens.shape[1]) < length[:, None], turns)
    return jnp.where(there, (codes >> 1).astype(jnp.int32), -1)


def success_potential(
    paths: Int[Array, "B S"], correct: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"]
) -> Float[Array, "B S"]:
    """Phi(v): share of successes among the trajectories of the group that pass through the node of each turn.

    Args:
      paths: keys of the nodes of each trajectory in order; -1 after its end.
      correct: positive where the trajectory succeeds.
      group: id of the task each row belongs to.
      weight: weight of each row; 0 is absent.

    Returns:
      A number in [0, 1] per turn; 0 after the end and in absent rows.

    Reference: TopoCurate (2603.01714).
    Certainty: reconstructed
    """
    node, row, there = _places(paths, group, weight)
    first = _first_of_row(node, row, there)
    won = (correct > 0).astype(jnp.float32)[row]
    through = group_sum(first, node, there)
    share = group_sum(first * won, node, there) / jnp.maximum(through, 1.0)
    return jnp.where(there > 0, share, 0.0).reshape(paths.shape)


@ranged
def topology_value(
    paths: Int[Array, "B S"],
    correct: Float[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    error_branches: NonNegative = 0.5,
    heterogeneity: NonNegative = 0.5,
) -> Float[Array, "B"]:
    """Value of a task for reinforcement learning.

        error_branches * (share of edges with a target of Phi = 0 among the edges out of branching nodes)
          + heterogeneity * (distinct paths / trajectories)

    Each edge of the graph is counted once; without edges the share is 0.

    Args:
      paths, correct, group, weight: as for `success_potential`.
      error_branches, heterogeneity: factors of the two terms.

    Returns:
      One number per row, equal within a group; 0 in absent rows.

    Raises:
      ValueError: for a negative factor.

    Reference: TopoCurate (2603.01714).
    Certainty: reconstructed
    """
    rows, width = paths.shape
    potential = success_potential(paths, correct, group, weight)
    node, _, there = _places(paths, group, weight)
    node, there = node.reshape(paths.shape), there.reshape(paths.shape)
    start, target = node[:, :-1].ravel(), node[:, 1:].ravel()
    edge_there = (there[:, :-1] * there[:, 1:]).ravel()
    edge = subgroup_ids(jnp.where(edge_there > 0, start, rows * width), target)
    single = group_leader(edge, edge_there) * edge_there  # each edge once
    start = subgroup_ids(jnp.zeros_like(start), start)  # renumbered below the number of edges
    branching = single * (group_sum(single, start, edge_there) > 1)
    lost = branching * (potential[:, 1:].ravel() == 0)
    of_edge = jnp.repeat(jnp.arange(rows), width - 1)
    per_row = lambda values: jax.ops.segment_sum(values, of_edge, num_segments=rows)  # noqa: E731
    branches, losses = (group_sum(per_row(values), group, (weight > 0) * 1.0) for values in (branching, lost))
    same = jnp.where(weight > 0, group, rows)
    for place in range(width):
        same = subgroup_ids(same, paths[:, place])
    distinct = group_sum(group_leader(same, weight), group, (weight > 0) * 1.0)
    share = distinct / jnp.maximum(group_size(group, weight), 1)
    value = error_branches * losses / jnp.maximum(branches, 1.0) + heterogeneity * share
    return jnp.where(weight > 0, value, 0.0)


@ranged
def path_value(
    paths: Int[Array, "B S"],
    correct: Float[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    recovery: NonNegative = 1 / 3,
    efficiency: NonNegative = 1 / 3,
    rarity: NonNegative = 1 / 3,
) -> Float[Array, "B"]:
    """Value of a successful trajectory as a demonstration: a weighted sum of three parts, each in [0, 1].

        recovery    sum of max(0, Phi(v_{t+1}) - Phi(v_t)) after the first decrease of Phi; 0 if Phi never decreases
        efficiency  shortest successful length / length of the trajectory, in nodes
        rarity      mean over its nodes of 1 - (successful trajectories through v) / (successful trajectories)

    Each part is scaled to [0, 1] within its task; a part that is constant in a task is 0.

    Args:
      paths, correct, group, weight: as for `success_potential`.
      recovery, efficiency, rarity: factors of the three parts.

    Returns:
      One number per row; 0 in rows that fail or are absent.

    Raises:
      ValueError: for a negative factor.

    Reference: TopoCurate (2603.01714).
    Certainty: reconstructed
    """
    potential = success_potential(paths, correct, group, weight)
    won = ((correct > 0) & (weight > 0)).astype(jnp.float32)
    node, row, there = _places(paths, group, weight)
    inside = there.reshape(paths.shape)
    change = jnp.where(inside[:, 1:] > 0, potential[:, 1:] - potential[:, :-1], 0.0)
    fallen = jnp.cumsum(change < 0, axis=1) > 0
    regained = jnp.where(fallen, jnp.maximum(change, 0.0), 0.0).sum(axis=1)
    nodes = inside.sum(axis=1)
    shortest = group_min(nodes, group, won)
    through = group_sum(_first_of_row(node, row, there) * won[row], node, there).reshape(paths.shape)
    winners = jnp.maximum(group_size(group, won), 1)[:, None]
    rare = jnp.where(inside > 0, 1.0 - through / winners, 0.0).sum(axis=1) / jnp.maximum(nodes, 1.0)

    def scaled(part: Array) -> Array:
        low, high = group_min(part, group, won), group_max(part, group, won)
        return jnp.where(high > low, (part - low) / jnp.where(high > low, high - low, 1.0), 0.0)

    parts = (recovery, regained), (efficiency, shortest / jnp.maximum(nodes, 1.0)), (rarity, rare)
    return jnp.where(won > 0, sum(factor * scaled(part) for factor, part in parts), 0.0)


class Worth(NamedTuple):
    """State of `topology_aware`: the value of each item at its last visit; NaN before."""

    value: Float[Array, "I"]


@ranged
def topology_aware(
    *,
    records: Records,
    turns: Count = 8,
    error_branches: NonNegative = 0.5,
    heterogeneity: NonNegative = 0.5,
    mixed: bool = True,
) -> Selection:
    """Tasks by `topology_value` of their last trajectories: TopoCurate.

        P_i = value_i / sum_j value_j

    Two turns are one node if all tokens of action and observation are equal. Tasks without a value count as the best
    one; if all values are 0, the draw is uniform.

    Args:
      records: records of the data, one per item; filled from the run.
      turns: turns of a trajectory to compare; later turns are ignored.
      error_branches, heterogeneity: as in `topology_value`.
      mixed: give tasks whose trajectories all succeed or all fail the value 0.

    Returns:
      A `Selection`.

    Raises:
      ValueError: for a negative factor.

    Reference: TopoCurate (2603.01714).
    Certainty: reconstructed
    """
    ids = record_ids(records)

    def weights(memory: Worth) -> Float[Array, "I"]:
        known = ~jnp.isnan(memory.value)
        best = jnp.where(known, memory.value, 0.0).max()
        return jnp.where(known, memory.value, jnp.where(best > 0, best, 1.0))

    def init() -> Worth:
        return Worth(jnp.full(len(ids), jnp.nan, jnp.float32))

    def choose(memory: Worth, key: Array, count: int) -> Int[Array, "N"]:
        return items_by_weight(weights(memory), key, count, ids)

    def update(
        memory: Worth,
        item: Int[Array, "B"],
        correct: Float[Array, "B"],
        tokens: Int[Array, "B T"],
        turn: Int[Array, "B T"],
        length: Int[Array, "B"],
        group: Int[Array, "B"],
        weight: Float[Array, "B"],
    ) -> Worth:
        paths = turn_keys(tokens, turn, length, turns=turns)
        factors = {"error_branches": error_branches, "heterogeneity": heterogeneity}
        value = topology_value(paths, correct, group, weight, **factors)
        if mixed:
            won = (correct > 0).astype(jnp.float32)
            value = jnp.where(group_max(won, group, weight) > group_min(won, group, weight), value, 0.0)
        mean, met = means_of(value, item, weight, len(ids))
        return Worth(jnp.where(met, mean, memory.value))

    def report(memory: Worth) -> dict[str, Array]:
        known = ~jnp.isnan(memory.value)
        mean = jnp.where(known, memory.value, 0.0).sum() / jnp.maximum(known.sum(), 1)
        return {"known_share": known.mean(), "value": mean}

    return Selection(init, choose, update, report)


def _places(paths: Array, group: Array, weight: Array) -> tuple[Array, Array, Array]:
    """(node, row, 1 if present) of each turn, flattened; nodes of different groups have different numbers."""
    chex.assert_rank([paths, group, weight], [2, 1, 1])
    rows, width = paths.shape
    there = ((paths >= 0) & (weight > 0)[:, None]).ravel().astype(jnp.float32)
    of_group = jnp.where(there > 0, jnp.repeat(group, width), rows)
    return subgroup_ids(of_group, paths.ravel()), jnp.repeat(jnp.arange(rows), width), there


def _first_of_row(node: Array, row: Array, there: Array) -> Float[Array, "N"]:
    """1 at the first turn of each row at each node."""
    return group_leader(subgroup_ids(node, row), there) * there
