"""A mesh of what there is, and constraints that mean nothing without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.parallel import AXES, make_mesh, replicate, row_constraint


@pytest.mark.parametrize("devices", [0, -1, 1 + len(jax.devices())])
def test_a_mesh_of_devices_that_are_not_there_is_refused(devices):
    with pytest.raises(ValueError, match=rf"mesh.devices is {devices}, but .*choose 1 to {len(jax.devices())}"):
        make_mesh(devices)


def test_a_mesh_has_all_devices_on_data_or_the_first():
    assert make_mesh().shape == dict.fromkeys(AXES, 1) | {"data": len(jax.devices())}
    assert make_mesh(1).shape == dict.fromkeys(AXES, 1)
    assert make_mesh(1).devices.flat[0] == jax.devices()[0]


def test_without_a_mesh_nothing_is_constrained():
    tree = {"a": jnp.arange(3), "b": (jnp.ones((3, 2)),)}
    assert row_constraint(None)(tree) is tree


def test_a_mesh_of_one_changes_no_number():
    mesh, tree = make_mesh(1), {"a": jnp.arange(3), "b": (jnp.ones((3, 2)),)}
    for placed in (
        replicate(tree, mesh),
        jax.jit(row_constraint(mesh))(tree),
    ):
        jax.tree.map(np.testing.assert_array_equal, placed, tree)
