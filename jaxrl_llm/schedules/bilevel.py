"""Bilevel learning: the gradient of an outer objective through the solution of an inner problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Float, Int, PyTree

from jaxrl_llm.experience import Method
from jaxrl_llm.ranges import Count, NonNegative, Positive, ranged
from jaxrl_llm.statistics import by_row

BlendForm = Literal["return", "preferences"]


@ranged
def implicit_gradient(
    lower: Callable[[PyTree, PyTree], Float[Array, ""]],
    upper: Callable[[PyTree, PyTree], Float[Array, ""]],
    outer: PyTree,
    inner: PyTree,
    *,
    iterations: Count = 50,
    damping: NonNegative = 0.0,
) -> tuple[PyTree, Float[Array, ""]]:
    """The gradient of upper(outer, inner*(outer)), where inner* maximises lower(outer, .).

        g = d upper / d outer - (d2 lower / d inner d outer)^T H^-1 (d upper / d inner),   H = d2 lower / d inner2

    H is never formed: conjugate gradients solve the linear system with Hessian-vector products. BaRFi uses g to learn
    the weights of auxiliary rewards (`upper` is the return of the primary reward). PARL learns a reward from
    preferences on pairs that the optimal policy of that reward samples; the first term alone is ordinary reward
    learning.

    Args:
      lower: (outer, inner) -> the objective that the inner problem maximises, concave near its solution. Include a
        penalty such as - lam / 2 * |inner|^2: without it H is singular for a softmax policy.
      upper: (outer, inner) -> the outer objective.
      outer: variables of the outer problem, such as the parameters of a reward.
      inner: an approximate solution of the inner problem; the gradient is biased by its error.
      iterations: most iterations of conjugate gradients.
      damping: added to the diagonal of -H.

    Returns:
      (the gradient, shaped like `outer`; the norm of d lower / d inner, which is 0 at a solution).

    Reference: BaRFi (2310.19007); PARL (2308.02585).
    Certainty: recalled
    """
    slope = jax.grad(lower, argnums=1)
    direct, sensitivity = jax.grad(upper, argnums=(0, 1))(outer, inner)

    def bent(vector: PyTree) -> PyTree:  # -H v, positive definite
        product = jax.jvp(lambda x: slope(outer, x), (inner,), (vector,))[1]
        return jax.tree.map(lambda p, v: damping * v - p, product, vector)

    solved, _ = cg(bent, sensitivity, maxiter=iterations, tol=1e-8)
    through = jax.vjp(lambda phi: slope(phi, inner), outer)[1](solved)[0]
    rest = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(slope(outer, inner))))
    return jax.tree.map(jnp.add, direct, through), rest


@ranged
def implicit_blend(
    *,
    primary: str,
    reward_names: tuple[str, ...],
    initial: Sequence[float] | None = None,
    form: BlendForm = "return",
    learning_rate: NonNegative = 1.0,
    decay: NonNegative = 0.05,
    pull: Positive = 0.5,
    every_steps: Count = 1,
    inner_steps: Count = 200,
) -> Method:
    """A weighted sum of rewards whose weights are learned by the implicit gradient, once per step.

        r_phi = sum_k phi_k r_k
        inner   theta* = argmax over theta of mean over prompts of sum_i p_i r_phi,i - pull / 2 |theta|^2
                p = softmax over the samples i of a prompt of theta . f_i
        return        phi rises along d/dphi of the mean of sum_i p_i r_primary,i at theta*
        preferences   phi falls along d/dphi of the mean of sum_ij p_i p_j x_ij at theta*,
                      x_ij = cross-entropy of sigmoid(r_phi,i - r_phi,j) against sigmoid(r_primary,i - r_primary,j)

    The inner problem is small: a softmax policy over the samples of the batch that is linear in the hidden states f. So
    one step suffices for the samples, the inner solution and the outer gradient. `return` is BaRFi: the weight of an
    auxiliary reward that conflicts with the primary one falls, even below 0. `preferences` is PARL: the primary reward
    labels pairs of samples and has weight 0 in the blend; the distribution of the pairs depends on the blend.

    Args:
      primary: name of the reward function of the outer objective.
      reward_names: names of the columns in their order; filled from the run.
      initial: weights before the first update, one per reward function; None is 1 for each.
      form: as above.
      learning_rate: of the weights. If it is too low, the policy converges on a misleading reward first, and its equal
        samples then carry no gradient for the weights.
      decay: weight decay of each update, scaled by the learning rate; without it the weights grow without bound.
      pull: strength of the quadratic penalty on theta; features are scaled to a mean square of 1.
      every_steps: steps between two updates of the weights.
      inner_steps: steps of gradient ascent on the inner problem.

    Returns:
      A method: (reward_components, embedding, group, weight, step) -> a dictionary with `rewards` [B], the blend by the
      new weights; `metric/lower_gradient`, the norm of the inner gradient, 0 at a solution; and `metric/blend_NAME`,
      the weight of each reward function. `embedding` is [B D], such as the value of `mean_hidden`.

    Raises:
      ValueError: for an unknown form, a `primary` that is not a reward function, or an `initial` of another length than
      `reward_names`.

    Reference: BaRFi (2310.19007); PARL (2308.02585). The inner problem over samples is not from these papers.
    Certainty: reconstructed
    """
    if form not in get_args(BlendForm):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(BlendForm))}")

    def settled() -> tuple[int, Float[Array, "K"]]:
        """(column of the primary reward, 1 for rewards that may have a weight in the blend)."""
        if primary not in reward_names:
            raise ValueError(f"primary is {primary!r}; it must be one of the rewards {', '.join(reward_names)}")
        at = reward_names.index(primary)
        return at, jnp.asarray([form == "return" or place != at for place in range(len(reward_names))], jnp.float32)

    def update(
        memory: dict[str, Array],
        reward_components: Float[Array, "B K"],
        embedding: Float[Array, "B D"],
        group: Int[Array, "B"],
        weight: Float[Array, "B"],
        step: Int[Array, ""],
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        chex.assert_rank([reward_components, embedding], 2)
        at, taking_part = settled()
        columns = jnp.where(jnp.isnan(reward_components), 0.0, reward_components.astype(jnp.float32))
        lower, upper, start, rate = _over_samples(columns, columns[:, at], embedding, group, weight > 0, form, pull)

        def learned(memory: dict[str, Array]) -> dict[str, Array]:
            phi, slope = memory["weights"], jax.grad(lower, argnums=1)
            climbed = jax.lax.fori_loop(0, inner_steps, lambda _, x: x + rate(phi) * slope(phi, x), start)
            gradient, rest = implicit_gradient(lower, upper, phi, climbed)
            moved = phi + learning_rate * (gradient - decay * phi)
            return {"weights": jnp.where(jnp.isfinite(moved), moved, phi) * taking_part, "rest": rest}

        after = jax.lax.cond(step % every_steps == 0, learned, lambda memory: memory, memory)
        told = {f"metric/blend_{name}": after["weights"][place] for place, name in enumerate(reward_names)}
        return {"rewards": columns @ after["weights"], "metric/lower_gradient": after["rest"], **told}, after

    def init() -> dict[str, Array]:
        first = [1.0] * len(reward_names) if initial is None else [float(one) for one in initial]
        if len(first) != len(reward_names):
            raise ValueError(f"initial has {len(first)} weights; give one for each of the {len(reward_names)} rewards")
        return {"weights": jnp.asarray(first, jnp.float32) * settled()[1], "rest": jnp.float32(0.0)}

    return Method(init, update)


def _over_samples(
    columns: Array, primary: Array, embedding: Array, group: Array, there: Array, form: str, pull: float
) -> tuple[Callable[..., Array], Callable[..., Array], Array, Callable[[Array], Array]]:
    """(inner objective, outer objective, both of (weights, theta); theta = 0; step size of the ascent by weights)."""
    count, groups = len(group), jax.ops.segment_sum(there * 1.0, group, len(group))
    of_group = lambda x: jax.ops.segment_sum(x, group, count)[group]  # noqa: E731
    kept = jnp.where(there[:, None], embedding.astype(jnp.float32), 0.0)
    mean = jax.ops.segment_sum(kept, group, count) / jnp.maximum(groups, 1.0)[:, None]
    features = jnp.where(there[:, None], kept - mean[group], 0.0)
    square = jnp.square(features).sum(1)
    unit = jnp.maximum(square.sum() / jnp.maximum(there.sum(), 1), 1e-12)
    features, prompts = features / jnp.sqrt(unit), jnp.maximum((groups > 0).sum(), 1)

    def shares(theta: Array) -> Array:
        scores = jnp.where(there, features @ theta, -jnp.inf)
        highest = jax.lax.stop_gradient(jax.ops.segment_max(scores, group, count)[group])
        risen = jnp.where(there, jnp.exp(jnp.where(there, scores - highest, 0.0)), 0.0)
        return risen / jnp.maximum(of_group(risen), 1e-30)

    def lower(phi: Array, theta: Array) -> Array:
        return shares(theta) @ (columns @ phi) / prompts - pull / 2 * jnp.sum(theta**2)

    def upper(phi: Array, theta: Array) -> Array:
        p = shares(theta)
        if form == "return":
            return p @ primary / prompts
        rewards = columns @ phi

        def against_siblings(reward: Array, gold: Array, id: Array) -> Array:
            gap, told = reward - rewards, jax.nn.sigmoid(gold - primary)
            loss = -told * jax.nn.log_sigmoid(gap) - (1 - told) * jax.nn.log_sigmoid(-gap)
            return jnp.where(group == id, loss, 0.0) @ p

        return -p @ by_row(against_siblings, rewards, primary, group) / prompts

    def rate(phi: Array) -> Array:  # 1 / (bound of the curvature)
        rewards = jnp.where(there, columns @ phi, 0.0)
        return 1.0 / (pull + 2 * jnp.abs(rewards).max() * square.max() / unit)

    return lower, upper, jnp.zeros(embedding.shape[1]), rate
