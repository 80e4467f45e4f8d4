"""From names to axes of a mesh: the table, its changes, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_llm.models import TransformerConfig, transformer
from jaxrl_llm.parallel import (
    ANY,
    AXES,
    RULES,
    automatic_sizes,
    changed_rules,
    constrain,
    kept_whole,
    layout,
    make_mesh,
    partition_spec,
    shardings,
    state_shardings,
)
from jaxrl_llm.parallel.auto import GIB, Demand
from jaxrl_llm.parallel.rules import decoding, laid_out, map_parts, map_shards, shards

SMALL = TransformerConfig(vocabulary_size=16, width=32, layers=2, heads=4, kv_heads=2, mlp_width=64)


def mesh_of(**sizes: int) -> AbstractMesh:
    """A mesh without devices, for what only reads its shape."""
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


@pytest.mark.parametrize(
    "names, shape, sizes, expected",
    [
        (("rows", "positions", None), (16, 8, 4), {"data": 2, "fsdp": 4}, P(("data", "fsdp"), None, None)),
        (("rows", "positions"), (16, 8), {"fsdp": 4, "sequence": 2}, P(("fsdp",), ("sequence",))),
        # As many axes as divide, in order.
        (("rows",), (6,), {"data": 2, "fsdp": 4}, P(("data",))),
        (("rows",), (3,), {"data": 2, "fsdp": 4}, P(None)),
        (("embed", None, "mlp"), (32, 2, 64), {"fsdp": 4, "tensor": 2}, P(("fsdp",), None, ("tensor",))),
        # An axis is used once: rows of a prefill take what positions would.
        (("sampled_rows", "vocabulary"), (8, 16), {"fsdp": 4, "tensor": 2}, P(("fsdp", "tensor"), None)),
        (("kv_heads", "mlp"), (2, 64), {"tensor": 2}, P(("tensor",), None)),
    ],
)
def test_an_axis_goes_where_its_name_says_as_far_as_it_divides(names, shape, sizes, expected):
    assert partition_spec(names, shape, mesh_of(**sizes)) == expected


def test_rows_that_are_decoded_take_the_devices_of_a_sequence_and_weights_are_whole_along_fsdp():
    mesh, rules = mesh_of(fsdp=2, sequence=2), decoding(RULES)
    assert partition_spec(("rows", "positions"), (8, 8), mesh, rules) == P(("fsdp", "sequence"), None)
    # With too few rows the positions of a prefill are shared.
    assert partition_spec(("rows", "positions"), (2, 8), mesh, rules) == P(("fsdp",), ("sequence",))
    assert partition_spec(("embed",), (32,), mesh, rules) == P(None)
    assert partition_spec(("embed",), (32,), mesh, decoding(RULES, gathered=False)) == P(("fsdp", "sequence"))


def test_a_rule_can_be_changed_and_a_typing_error_is_named():
    rules = changed_rules({"mlp": ["tensor", "fsdp"], "embed": []})
    assert partition_spec(("embed", "mlp"), (32, 64), mesh_of(fsdp=2, tensor=2), rules) == P(None, ("tensor", "fsdp"))
    assert RULES["mlp"] == ("tensor",)
    with pytest.raises(ValueError, match=r"mesh.rules names 'mpl', which is not an axis of an array; did you mean mlp"):
        changed_rules({"mpl": ["tensor"]})
    with pytest.raises(
        ValueError, match=r"mesh.rules.mlp names 'tensors', which is not an axis of the mesh; did you mean t"
    ):
        changed_rules({"mlp": ["tensors"]})


@pytest.mark.parametrize(
    "sizes, message",
    [
        (
            {"fsdp": 2, "tensor": 3},
            "mesh.fsdp 2 x mesh.tensor 3 is 6, but there are 8 devices; set mesh.devices to 6, or choose sizes whose "
            "product is 8",
        ),
        ({"tensor": 4}, "mesh.tensor 4 is 4, but there are 8 devices; set mesh.data to 2, or mesh.devices to 4"),
        ({"fsdp": 2, "slice": 2}, "mesh.fsdp 2 x mesh.slices 2 is 4, .* set mesh.fsdp to 4, or mesh.devices to 4"),
        ({"data": 16}, "mesh.data 16 is 16, but there are 8 devices; choose sizes whose product is 8"),
        ({"data": 0}, "mesh.data is 0; it must be at least 1"),
        ({"model": 8}, "mesh axis 'model' does not exist; the axes are slice, data"),
    ],
)
def test_sizes_that_do_not_multiply_to_the_devices_are_refused_with_a_way_out(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(list(range(8)), sizes)


@pytest.mark.parametrize(
    "change, sizes, message",
    [
        (
            {},
            {"tensor": 4, "fsdp": 2},
            r"mesh.tensor 4 does not divide the 2 kv_heads of .*attention_out.*; choose 1, 2 and give the rest of the "
            r"8 devices to mesh.fsdp, or keep this axis whole with mesh.rules: \{kv_heads: \[\]\}",
        ),
        ({"kv_heads": 4, "mlp_width": 66}, {"tensor": 4}, "mesh.tensor 4 does not divide the 66 mlp of .*choose 1, 2 "),
    ],
)
def test_heads_that_tensor_does_not_divide_are_refused_with_a_way_out(change, sizes, message):
    model = transformer(TransformerConfig(**(vars(SMALL) | change)))
    with pytest.raises(ValueError, match=message):
        shardings(model.specs, mesh_of(**sizes))
    with_rule = changed_rules({"kv_heads": [], "mlp": []})
    assert shardings(model.specs, mesh_of(**sizes), with_rule)["blocks"]["qkv"].spec[2] is None


def test_a_vocabulary_that_does_not_divide_is_kept_whole_and_named():
    specs = transformer(TransformerConfig(**(vars(SMALL) | {"vocabulary_size": 17}))).specs
    mesh = mesh_of(fsdp=4, tensor=2)
    assert shardings(specs, mesh)["embedding"].spec == P(None, ("fsdp",))
    assert kept_whole(specs, mesh) == {"vocabulary": 17}
    assert kept_whole(transformer(SMALL).specs, mesh) == {}


@pytest.mark.parametrize(
    "optimizer", [optax.adamw(1e-3), optax.sgd(1e-3, momentum=0.9), optax.adafactor(1e-3, min_dim_size_to_factor=8)]
)
def test_what_belongs_to_a_parameter_lies_as_the_parameter_does(optimizer):
    model, mesh = transformer(SMALL), mesh_of(fsdp=4, tensor=2)
    params = jax.eval_shape(model.init, jax.random.key(0))
    placed = shardings(model.specs, mesh)
    state = {"params": params, "optimizer": jax.eval_shape(optimizer.init, params), "step": jnp.int32(0)}
    lies = state_shardings(state, params, placed, mesh, on_host=["optimizer"])
    assert jax.tree.map(lambda s: s.spec, lies["params"]) == jax.tree.map(lambda s: s.spec, placed)
    assert lies["step"].spec == P()
    assert {s.memory_kind for s in jax.tree.leaves(lies["optimizer"])} == {"pinned_host"}
    by_path = {
        jax.tree_util.keystr(path): (leaf, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(state["optimizer"]), jax.tree.leaves(lies["optimizer"]), strict=True
        )
    }
    down = [found for path, found in by_path.items() if path.endswith("['down']") and found[0].size > 2]
    assert down
    for leaf, sharding in down:  # [layer, mlp, embed], or without one of the last two
        whole = {
            (2, 64, 32): P(None, ("tensor",), ("fsdp",)),
            (2, 64): P(None, ("tensor",)),
            (2, 32): P(None, ("fsdp",)),
        }
        assert sharding.spec == whole[leaf.shape]


def test_names_mean_nothing_outside_of_a_layout():
    x = jnp.ones((4, 4))
    assert constrain(x, "rows", "positions") is x
    assert shards("rows", "vocabulary") == 1
    double = lambda whole, split: whole * split  # noqa: E731
    np.testing.assert_array_equal(map_shards(double, 2.0, x, "rows"), 2 * x)
    product = lambda first, parts, split: (parts[0].sum() + first) * split  # noqa: E731
    np.testing.assert_array_equal(map_parts(product, [jnp.ones(3)], x, "rows", part_names=[("expert",)]), 3 * x)


def test_inside_they_pin_what_divides_and_leave_the_rest():
    mesh = mesh_of(fsdp=4, tensor=2)

    def spec(shape, *names):
        def program(x):
            with layout(mesh):
                return constrain(x, *names)

        eqns = jax.make_jaxpr(program)(jnp.ones(shape)).eqns
        return [eqn.params["sharding"].spec for eqn in eqns]

    assert spec((8, 6, 4), "rows", None) == [P(("fsdp",), None, ANY)]
    assert spec((3, 6), "rows") == []
    assert spec((3, 6), "rows", "vocabulary") == [P(ANY, ("tensor",))]
    with layout(mesh):
        assert shards("rows", "vocabulary") == 8
    assert isinstance(shardings(transformer(SMALL).specs, mesh)["final_norm"], NamedSharding)


@pytest.mark.parametrize(
    "mesh, message",
    [
        (AbstractMesh((2, 2), ("fdsp", "tensor"), axis_types=(AxisType.Auto,) * 2), "'fdsp', .* did you mean fsdp"),
        (AbstractMesh((2,), ("fsdp",), axis_types=(AxisType.Explicit,)), r"Explicit.* must be Auto: use parallel\."),
    ],
)
def test_a_mesh_on_which_nothing_would_be_shared_is_refused(mesh, message):
    with pytest.raises(ValueError, match=message), layout(mesh):
        pass
    with pytest.raises(ValueError, match=message):
        laid_out(abs, mesh)


@pytest.mark.parametrize(
    "devices, demand, sizes, reason",
    [
        (8, Demand(GIB, GIB // 4, 2, 1, 64), {"data": 8}, "fits in every device of 16 GiB"),
        (8, Demand(GIB, GIB // 4, 2, 1, 4), {"data": 4, "sequence": 2}, "fits in every device"),
        (64, Demand(160 * GIB, 16 * GIB, 8, 1, 512), {"fsdp": 16, "tensor": 4}, "a 4th on each device"),
        (8, Demand(8 * GIB, GIB, 8, 1, 64), {"fsdp": 8}, "does not fit in one device of 16 GiB"),
        (64, Demand(600 * GIB, 60 * GIB, 4, 128, 512), {"fsdp": 1, "expert": 16, "tensor": 4}, "128 experts over 16"),
        (16, Demand(160 * GIB, 4 * GIB, 8, 1, 4), {"fsdp": 4, "sequence": 4}, "4 rows leave 4 devices to each row"),
    ],
)
def test_a_mesh_is_chosen_from_devices_and_model_and_says_why(devices, demand, sizes, reason):
    chosen, why = automatic_sizes([object()] * devices, demand)
    assert {axis: chosen.get(axis, 1) for axis in sizes} == sizes
    assert np.prod(list(chosen.values())) == devices
    assert reason in why
