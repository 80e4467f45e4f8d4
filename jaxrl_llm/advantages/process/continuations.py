"""Advantages from continuations sampled after each step, and from trees of samples with shared prefixes."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.advantages.process.turn_credit import on_tokens, taken_turns
from jaxrl_llm.ranges import Share, ranged
from jaxrl_llm.statistics import group_mean, present

TreeForm = Literal["global", "local", "both"]


@ranged
def step_value_gains(
    turn_labels: Float[Array, "B S"],
    correct: Float[Array, "B"],
    turn: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    least: Share = 0.0,
) -> Float[Array, "B T"]:
    """Change of the success probability at each step, estimated by continuations instead of a value model.

        A_s = v_s - v_{s-1},   v_0 = mean_j correct_j over the group,   0 where |A_s| < least

    v_s is the share of right continuations after step s, for the last step the verdict itself: soft labels of the plan
    `continued_steps`. `least` keeps only pivotal steps.

    Args:
      turn_labels: v of each step (`continuation_labels`); NaN where no continuation was sampled.
      correct: verdict on each row.
      turn: index of the step that each token belongs to.
      mask: non-zero on tokens that count; a step without such tokens is absent.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      least: the smallest |A_s| that is kept, in [0, 1].

    Returns:
      One advantage per token, the same on all tokens of a step; 0 outside the mask and in absent rows. A step without a
      label has 0, and the next one is measured from the last label before it.

    Reference: VinePPO (2410.01679); pivotal tokens, Phi-4 (2412.08905).
    Certainty: recalled
    """
    chex.assert_rank([turn_labels, correct, turn, mask, group, weight], [2, 1, 2, 2, 1, 1])
    values = turn_labels.astype(jnp.float32)
    known = taken_turns(turn, mask, values.shape[1]) & ~jnp.isnan(values) & (weight > 0)[:, None]
    start = group_mean(present(correct, weight), group, weight)[:, None]
    values = jnp.concatenate([start, jnp.where(known, values, 0.0)], axis=1)
    # The index of the last label before each step; 0 is the start value.
    place = jnp.where(known, jnp.arange(1, values.shape[1])[None, :], 0)
    upto = jnp.concatenate([jnp.zeros_like(place[:, :1]), jax.lax.cummax(place, axis=1)[:, :-1]], axis=1)
    gains = values[:, 1:] - jnp.take_along_axis(values, upto, axis=1)
    return on_tokens(jnp.where(known & (jnp.abs(gains) >= least), gains, 0.0), turn, mask, weight)


@ranged
def tree_advantages(
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    rewards: Float[Array, "B"],
    mask: Float[Array, "B T"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    form: TreeForm = "both",
) -> Float[Array, "B T"]:
    """Samples of a group as a prefix tree: the value of a token is the mean reward of the rows that pass through it.

        V(n) = mean reward of the rows that begin with the tokens up to n
        global   A = V(n) - V(root)
        local    A = V(n) - V(parent)
        both     A = (2 V(n) - V(root) - V(parent)) / sqrt(rows through n)

    with the parent the last node before n that more rows pass through. Where rows share only the prompt, `global` and
    `local` are the reward minus the mean of the group. Branches come from the plan `resume`, or by chance.

    Args:
      tokens: completion tokens, right-padded.
      length: completion tokens including end of sequence.
      rewards: of each row.
      mask: non-zero on tokens that count.
      group: id of the group each row belongs to; rows of several prompts must not share one.
      weight: weight of each row; 0 is absent.
      form: as above.

    Returns:
      One advantage per token; 0 outside the mask and in absent rows.

    Raises:
      ValueError: for an unknown form.

    Reference: TreeRL (2506.11902).
    Certainty: recalled
    """
    chex.assert_rank([tokens, length, rewards, mask, group, weight], [2, 1, 1, 2, 1, 1])
    if form not in get_args(TreeForm):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(TreeForm))}")
    rows = tokens.shape[0]
    there, found = weight > 0, present(rewards, weight)
    root = group_mean(found, group, weight)
    of_group = jax.ops.segment_sum(there.astype(jnp.float32), group, rows)[group]

    def deeper(carry, column):
        node, value, count, parent = carry
        token, inside = column
        node = _children(node, jnp.where(inside & there, token, -1 - jnp.arange(rows)))
        now = jax.ops.segment_sum(there.astype(jnp.float32), node, rows)[node]
        mean = group_mean(found, node, weight)
        parent = jnp.where(now < count, value, parent)
        return (node, mean, now, parent), (mean, now, parent)

    inside = jnp.arange(tokens.shape[1])[:, None] < length[None, :]
    _, (value, count, parent) = jax.lax.scan(
        deeper, (group.astype(jnp.int32), root, of_group, root), (tokens.T.astype(jnp.int32), inside)
    )
    above = {"global": value - root, "local": value - parent}
    given = above.get(form)
    if given is None:
        given = (above["global"] + above["local"]) / jnp.sqrt(jnp.maximum(count, 1.0))
    return jnp.where((mask > 0) & there[:, None], given.T, 0.0)


def _children(node: Int[Array, "B"], token: Int[Array, "B"]) -> Int[Array, "B"]:
    """The node of each row one token on, named by a number below B: equal where node and token are equal."""
    order = jnp.lexsort((token, node))
    a, b = node[order], token[order]
    new = jnp.concatenate([jnp.zeros(1, bool), (a[1:] != a[:-1]) | (b[1:] != b[:-1])])
    return jnp.zeros_like(node).at[order].set(jnp.cumsum(new).astype(node.dtype))
