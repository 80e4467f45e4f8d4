"""Bilevel learning: the gradient of an outer objective through what an inner problem's solution does."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Float, PyTree

from jaxrl_llm.ranges import Count, NonNegative, ranged


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

    H is never formed: a conjugate gradient with Hessian-vector products solves for it. BaRFi blends auxiliary rewards
    by it (`upper` is the return of the primary reward). PARL learns a reward from preferences on pairs of the policy
    that is best under it; the first term alone is ordinary reward learning.

    Args:
      lower: (outer, inner) -> what the inner problem maximises, concave near its solution: with a pull to 0 such as
        - lam / 2 * |inner|^2, without which a softmax policy has a direction that changes nothing.
      upper: (outer, inner) -> what the outer problem is about.
      outer: such as the parameters of a reward.
      inner: the solution of the inner problem, or near it: elsewhere the gradient is biased.
      iterations: of the conjugate gradient, at most.
      damping: added to the diagonal of -H.

    Returns:
      (the gradient, the norm of the inner gradient, which says how far `inner` is from a solution).

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
