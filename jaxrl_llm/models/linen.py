"""A Flax Linen module as a policy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxrl_llm.models.functions import from_functions
from jaxrl_llm.models.model import Model


def from_linen(module: Any, *, vocabulary_size: int) -> Model:
    """The `Model` of a Flax Linen module with these methods:

        __call__(tokens, positions, cache)         (hidden, the filled cache)
        logits(hidden)                             float32 scores of the next symbol
        init_cache(rows, slots)                    an empty cache; reads no parameters
        expand_cache(cache, samples, extra_slots)  reads no parameters; optional

    A module without `init_cache` has `__call__(tokens, positions)`, which returns only the hidden states; decoding
    then recomputes all positions for each token. `from_functions` describes and checks this protocol.

    The model's params are the module's collection "params". Axis names of `nn.with_partitioning` become the logical
    axes of its specs.

    Args:
      module: an instance of `flax.linen.Module`.
      vocabulary_size: V.

    Raises:
      ValueError: if the module is not a Linen module, has no `logits`, has variables other than its parameters, or
        does not follow the protocol.
    """
    # Imported here because importing Flax's modules takes long.
    from flax import linen as nn

    if not isinstance(module, nn.Module):
        kind = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
        raise ValueError(
            f"from_linen got {kind}; give an instance of flax.linen.Module, or use from_functions for the functions of "
            "another model"
        )
    if not hasattr(module, "logits"):
        raise ValueError(
            f"{type(module).__name__} has no method logits; add logits(hidden), which maps hidden states to float32 "
            "logits, so that they are computed for a few positions at a time"
        )
    methods: Any = module
    cached = hasattr(methods, "init_cache")

    def everything(bound: Any, tokens: Array, positions: Array) -> Array:
        hidden = bound(tokens, positions, None)[0] if cached else bound(tokens, positions)
        return bound.logits(hidden)

    def variables(key: Array) -> PyTree:
        token = jnp.zeros((1, 1), jnp.int32)
        return module.init(key, token, token, method=everything)

    declared = jax.eval_shape(variables, jax.random.key(0))
    if others := sorted(set(declared) - {"params"}):
        raise ValueError(
            f"{type(module).__name__} has variables in {', '.join(others)} besides its params; a policy is a pure "
            "function of its parameters, so compute these values in each call, or store them in the cache"
        )
    boxed = lambda leaf: isinstance(leaf, nn.Partitioned)  # noqa: E731
    axes = jax.tree.map(
        lambda leaf: tuple(leaf.names) if boxed(leaf) else (None,) * leaf.ndim, declared["params"], is_leaf=boxed
    )
    return from_functions(
        init=lambda key: nn.meta.unbox(variables(key)["params"]),
        apply=lambda params, *arguments: methods.apply({"params": params}, *arguments),
        logits=lambda params, hidden: methods.apply({"params": params}, hidden, method="logits"),
        vocabulary_size=vocabulary_size,
        init_cache=methods.init_cache if cached else None,
        expand_cache=getattr(methods, "expand_cache", None),
        axes=axes,
        config=module,
    )
