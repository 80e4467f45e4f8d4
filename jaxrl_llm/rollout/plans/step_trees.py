"""A search tree of steps for each prompt, guided by a value network and visit counts, and its training rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.experience import Experience, Prompts
from jaxrl_llm.ranges import Count, Natural, NonNegative, ranged
from jaxrl_llm.rollout.plans.plan import Plan, Request, first_requests, numbers_before, require_inside
from jaxrl_llm.rollout.prefixes import Prefixes


class Tree(NamedTuple):
    """The trees of N prompts; node 0 is the prompt itself, and a child has a greater number than its parent.

    Attributes:
      rows: nodes 1 to M as completions so far, with two leading axes, prompts and nodes.
      parent: of each node; -1 for the root and for what is not there.
      value: of each node, in [0, 1].
      visits: of each node.
      closed: nodes below which nothing can grow.
      round: expansions so far.
    """

    rows: Experience
    parent: Int[Array, "N M1"]
    value: Float[Array, "N M1"]
    visits: Float[Array, "N M1"]
    closed: Bool[Array, "N M1"]
    round: Int[Array, ""]


@ranged
def tree_search(
    inner: Plan,
    *,
    samples_per_prompt: Count,
    pad_id: Natural,
    encode: Callable[[str], Sequence[int]],
    step_end: str,
    rounds: Count = 8,
    children: Count = 3,
    exploration: NonNegative = 0.7,
) -> Plan:
    """Monte Carlo tree search over steps: each round one leaf of every tree gets children, one step each.

    From the root the search goes to the child of largest V + c sqrt(2 ln N_parent / N), or V + 1 where it was never
    visited, down to a node without children. Its children are drawn by the policy up to `step_end`; equal ones count
    once. Their values are the last reward of the run (`step_value`, with weight 0), the verdict on what has ended the
    first. From the leaf to the root visits grow by one, and a value becomes the mean of its children's by their visits.

    Rows of the step are `samples_per_prompt` completions of each tree that have ended, those of highest value first,
    for likelihood (`success_cloning`); fewer have rows of weight 0. They know `step_labels`, the value targets of their
    steps (`tree_targets`), for the value network (`step_label_likelihood`). Parents are read from prefixes in one pass.

    The published search rolls greedily forward from the best child before it backs up; here its own value counts.

    Args:
      inner: the plain plan.
      samples_per_prompt: rows of a group.
      pad_id: fills what is shorter.
      encode: text -> token ids.
      step_end: text of one token that ends a step and belongs to it.
      rounds: expansions of each tree.
      children: drawn for a node that is expanded.
      exploration: c.

    Raises:
      ValueError: for a step end that is not one token, or a plan inside that is not plain.

    Reference: ReST-MCTS* (2406.03816).
    Certainty: verified
    """
    require_inside("tree_search", inner, "one_round", "equal_groups", "one_group_a_prompt", "any_number")
    ids = tuple(encode(step_end))
    if len(ids) != 1:
        raise ValueError(f"tree_search.step_end is {step_end!r}, which is {len(ids)} tokens; name a text of one token")
    if rounds * children < samples_per_prompt:
        raise ValueError(
            f"tree_search has {rounds} x {children} nodes a prompt, fewer than rollout.samples_per_prompt "
            f"{samples_per_prompt}; grow larger trees or learn from fewer rows"
        )
    if inner.provides or inner.reads_rewards:
        raise ValueError("rollout.plan.tree_search draws the rows itself; leave out the plan inside of it")
    most = rounds * children

    def init(memory: Any, key: Array, prompts: Prompts, rows: Experience) -> Tree:
        count = rows.tokens.shape[0] // children
        room = jax.tree.map(lambda x: jnp.zeros((count, most, *x.shape[1:]), x.dtype), rows)
        shape = (count, most + 1)
        return Tree(room, jnp.full(shape, -1), jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(shape, bool), jnp.int32(0))

    def requests(memory: Any, tree: Tree | None, prompts: Prompts) -> tuple[Request, ...]:
        (one,) = first_requests(inner, memory, prompts)
        before = numbers_before(prompts, most)
        count = prompts.tokens.shape[0]
        if tree is None:  # shapes alone are asked for
            return (one._replace(samples_per_prompt=children, first_sample=before, stop_ids=ids),)
        leaf = selected(tree, exploration)
        tokens, source = (jnp.pad(x, ((0, 0), (1, 0), (0, 0))) for x in (tree.rows.tokens, tree.rows.source))
        length = jnp.pad(tree.rows.length, ((0, 0), (1, 0)))
        at = lambda x: jnp.repeat(x[jnp.arange(count), leaf], children, axis=0)  # noqa: E731
        width = tokens.shape[2] - 1
        inside = jnp.arange(width) < at(length)[:, None]
        prefixes = Prefixes(jnp.where(inside, at(tokens)[:, :width], pad_id), at(length), at(source)[:, :width])
        asked = one._replace(
            samples_per_prompt=children,
            first_sample=before + tree.round * children,
            active=~tree.closed[:, 0],
            prefixes=prefixes,
            stop_ids=ids,
        )
        return (asked,)

    return inner._replace(
        init=init,
        requests=requests,
        merge=partial(_grown, children, ids[0], exploration),
        unfinished=lambda tree: (tree.round < rounds) & ~tree.closed[:, 0].all(),
        result=partial(_learned, samples_per_prompt, ids[0]),
        drawn=children,
        most_rounds=rounds,
        reads_rewards=True,
        provides=inner.provides | {"step_labels"},
        reports=frozenset({"tree_nodes", "tree_solved"}),
        needs=inner.needs | {"prefixes", "active_prompts", "numbered_samples", "pauses"},
        lacks=inner.lacks | {"one_round"},
    )


def _grown(children: int, step_end: int, exploration: float, tree: Tree, rows: Experience) -> Tree:
    """The trees with the children that were drawn for their leaves."""
    count, first = tree.parent.shape[0], tree.round * children
    leaf = selected(tree, exploration)
    new = jax.tree.map(lambda x: x.reshape(count, children, *x.shape[1:]), rows)
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, first, 1)  # noqa: E731
    at = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), 1 + first, 1)  # noqa: E731
    same = (new.tokens[:, :, None] == new.tokens[:, None]).all(-1) & (new.length[:, :, None] == new.length[:, None])
    repeated = (same & jnp.tril(jnp.ones((children, children), bool), -1)).any(-1)
    there = (new.weight > 0) & ~repeated
    value = jnp.clip(new["reward_components"][..., -1], 0.0, 1.0)
    best = there & (jnp.arange(children) == jnp.argmax(jnp.where(there, value, -1.0), axis=1)[:, None])
    grown = tree._replace(
        rows=jax.tree.map(put, tree.rows, new),
        parent=at(tree.parent, jnp.where(there, leaf[:, None], -1)),
        value=at(tree.value, value),
        visits=at(tree.visits, best),
        closed=at(tree.closed, _ended(new, step_end) | ~there),
        round=tree.round + 1,
    )
    return backed_up(grown, jnp.where(tree.closed[:, 0], -1, leaf))


def _learned(samples: int, step_end: int, tree: Tree) -> tuple[Experience, dict[str, Array]]:
    """The training rows of finished trees, and their metrics."""
    count = tree.parent.shape[0]
    there = tree.parent[:, 1:] >= 0
    ended = there & _ended(tree.rows, step_end)
    right = ended & (tree.rows["correct"] >= 1)
    targets = jax.vmap(tree_targets)(tree.parent, jnp.pad(right, ((0, 0), (1, 0))))
    labels = jax.vmap(_labels)(tree.parent, targets, tree.rows.length, tree.rows.tokens)
    order = jnp.argsort(-(ended * 2.0 + tree.value[:, 1:]), axis=1, stable=True)[:, :samples]

    def chosen(x: Array) -> Array:
        index = order.reshape(*order.shape, *[1] * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1).reshape(-1, *x.shape[2:])

    rows, weight = jax.tree.map(chosen, tree.rows), chosen(ended).astype(jnp.float32)
    rows = replace(
        rows,
        group=jnp.repeat(jnp.arange(count, dtype=jnp.int32), samples),
        weight=weight,
        mask=rows.mask * weight[:, None],
        prompt_length=jnp.maximum(rows.prompt_length, 1),
    )
    told = {"tree_nodes": there.sum() / count, "tree_solved": right.any(1).mean()}
    return rows.filled(step_labels=chosen(labels)), told


def _ended(rows: Experience, step_end: int) -> Bool[Array, "N M"]:
    """Whether each node is a whole completion: cut off, or not ended by a step."""
    last = jnp.take_along_axis(rows.tokens, jnp.maximum(rows.length - 1, 0)[..., None], axis=2)[..., 0]
    return rows.truncated | (last != step_end)


def upper_bound(
    value: Float[Array, "..."], visits: Float[Array, "..."], parent_visits: Float[Array, "..."], *, exploration: float
) -> Array:
    """V + c sqrt(2 ln N_parent / N) of a node, and V + 1 of one that was never visited.

    >>> [round(float(upper_bound(0.4, n, 10.0, exploration=0.7)), 6) for n in (3.0, 0.0)]
    [1.267282, 1.4]
    """
    seen = jnp.maximum(jnp.asarray(visits, jnp.float32), 1.0)
    bonus = exploration * jnp.sqrt(2.0 * jnp.log(jnp.maximum(parent_visits, 1.0)) / seen)
    return value + jnp.where(jnp.asarray(visits) > 0, bonus, 1.0)


def selected(tree: Tree, exploration: float) -> Int[Array, "N"]:
    """The node of each tree that the search selects: one without children that may be expanded."""

    def one(parent: Array, value: Array, visits: Array, closed: Array) -> Array:
        def down(node: Array) -> Array:
            bound = upper_bound(value, visits, visits[node], exploration=exploration)
            return jnp.argmax(jnp.where((parent == node) & ~closed, bound, -jnp.inf)).astype(jnp.int32)

        def more(node: Array) -> Array:
            return ((parent == node) & ~closed).any()

        return jax.lax.while_loop(more, down, jnp.int32(0))

    return jax.vmap(one)(tree.parent, tree.value, tree.visits, tree.closed)


def backed_up(tree: Tree, leaf: Int[Array, "N"]) -> Tree:
    """The trees after one more visit of a node each; -1 visits none."""

    def one(parent: Array, value: Array, visits: Array, closed: Array, leaf: Array) -> tuple[Array, Array, Array]:
        def up(carry: tuple[Array, ...]) -> tuple[Array, ...]:
            node, value, visits, closed = carry
            below = parent == node
            count = jnp.where(below, visits, 0.0)
            mean = (count * value).sum() / jnp.maximum(count.sum(), 1e-9)
            value = value.at[node].set(jnp.where(count.sum() > 0, mean, value[node]))
            closed = closed.at[node].set(~(below & ~closed).any())
            return parent[node], value, visits.at[node].add(1.0), closed

        _, value, visits, closed = jax.lax.while_loop(lambda c: c[0] >= 0, up, (leaf, value, visits, closed))
        return value, visits, closed

    value, visits, closed = jax.vmap(one)(tree.parent, tree.value, tree.visits, tree.closed, leaf)
    return tree._replace(value=value, visits=visits, closed=closed)


def tree_targets(parent: Int[Array, "M"], right: Bool[Array, "M"]) -> Float[Array, "M"]:
    """Target value of each node of a finished tree; NaN if the tree has no right leaf.

        v = max(0, v_parent + (1 - v_parent) s / m),   v_root = 0

    with s = 1 on a path to a right leaf and -1 elsewhere; m is 1 for a right leaf, 1 + the least m of the children on
    such a path, and that of the nearest ancestor on none.

    Args:
      parent: of each node, which has a smaller number; -1 for the root, node 0, and for nodes that are not there.
      right: leaves that were verified.

    >>> right = jnp.arange(6) == 5
    >>> [round(float(v), 6) for v in tree_targets(jnp.array([-1, 0, 0, 1, 1, 3]), right)[1:]]
    [0.333333, 0.0, 0.666667, 0.111111, 1.0]
    """
    count = parent.shape[0]
    far = jnp.float32(count + 1)
    above = jnp.maximum(parent, 0)

    def upwards(k: Array, steps: Array) -> Array:
        node = count - 1 - k
        return steps.at[above[node]].min(jnp.where(parent[node] >= 0, steps[node] + 1, far))

    steps = jax.lax.fori_loop(0, count, upwards, jnp.where(right, 1.0, far))
    on_path = steps < far

    def downwards(node: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        left, value = carry
        left = left.at[node].set(jnp.where(on_path[node], steps[node], left[above[node]]))
        moved = value[above[node]] + (1 - value[above[node]]) * jnp.where(on_path[node], 1.0, -1.0) / left[node]
        return left, value.at[node].set(jnp.maximum(moved, 0.0))

    _, value = jax.lax.fori_loop(1, count, downwards, (jnp.where(on_path, steps, far), jnp.zeros(count)))
    return jnp.where(on_path[0] & ((parent >= 0) | (jnp.arange(count) == 0)), value, jnp.nan)


def _labels(
    parent: Int[Array, "M1"], targets: Float[Array, "M1"], length: Int[Array, "M"], tokens: Int[Array, "M T"]
) -> Float[Array, "M T"]:
    """The target of each step of a node's completion on the last token of the step; NaN elsewhere."""
    nodes, width = tokens.shape
    end = jnp.pad(length, (1, 0)) - 1

    def one(node: Array) -> Array:
        def up(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            node, labels = carry
            return parent[node], labels.at[jnp.clip(end[node], 0, width - 1)].set(targets[node])

        return jax.lax.while_loop(lambda c: c[0] > 0, up, (node, jnp.full(width, jnp.nan)))[1]

    found = jax.vmap(one)(jnp.arange(1, nodes + 1))
    return jnp.where((parent[1:] >= 0)[:, None], found, jnp.nan)
