"""A mesh of what there is, and constraints that mean nothing without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.parallel import DATA_AXIS, constrain_replicated, make_mesh, replicate, row_constraint


@pytest.mark.parametrize("devices", [0, -1, 1 + len(jax.devices())])
def test_a_mesh_of_devices_that_are_not_there_is_refused(devices):
    with pytest.raises(ValueError, match=rf"mesh.devices is {devices}, but .*choose 1 to {len(jax.devices())}"):
        make_mesh(devices)


def test_a_mesh_is_one_data_axis_over_all_devices_or_the_first():
    assert make_mesh().shape == {DATA_AXIS: len(jax.devices())}
    assert make_mesh(1).shape == {DATA_AXIS: 1}
    assert make_mesh(1).devices.flat[0] == jax.devices()[0]


def test_without_a_mesh_nothing_is_constrained():
    tree = {"a": jnp.arange(3), "b": (jnp.ones((3, 2)),)}
    assert row_constraint(None)(tree) is tree
    assert constrain_replicated(tree, None) is tree


def test_a_mesh_of_one_changes_no_number():
    mesh, tree = make_mesh(1), {"a": jnp.arange(3), "b": (jnp.ones((3, 2)),)}
    for placed in (
        replicate(tree, mesh),
        jax.jit(row_constraint(mesh))(tree),
        jax.jit(lambda x: constrain_replicated(x, mesh))(tree),
    ):
        jax.tree.map(np.testing.assert_array_equal, placed, tree)
