"""Advantages against all samples that were drawn."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import pool_centred


def test_scaled_by_the_deviation_of_the_pool():
    pool = np.array([1.0, 0, 0, 1, 0])
    ours = pool_centred(jnp.array([1.0, 0.0]), jnp.full(2, pool.mean()), jnp.full(2, 5.0), jnp.ones(2), scale=True)
    np.testing.assert_allclose(ours, (np.array([1, 0]) - pool.mean()) / (pool.std(ddof=1) + 1e-6), rtol=1e-5)


def test_pools_of_one_and_of_equal_samples_are_finite():
    label, ones = jnp.array([1.0, 0.0, 1.0, 1.0]), jnp.ones(4)
    mean, count = jnp.array([1.0, 0.0, 1.0, 0.5]), jnp.array([1.0, 1.0, 6.0, 6.0])
    np.testing.assert_allclose(pool_centred(label, mean, count, ones), [1, 0, 0, 0.5])
    scaled = pool_centred(label, mean, count, ones.at[3].set(0.0), scale=True)
    np.testing.assert_allclose(scaled, [1, 0, 0, 0], atol=1e-5)
    with pytest.raises(ValueError, match="eps is -1"):
        pool_centred(label, mean, count, ones, eps=-1)
