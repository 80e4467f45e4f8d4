"""Parameters from their description: shapes, axes, counts, and draws that do not depend on each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import (
    ParameterSpec,
    TransformerConfig,
    abstract,
    initialise,
    logical_axes,
    parameter_count,
    transformer,
)

CONFIGS = {
    "tied": TransformerConfig(vocabulary_size=11, width=16, layers=2, heads=4, kv_heads=2),
    "untied": TransformerConfig(
        vocabulary_size=11, width=16, layers=1, heads=2, kv_heads=1, head_width=6, tie_embeddings=False, qk_norm=False
    ),
}
SPECS = {"table": ParameterSpec((64, 32), ("vocabulary", "embed"), 0.5), "gain": ParameterSpec((32,), (None,), 0.0)}


def flat(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_description_matches_what_is_drawn(name):
    model = transformer(CONFIGS[name])
    params = jax.eval_shape(model.init, jax.random.key(0))
    described = abstract(model.specs)
    assert jax.tree.structure(params) == jax.tree.structure(described)
    for leaf, spec in zip(jax.tree.leaves(params), jax.tree.leaves(described), strict=True):
        assert (leaf.shape, leaf.dtype) == (spec.shape, spec.dtype)
    assert parameter_count(model.specs) == sum(leaf.size for leaf in jax.tree.leaves(params))
    axes = jax.tree.leaves(logical_axes(model.specs), is_leaf=lambda x: isinstance(x, tuple))
    assert [len(a) for a in axes] == [leaf.ndim for leaf in jax.tree.leaves(params)]


def test_the_count_of_a_known_model():
    # Norms, then qkv 16*2*(2+2)*4, output 4*4*16, gate and up 16*2*48, down 48*16, norms of queries and keys.
    block = 32 + 512 + 256 + 1536 + 768 + 8
    assert parameter_count(transformer(CONFIGS["tied"]).specs) == 176 + 2 * block + 16


def test_adding_a_leaf_changes_no_other_leaf():
    more = SPECS | {"another": ParameterSpec((64, 32), (None, None), 0.5), "a": {"table": SPECS["table"]}}
    few, many = initialise(SPECS, jax.random.key(3)), initialise(more, jax.random.key(3))
    np.testing.assert_array_equal(few["table"], many["table"])
    assert not np.array_equal(many["table"], many["another"])
    assert not np.array_equal(many["table"], many["a"]["table"])
    assert not np.array_equal(few["table"], initialise(SPECS, jax.random.key(4))["table"])


def test_switches_add_leaves_and_leave_the_rest_alone():
    sizes = dict(vocabulary_size=11, width=16, layers=1, heads=2, kv_heads=1)
    plain = flat(abstract(transformer(TransformerConfig(**sizes, qk_norm=False)).specs))
    extended = flat(abstract(transformer(TransformerConfig(**sizes, qk_norm=True, tie_embeddings=False)).specs))
    assert extended.keys() - plain.keys() == {
        "['unembedding']",
        "['blocks']['query_norm']",
        "['blocks']['key_norm']",
    }
    assert all(extended[path] == leaf for path, leaf in plain.items())


def test_scale_is_the_spread_and_zero_gives_ones():
    params = initialise(SPECS, jax.random.key(0))
    np.testing.assert_array_equal(params["gain"], jnp.ones(32))
    np.testing.assert_allclose(params["table"].std(), 0.5, rtol=0.05)
    np.testing.assert_allclose(params["table"].mean(), 0.0, atol=0.05)
    assert float(jnp.abs(params["table"]).max()) <= 1.5
