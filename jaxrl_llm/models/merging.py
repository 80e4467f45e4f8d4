"""Merging of models of one architecture: means, spherical interpolation and sums of parameter changes, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxrl_llm.bounds import counted
from jaxrl_llm.ranges import Range, Share, ShareBelowOne, ranged


def averaged(trees: Sequence[PyTree], weights: Sequence[float] | None = None, *, normalised: bool = True) -> PyTree:
    """The weighted mean of several models, tensor by tensor.

        theta = sum_i w_i theta_i / sum_i w_i

    Args:
      trees: parameters, of one structure.
      weights: one per tree; None gives all the same weight.
      normalised: divide by the sum of the weights.

    Raises:
      ValueError: for trees that differ in structure or shape, a wrong number of weights, or weights that sum to 0.

    Reference: model soups (2203.05482).
    Certainty: recalled
    """
    given = _numbers("weights", weights, trees)
    total = sum(given) if normalised else 1.0
    if total == 0:
        raise ValueError(f"weights {given} sum to 0, so they cannot be normalised; change one, or set normalised=False")
    return _combined(lambda *xs: sum(w / total * x for w, x in zip(given, xs, strict=True)), *trees)


def spherical(first: PyTree, second: PyTree, t: float = 0.5) -> PyTree:
    """Spherical linear interpolation (slerp) between two models, tensor by tensor.

        c = <a, b> / (|a| |b|),   W = arccos c
        theta = sin((1 - t) W) / sin W * a + sin(t W) / sin W * b

    Tensors are not normalised. Between two tensors of equal norm the norm is kept, whereas a mean has a smaller norm.
    If |c| > 0.9995 or one tensor is zero, the result is (1 - t) a + t b. t = 0 gives the first model, 1 the second.

    Raises:
      ValueError: for trees that differ in structure or shape.

    Reference: slerp, Shoemake (1985).
    Certainty: recalled
    """

    def arc(a: Array, b: Array) -> Array:
        norms = jnp.linalg.norm(a.ravel()) * jnp.linalg.norm(b.ravel())
        cosine = jnp.where(norms > 1e-12, jnp.vdot(a, b) / jnp.maximum(norms, 1e-12), 1.0)
        straight = jnp.abs(cosine) > 0.9995
        angle = jnp.arccos(jnp.where(straight, 0.0, cosine))
        one = jnp.where(straight, 1 - t, jnp.sin((1 - t) * angle) / jnp.sin(angle))
        return one * a + jnp.where(straight, t, jnp.sin(t * angle) / jnp.sin(angle)) * b

    return _combined(arc, first, second)


def task_arithmetic(base: PyTree, tuned: Sequence[PyTree], scales: Sequence[float] | None = None) -> PyTree:
    """A base model plus the scaled changes of models that were fine-tuned from it.

        theta = theta_0 + sum_i lambda_i (theta_i - theta_0)

    With one tuned model, lambda above 1 extrapolates its change (ExPO; 1.5 in HelpSteer2-Preference), and a negative
    lambda reverses it.

    Args:
      base: theta_0.
      tuned: models fine-tuned from it.
      scales: lambda, one per model; None is 1 for each.

    Raises:
      ValueError: for trees that differ in structure or shape, or a wrong number of scales.

    Reference: task arithmetic (2212.04089); ExPO (2404.16792).
    Certainty: recalled
    """
    given = _numbers("scales", scales, tuned)
    return _combined(lambda b, *xs: b + sum(s * (x - b) for s, x in zip(given, xs, strict=True)), base, *tuned)


@ranged
def dropped_and_rescaled(base: PyTree, tuned: PyTree, *, share: ShareBelowOne = 0.9, seed: int = 0) -> PyTree:
    """A tuned model with a random share of its changes dropped and the rest rescaled (DARE).

        theta = theta_0 + keep / (1 - share) * (theta - theta_0),   keep ~ Bernoulli(1 - share)

    Its expectation is the tuned model. Several such models can be merged by `task_arithmetic` or `elected`; few
    entries are then changed by more than one model.

    Args:
      base: theta_0.
      tuned: theta.
      share: share of the changes to drop; 0 drops none.
      seed: of the random choice; use different seeds for models that will be merged.

    Raises:
      ValueError: for trees that differ in structure or shape, or a share outside [0, 1).

    Reference: DARE (2311.03099).
    Certainty: recalled
    """
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(base))))

    def thinned(b: Array, x: Array) -> Array:
        keep = jax.random.bernoulli(next(keys), 1 - share, b.shape)
        return b + jnp.where(keep, (x - b) / (1 - share), 0.0)

    return _combined(thinned, base, tuned)


@ranged
def elected(
    base: PyTree,
    tuned: Sequence[PyTree],
    *,
    density: Annotated[float, Range(0, 1, open="(")] = 0.2,
    scale: float = 1.0,
) -> PyTree:
    """A base model plus the mean change of several tuned models, over the changes that agree in sign (TIES).

    Each model keeps the share `density` of largest absolute changes d_i of a tensor. The sign of an entry is that of
    the sum over models, and the mean is over the models whose change has this sign:

        theta = theta_0 + scale * mean over { i : sign d_i = sign sum_j d_j } of d_i

    Args:
      base: theta_0.
      tuned: models fine-tuned from it.
      density: share of a tensor's entries that a model keeps, at least one entry; ties at the threshold are all kept.
      scale: of the merged change.

    Raises:
      ValueError: for trees that differ in structure or shape, or a density outside (0, 1].

    Reference: TIES (2306.01708).
    Certainty: recalled
    """

    def merged(b: Array, *xs: Array) -> Array:
        changes = jnp.stack([x - b for x in xs])
        size = jnp.abs(changes.reshape(len(xs), -1))
        kept = max(1, round(density * size.shape[1]))
        least = jnp.sort(size, axis=1)[:, size.shape[1] - kept].reshape(-1, *[1] * b.ndim)
        changes = jnp.where(jnp.abs(changes) >= least, changes, 0.0)
        agree = (jnp.sign(changes) == jnp.sign(changes.sum(0))) & (changes != 0)
        return b + scale * jnp.where(agree, changes, 0.0).sum(0) / jnp.maximum(agree.sum(0), 1)

    return _combined(merged, base, *tuned)


@ranged
def selected(
    base: PyTree,
    tuned: PyTree,
    *,
    density: Annotated[float, Range(0, 1, open="(")] = 0.2,
    scale: float = 1.0,
) -> PyTree:
    """A base model plus the largest changes of a tuned model (update-selective merging).

        theta = theta_0 + scale * keep * (theta - theta_0),   keep: int(density * size) largest |changes| of a tensor

    DLER uses it for a model that was trained to be short: the merged model keeps most of the brevity and regains the
    accuracy of the base. density 1 returns the tuned model. Among equal changes the first entries are kept.

    Args:
      base: theta_0.
      tuned: theta.
      density: share of a tensor's entries that is kept.
      scale: of the kept changes.

    Raises:
      ValueError: for trees that differ in structure or shape, or a density outside (0, 1].

    Reference: DLER (2510.15110).
    Certainty: recalled
    """

    def kept(b: Array, x: Array) -> Array:
        change = (x - b).ravel()
        largest = jnp.argsort(-jnp.abs(change), stable=True)[: int(density * change.size)]
        return b + scale * jnp.zeros_like(change).at[largest].set(change[largest]).reshape(b.shape)

    return _combined(kept, base, tuned)


@ranged
def balanced_initialisation(
    instruct: PyTree, distilled: PyTree, pretrained: PyTree, *, a: Share = 0.5, b: Share = 0.8
) -> PyTree:
    """An initial policy for RL after distillation: interpolated from an instruct model, a distilled one and their base.

        theta_1 = a theta_instruct + (1 - a) theta_distilled,   theta_0 = b theta_1 + (1 - b) theta_pretrained

    It is the mean with the weights a b, (1 - a) b and 1 - b (`jaxrl merge INSTRUCT DISTILLED PRETRAINED --weights`).
    The paper scans a over 0.3 to 0.7 and b over 0.7 to 0.9 for the highest initial reward without shorter completions.

    Args:
      instruct, distilled, pretrained: parameters of one structure.
      a: share of the instruct model in theta_1.
      b: share of theta_1.

    Raises:
      ValueError: for trees that differ in structure or shape.

    Reference: BAI (2509.00309).
    Certainty: reconstructed
    """
    return averaged([instruct, distilled, pretrained], [a * b, (1 - a) * b, 1 - b])


def _combined(function: Any, *trees: PyTree) -> PyTree:
    """A function of the tensors of several trees, computed in float32 and cast to the dtypes of the first tree."""
    first = jax.tree.structure(trees[0])
    for place, tree in enumerate(trees[1:], 1):
        if jax.tree.structure(tree) != first:
            raise ValueError(f"model {place} has different parameters from model 0; merge models of one architecture")
    for path, *leaves in zip(*_paths(trees), strict=True):
        if len(shapes := {tuple(leaf.shape) for leaf in leaves}) > 1:
            raise ValueError(f"{path} has the shapes {sorted(shapes)}; merge models of one architecture")

    def each(*xs: Array) -> Array:
        return function(*(jnp.asarray(x, jnp.float32) for x in xs)).astype(jnp.asarray(xs[0]).dtype)

    return jax.tree.map(each, *trees)


def _paths(trees: Sequence[PyTree]) -> list[list[Any]]:
    named = jax.tree_util.tree_leaves_with_path(trees[0])
    return [[jax.tree_util.keystr(path) for path, _ in named], *(jax.tree.leaves(tree) for tree in trees)]


def _numbers(name: str, given: Sequence[float] | None, trees: Sequence[PyTree]) -> list[float]:
    numbers = [1.0] * len(trees) if given is None else [float(number) for number in given]
    if len(numbers) != len(trees) or not trees:
        held = counted(len(numbers), "number")
        raise ValueError(f"{name} has {held} for {counted(len(trees), 'model')}; give one per model")
    return numbers
