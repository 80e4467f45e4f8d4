"""Mixture of experts: a router picks k of E gated MLPs for each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.parallel.backend import backend_in_use
from jaxrl_llm.parallel.rules import map_parts

ExpertProduct = Literal["auto", "ragged", "dense"]


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in every block.

    Attributes:
      count: experts.
      per_token: experts that serve a token.
      normalise: the weights of a token's experts are made to sum to one.
      product: "ragged" sorts tokens by expert and computes only what is chosen; "dense" computes every expert for
        every token, one expert at a time; "auto" is dense on CPU, where a ragged product is computed densely anyway.
    """

    count: int
    per_token: int
    normalise: bool = True
    product: ExpertProduct = "auto"

    def __post_init__(self):
        if not 1 <= self.per_token <= self.count:
            raise ValueError(
                f"model.experts.per_token is {self.per_token} of model.experts.count {self.count}; it must be at "
                "least 1 and at most the count"
            )
        if self.product not in get_args(ExpertProduct):
            known = ", ".join(get_args(ExpertProduct))
            raise ValueError(f"model.experts.product is {self.product!r}; it must be one of {known}")

    @property
    def ragged(self) -> bool:
        """Whether only the chosen experts are computed."""
        return self.product == "ragged" or (self.product == "auto" and backend_in_use() != "cpu")


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
      probabilities: softmax of the router's scores over all experts, float32.
      choices: the experts of each token, most probable first.
      weights: of their answers, float32.
    """

    probabilities: Float[Array, "B T E"]
    choices: Int[Array, "B T k"]
    weights: Float[Array, "B T k"]


def route(
    x: Float[Array, "B T D"],
    router: Float[Array, "D E"],
    experts: ExpertsConfig,
    choices: Int[Array, "B T k"] | None = None,
) -> Routing:
    """Pick the `per_token` most probable experts, or weigh those that are given.

    Args:
      x: normed input of the block's MLP.
      router: the router's projection.
      experts: count, per_token and normalise are read.
      choices: recorded earlier: the same experts serve each token, with weights of the present router, so that
        training differentiates through the path that sampling took.
    """
    chex.assert_rank([x, router], [3, 2])
    scores = jnp.einsum("btd,de->bte", x, router, preferred_element_type=jnp.float32)
    probabilities = jax.nn.softmax(scores, axis=-1)
    if choices is None:
        choices = jax.lax.top_k(probabilities, experts.per_token)[1]
    if experts.normalise:
        # Their probabilities over the sum of them, which does not underflow for experts that were improbable.
        weights = jax.nn.softmax(jnp.take_along_axis(scores, choices, axis=-1), axis=-1)
    else:
        weights = jnp.take_along_axis(probabilities, choices, axis=-1)
    return Routing(probabilities, choices, weights)


def expert_mlp(
    x: Float[Array, "B T D"],
    routing: Routing,
    gate_up: Float[Array, "E D 2 M"],
    down: Float[Array, "E M D"],
    *,
    activation: Callable[[Array], Array],
    ragged: bool,
) -> Float[Array, "B T D"]:
    """sum over a token's experts of weight * down(activation(gate(x)) * up(x))."""
    chex.assert_rank([x, gate_up, down], [3, 4, 3])
    serve = _ragged if ragged else _dense

    def served(first, experts, tokens):
        x, choices, weights = (leaf.reshape(-1, leaf.shape[-1]) for leaf in tokens)
        # Experts are numbered from the first one here; those that are elsewhere have numbers that none here has.
        gate_up, down = experts
        return serve(x, choices - first, weights, gate_up, down, activation).reshape(tokens[0].shape)

    tokens = x, routing.choices, routing.weights.astype(x.dtype)
    return map_parts(served, (gate_up, down), tokens, "rows", "positions", part="expert")


def _ragged(x, choices, weights, gate_up, down, activation):
    """Sort (token, expert) pairs by expert, so that each expert serves one run of rows."""
    per_token, (count, width, _, hidden) = choices.shape[1], gate_up.shape
    # Pairs whose expert is elsewhere come last, belong to no run, and are kept out of results and gradients alike.
    choices = jnp.where((choices >= 0) & (choices < count), choices, count).ravel()
    order = jnp.argsort(choices, stable=True)
    here = (choices[order] < count)[:, None]
    sizes = jnp.bincount(choices, length=count)
    rows = jnp.where(here, x[order // per_token], 0)
    both = jnp.where(here, jax.lax.ragged_dot(rows, gate_up.reshape(count, width, 2 * hidden), sizes), 0)
    gate, up = jnp.split(both, 2, axis=-1)
    answers = jnp.where(here, jax.lax.ragged_dot(activation(gate) * up, down, sizes), 0)
    # The inverse permutation rather than a scatter-add: its order of summation is fixed.
    answers = answers[jnp.argsort(order)].reshape(-1, per_token, width)
    return (answers * weights[..., None]).sum(axis=1)


def _dense(x, choices, weights, gate_up, down, activation):
    """Every expert sees every token; one at a time, so that memory does not grow with their number."""
    count = gate_up.shape[0]
    shares = (weights[..., None] * jax.nn.one_hot(choices, count, dtype=weights.dtype)).sum(axis=1)

    def add(total, expert):
        gate_up, down, share = expert
        both = jnp.einsum("nd,dcm->ncm", x, gate_up)
        return total + share[:, None] * ((activation(both[:, 0]) * both[:, 1]) @ down), None

    return jax.lax.scan(add, jnp.zeros_like(x), (gate_up, down, shares.T))[0]


def load_balancing_loss(
    probabilities: Float[Array, "L B T E"], choices: Int[Array, "L B T k"], mask: Float[Array, "B T"]
) -> Float[Array, ""]:
    """E * sum_e (assignments to e a token) * (mean probability of e), over all layers and the tokens of the mask.

    It is `per_token` when experts share the work evenly, and larger otherwise. Both means are over the whole batch: it
    is a statistic of a batch, not a sum over tokens, and a split batch has another value.

    Args:
      probabilities: of the routers, as captured by the forward pass.
      choices: likewise.
      mask: 1 for tokens that count, 0 for padding.

    Reference: Switch Transformer (arXiv 2101.03961).
    """
    chex.assert_rank([probabilities, choices, mask], [4, 4, 2])
    count = probabilities.shape[-1]
    mask = jnp.broadcast_to(mask.astype(jnp.float32), probabilities.shape[:3])
    tokens = jnp.maximum(mask.sum(), 1.0)
    chosen = jax.nn.one_hot(choices, count, dtype=jnp.float32).sum(axis=-2)
    assigned = jnp.einsum("lbte,lbt->e", chosen, mask) / tokens
    likely = jnp.einsum("lbte,lbt->e", probabilities.astype(jnp.float32), mask) / tokens
    return count * jnp.sum(assigned * likely)
