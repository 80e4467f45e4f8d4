"""Good extra answers in the place of rows of the batch."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import steered_advantages
from jaxrl_llm.selection import steered_batch

# Extra answers first, then the batch.
ADVANTAGES = jnp.array([0.7, -0.7, 0.04, 1.2, 0.5, -0.5, 1, -1])[:, None]
EXTRA = jnp.arange(8) < 4
LOGPROBS = -jnp.arange(1.0, 9.0)[:, None]
MASK, WEIGHT = jnp.ones((8, 1)), jnp.ones(8)


def kept(entropy, weight=WEIGHT, **hyper):
    method = steered_batch(**hyper)
    memory = method.init() | {"entropy": jnp.float32(entropy)}
    return method.update(memory, ADVANTAGES, EXTRA, LOGPROBS, MASK, weight)


@pytest.mark.parametrize("entropy, rows", [(0.3, [0, 3, 6, 7]), (0.7, [0, 5, 6, 7])])
def test_worked_example(entropy, rows):
    weight, memory = kept(entropy)
    np.testing.assert_array_equal(np.flatnonzero(weight), rows)
    assert memory["entropy"] == np.mean(rows) + 1
    advantages = steered_advantages(ADVANTAGES, EXTRA, MASK, weight)
    np.testing.assert_array_equal(
        advantages[np.array(rows), 0],
        [1] * sum(r < 4 for r in rows) + [float(ADVANTAGES[r, 0]) for r in rows if r >= 4],
    )


def test_the_batch_keeps_its_size():
    for entropy in (0.3, 0.7):
        for cap in (0, 1, 60):
            assert kept(entropy, cap=cap)[0].sum() == 4
    weight, _ = kept(0.3, weight=WEIGHT.at[3].set(0.0))
    np.testing.assert_array_equal(np.flatnonzero(weight), [0, 5, 6, 7])


def test_a_negative_cap_is_named():
    with pytest.raises(ValueError, match=r"cap is -1"):
        steered_batch(cap=-1)
