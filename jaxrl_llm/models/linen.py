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
        expand_cache(cache, samples, extra_slots)  reads no parameters; may be left out

    A module without `init_cache` has `__call__(tokens, positions)`, which returns the hidden states alone, and decodes
    by computing everything again. The protocol is that of `from_functions`, which checks it.

    The model's params are the module's collection "params". Names that `nn.with_partitioning` gives to axes become the
    logical axes of its specs.

    Args:
      module: an instance of `flax.linen.Module`, whose configuration it carries.
      vocabulary_size: V.

    Raises:
      ValueError: for anything but a Linen module, for a module that has no `logits`, keeps variables besides its
        parameters, or does not keep to the protocol.
    """
    # Here, so that importing the models does not import Flax's modules.
    from flax import linen as nn

    if not isinstance(module, nn.Module):
        kind = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
        raise ValueError(
            f"from_linen was given {kind}; give an instance of flax.linen.Module, or hand the functions of any other "
            "model to from_functions"
        )
    if not hasattr(module, "logits"):
        raise ValueError(
            f"{type(module).__name__} has no method logits; give it logits(hidden), which turns hidden states into "
            "float32 scores, so that they are never computed for all positions at once"
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
            f"{type(module).__name__} keeps variables in {', '.join(others)} besides its params; a policy is a pure "
            "function of its parameters, so compute them anew, or make them part of the cache"
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
