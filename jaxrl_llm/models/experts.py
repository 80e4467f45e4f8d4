"""Mixture of experts: a router picks k of E gated MLPs for each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.parallel.backend import backend_in_use
from jaxrl_llm.parallel.rules import map_parts
from jaxrl_llm.ranges import Count, Natural, Positive, Range, require_ranges

# Largest number of input elements of the (token, expert) pairs that are computed at a time.
PAIRS_AT_A_TIME = 2**28

ExpertProduct = Literal["auto", "ragged", "dense"]
RouterScores = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in every block, or in all but the first ones.

    Attributes:
      count: experts.
      per_token: experts per token.
      normalise: the weights of a token's experts are normalised to sum to one.
      scores: function of the router's logits: a softmax over all experts, or a sigmoid for each.
      router_bias: the router has a bias.
      selection_bias: a bias for each expert is added to its score for the choice of experts, but not for their weights.
      groups: experts stand in groups of equal size, of which a token takes its own from `groups_per_token`: those whose
        two best scores have the largest sum.
      groups_per_token: groups that are open to a token.
      scale: factor on the weights.
      shared_width: hidden width of an MLP that serves every token beside its experts; None has none.
      shared_gate: its answer is multiplied by the sigmoid of a projection of the token.
      own_norms: what serves every token and the experts have norms of their own, before and after, beside those of the
        block; the router has one too, and a factor for each expert on its weight.
      dense_layers: first blocks that have an MLP instead of experts.
      dense_width: hidden width of that MLP.
      product: "ragged" sorts tokens by expert and computes only what is chosen; "dense" computes every expert for
        every token, one expert at a time; "auto" is dense on CPU, where a ragged product is computed densely anyway.
    """

    count: Annotated[int, Range(1, 100_000)]
    per_token: Count
    normalise: bool = True
    scores: RouterScores = "softmax"
    router_bias: bool = False
    selection_bias: bool = False
    groups: Count = 1
    groups_per_token: Count = 1
    scale: Positive = 1.0
    shared_width: Count | None = None
    shared_gate: bool = False
    own_norms: bool = False
    dense_layers: Natural = 0
    dense_width: Count | None = None
    product: ExpertProduct = "auto"

    def __post_init__(self):
        require_ranges(self, "model.experts")
        if not 1 <= self.per_token <= self.count:
            raise ValueError(
                f"model.experts.per_token is {self.per_token} of model.experts.count {self.count}; it must be at "
                "least 1 and at most the count"
            )
        for name, kind in (("product", ExpertProduct), ("scores", RouterScores)):
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ValueError(f"model.experts.{name} is {getattr(self, name)!r}; it must be one of {known}")
        if self.groups < 1 or self.count % self.groups or not 1 <= self.groups_per_token <= self.groups:
            raise ValueError(
                f"model.experts has {self.groups} groups, {self.groups_per_token} for a token, of {self.count} "
                "experts; groups must divide the experts, and a token has at least one and at most all"
            )
        if self.per_token > self.groups_per_token * (self.count // self.groups):
            raise ValueError(
                f"model.experts.per_token is {self.per_token}, but {self.groups_per_token} groups of "
                f"{self.count // self.groups} experts are open to a token; open more groups"
            )
        if not self.scale > 0:
            raise ValueError(f"model.experts.scale is {self.scale}; it must be above 0")
        if self.shared_gate and self.shared_width is None:
            raise ValueError(
                "model.experts.shared_gate is true, but shared_width is not set; set it, or leave both out"
            )
        if self.own_norms and (self.shared_width is None or self.dense_layers):
            raise ValueError(
                "model.experts.own_norms is true, which needs shared_width, and dense_layers 0; set them, or leave it "
                "out"
            )
        if self.dense_layers < 0 or (self.dense_layers > 0) != (self.dense_width is not None):
            raise ValueError(
                f"model.experts.dense_layers is {self.dense_layers} and dense_width is {self.dense_width}; set both, "
                "or leave both out"
            )

    @property
    def ragged(self) -> bool:
        """Whether only the chosen experts are computed."""
        return self.product == "ragged" or (self.product == "auto" and backend_in_use() != "cpu")


class Routing(NamedTuple):
    """The experts of each token.

    Attributes:
      probabilities: of all experts, float32: the softmax of the router's scores, or their sigmoids over the sum.
      choices: the experts of each token, best first.
      weights: of their outputs, float32.
    """

    probabilities: Float[Array, "B T E"]
    choices: Int[Array, "B T k"]
    weights: Float[Array, "B T k"]


def route(
    x: Float[Array, "B T D"],
    router: Float[Array, "D E"],
    experts: ExpertsConfig,
    choices: Int[Array, "B T k"] | None = None,
    *,
    bias: Float[Array, "E"] | None = None,
    selection_bias: Float[Array, "E"] | None = None,
    factor: Float[Array, "E"] | None = None,
) -> Routing:
    """Pick the `per_token` best experts, or compute the weights of given ones.

    Args:
      x: normed input of the block's MLP.
      router: the router's projection.
      experts: how scores become choices and weights.
      choices: recorded earlier: each token uses the same experts, with weights of the current router, so that training
        differentiates through the experts that sampling used.
      bias: of the projection.
      selection_bias: added where experts are chosen; it has no gradient.
      factor: of each expert, on its weight.
    """
    chex.assert_rank([x, router], [3, 2])
    sigmoid = experts.scores == "sigmoid"
    if sigmoid:  # such routers were trained in float32
        x, router = x.astype(jnp.float32), router.astype(jnp.float32)
    scores = jnp.einsum("btd,de->bte", x, router, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    found = jax.nn.sigmoid(scores) if sigmoid else jax.nn.softmax(scores, axis=-1)
    if choices is None:
        ranked = found if selection_bias is None else found + selection_bias.astype(jnp.float32)
        choices = jax.lax.top_k(_of_open_groups(ranked, experts), experts.per_token)[1]
    weights = jnp.take_along_axis(found, choices, axis=-1)
    if experts.normalise:
        # A softmax over the chosen experts does not underflow for improbable ones.
        over_sum = lambda: weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)  # noqa: E731
        chosen = jnp.take_along_axis(scores, choices, axis=-1)
        weights = over_sum() if sigmoid else jax.nn.softmax(chosen, axis=-1)
    if factor is not None:
        weights = weights * factor.astype(jnp.float32)[choices]
    probabilities = found / (found.sum(axis=-1, keepdims=True) + 1e-20) if sigmoid else found
    return Routing(probabilities, choices, weights if experts.scale == 1.0 else weights * experts.scale)


def _of_open_groups(ranked: Float[Array, "B T E"], experts: ExpertsConfig) -> Float[Array, "B T E"]:
    """The scores, with -inf for experts whose group is not among a token's best ones."""
    if experts.groups == 1:
        return ranked
    grouped = ranked.reshape(*ranked.shape[:2], experts.groups, -1)
    best_two = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(axis=-1)
    opened = jax.nn.one_hot(jax.lax.top_k(best_two, experts.groups_per_token)[1], experts.groups).sum(axis=-2)
    return jnp.where(opened[..., None] > 0, grouped, -jnp.inf).reshape(ranked.shape)


def expert_mlp(
    x: Float[Array, "B T D"],
    routing: Routing,
    gate_up: Float[Array, "E D 2 M"],
    down: Float[Array, "E M D"],
    *,
    gated: Callable[[Array, Array], Array],
    ragged: bool,
    gate_up_bias: Float[Array, "E 2 M"] | None = None,
    down_bias: Float[Array, "E D"] | None = None,
) -> Float[Array, "B T D"]:
    """sum over a token's experts of weight * down(gated(gate(x), up(x)))."""
    chex.assert_rank([x, gate_up, down], [3, 4, 3])
    serve = _ragged if ragged else _dense

    def served(first, experts, tokens):
        x, choices, weights = (leaf.reshape(-1, leaf.shape[-1]) for leaf in tokens)
        # Experts are numbered from the first one here; those that are elsewhere have numbers that none here has.
        return serve(x, choices - first, weights, experts, gated).reshape(tokens[0].shape)

    tokens = x, routing.choices, routing.weights.astype(x.dtype)
    biases = () if gate_up_bias is None or down_bias is None else (gate_up_bias, down_bias)
    names = (("expert", None, None, "mlp"), ("expert", "mlp", None), ("expert", None, "mlp"), ("expert", None))
    parts = (gate_up, down, *biases)
    return map_parts(served, parts, tokens, "rows", "positions", part_names=names[: len(parts)])


def _ragged(x, choices, weights, experts, gated):
    """Sort (token, expert) pairs by expert, so that each expert computes contiguous rows.

    Long batches are computed in equal parts, which bounds memory. Gradients of the experts are summed over the parts in
    float32.
    """
    parts = -(-x.size * choices.shape[1] // PAIRS_AT_A_TIME)
    if parts <= 1:
        return _sorted_pairs(x, choices, weights, experts, gated)
    wide = tuple(leaf.astype(jnp.float32) for leaf in experts)

    @jax.checkpoint
    def one(part):
        narrow = tuple(leaf.astype(given.dtype) for leaf, given in zip(wide, experts, strict=True))
        x, choices, weights = part
        return _sorted_pairs(x, choices, weights, narrow, gated)

    def cut(leaf, fill):
        whole = jnp.pad(leaf, [(0, -leaf.shape[0] % parts), (0, 0)], constant_values=fill)
        return whole.reshape(parts, -1, leaf.shape[-1])

    served = jax.lax.map(one, (cut(x, 0), cut(choices, -1), cut(weights, 0)))
    return served.reshape(-1, x.shape[1])[: x.shape[0]]


def _sorted_pairs(x, choices, weights, experts, gated):
    gate_up, down, *biases = experts
    per_token, (count, width, _, hidden) = choices.shape[1], gate_up.shape
    # Pairs whose expert is elsewhere come last, belong to no run, and are kept out of results and gradients alike.
    choices = jnp.where((choices >= 0) & (choices < count), choices, count).ravel()
    order = jnp.argsort(choices, stable=True)
    here = (choices[order] < count)[:, None]
    sizes = jnp.bincount(choices, length=count)
    rows = jnp.where(here, x[order // per_token], 0)
    both = jax.lax.ragged_dot(rows, gate_up.reshape(count, width, 2 * hidden), sizes)
    of_row = jnp.minimum(choices[order], count - 1)
    if biases:
        both = both + biases[0].reshape(count, 2 * hidden)[of_row]
    gate, up = jnp.split(jnp.where(here, both, 0), 2, axis=-1)
    answers = jax.lax.ragged_dot(gated(gate, up), down, sizes)
    if biases:
        answers = answers + biases[1][of_row]
    # The inverse permutation rather than a scatter-add: its order of summation is fixed.
    answers = jnp.where(here, answers, 0)[jnp.argsort(order)].reshape(-1, per_token, width)
    return (answers * weights[..., None]).sum(axis=1)


def _dense(x, choices, weights, experts, gated):
    """Compute every expert for every token, one expert at a time, so that memory does not grow with their number."""
    count = experts[0].shape[0]
    shares = (weights[..., None] * jax.nn.one_hot(choices, count, dtype=weights.dtype)).sum(axis=1)

    def add(total, expert):
        (gate_up, down, *biases), share = expert
        both = jnp.einsum("nd,dcm->ncm", x, gate_up)
        both = both + biases[0] if biases else both
        answer = gated(both[:, 0], both[:, 1]) @ down
        return total + share[:, None] * (answer + biases[1] if biases else answer), None

    return jax.lax.scan(add, jnp.zeros_like(x), (experts, shares.T))[0]


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
