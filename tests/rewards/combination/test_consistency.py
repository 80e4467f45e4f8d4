"""StableReinforce's reward."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.rewards import consistent_accuracy

# accuracy, format, consistency
COMPONENTS = jnp.array([[1, 1, 1], [1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 0, 1]])


def test_consistency_multiplies_accuracy():
    np.testing.assert_allclose(consistent_accuracy(COMPONENTS), [2.0, 1.5, 0.5, 0.0, 1.5])


def test_columns_may_stand_in_any_order():
    moved = consistent_accuracy(COMPONENTS[:, ::-1], accuracy_column=2, consistency_column=0)
    np.testing.assert_array_equal(moved, consistent_accuracy(COMPONENTS))


def test_a_column_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="consistency_column is 2, but there are 2 reward components"):
        consistent_accuracy(COMPONENTS[:, :2])
