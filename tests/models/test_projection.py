"""A matrix with its output axes first gives what it gives as it is stored."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import TransformerConfig, transformer
from jaxrl_llm.models.projection import Turned, project, turned


@pytest.mark.parametrize("shape, inputs", [((6, 5), 1), ((6, 2, 5), 1), ((2, 3, 5), 2), ((2, 1, 3, 5), 3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_turned_matrix_gives_the_same_product(shape, inputs, dtype):
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    x = jnp.asarray(rng.standard_normal((4, 3, *shape[:inputs])), dtype)
    other = turned(weights, inputs=inputs)
    assert other.values.shape == (*shape[inputs:], *shape[:inputs])
    product = project(x, other, inputs=inputs)
    assert product.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
    np.testing.assert_allclose(
        product.astype(jnp.float32),
        project(x, weights, inputs=inputs).astype(jnp.float32),
        rtol=tolerance,
        atol=tolerance,
    )


def test_parameters_laid_out_for_decoding_are_the_same_policy():
    sizes = dict(vocabulary_size=13, width=256, layers=2, heads=4, kv_heads=2, mlp_width=2048, qkv_bias=True)
    model = transformer(TransformerConfig(**sizes, layer_loop="unrolled"))
    params = jax.jit(model.init)(jax.random.key(0))
    assert model.for_decoding is not None
    laid_out = model.for_decoding(params)
    for block in laid_out["blocks"]:
        # Small matrices stay as they are.
        assert isinstance(block["gate_up"], Turned)
        assert isinstance(block["qkv"], jax.Array)
    tokens = jnp.arange(6).reshape(2, 3)
    positions = jnp.tile(jnp.arange(3), (2, 1))
    apply = jax.jit(lambda p: model.apply(p, tokens, positions, None)[0])
    ours, theirs = apply(laid_out), apply(params)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
