"""What is kept in the host's memory, and what the backward pass computes again: other places, the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.advantages import group_normalized
from jaxrl_llm.losses import clipped_surrogate, kl_estimate
from jaxrl_llm.models import TransformerConfig, transformer
from jaxrl_llm.parallel import make_mesh
from jaxrl_llm.run import checkpoints, stored_states
from jaxrl_llm.training import Network, Placement, Resources, Rollout, make_train_step

# Programs of many sizes: minutes of compilation.
pytestmark = pytest.mark.slow

SIZES = dict(vocabulary_size=16, width=16, layers=2, heads=2, kv_heads=1)


def even_share(tokens, mask):
    return ((tokens % 2 == 0) * mask).sum(-1) / mask.sum(-1)


def composed(model, losses=(clipped_surrogate, (kl_estimate, 0.05)), mesh=None, offload=()):
    return make_train_step(
        model,
        optax.adam(1e-2),
        source=Rollout(samples_per_prompt=2, max_completion_tokens=6, eos_ids=(1,), pad_id=1),
        rewards=[even_share],
        credit=[("advantages", group_normalized)],
        losses=losses,
        resources=Resources(
            networks={"reference": Network(copy_every=2)}, placement=Placement(mesh, offload=frozenset(offload))
        ),
    )


def after(step, prompts, steps: int):
    state = step.init(jax.random.key(0))
    for _ in range(steps):
        state, _ = step(state, prompts)
    return state


def test_offloaded_parts_wait_in_the_hosts_memory_and_change_no_number(make_prompts, model, tmp_path):
    prompts, mesh = make_prompts(4), make_mesh(1)
    plain = composed(model, mesh=mesh)
    offloaded = composed(model, mesh=mesh, offload=("optimizer", "reference"))
    wanted, state = after(plain, prompts, 3), after(offloaded, prompts, 3)
    jax.tree.map(
        np.testing.assert_array_equal,
        *(jax.device_get(s.networks) for s in (wanted, state)),
    )
    kept = lambda s: (s.networks["policy"].optimizer_state, s.networks["reference"].params)  # noqa: E731
    kinds = lambda tree: {x.sharding.memory_kind for x in jax.tree.leaves(tree)}  # noqa: E731
    assert kinds(kept(state)) == {"pinned_host"}
    assert kinds((state.params, state.step)) == {"device"}
    assert kinds(wanted) == {"device"}
    there = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, offloaded.composition.placed)
    assert jax.tree.all(there)

    # A checkpoint goes back to where it came from.
    with checkpoints.checkpoint_manager(tmp_path, keep=1) as manager:
        checkpoints.save(manager, 3, state, {})
        manager.wait_until_finished()
    restored = stored_states.restore(tmp_path, 3, offloaded.init(jax.random.key(0)))
    assert kinds(kept(restored)) == {"pinned_host"}
    ours, theirs = offloaded(restored, prompts)[0], offloaded(state, prompts)[0]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ours.params), jax.device_get(theirs.params))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(offload=("optimiser",)), "training.offload names 'optimiser'; it can name optimizer, reference"),
        (dict(offload=("optimizer",), mesh=None), "without a mesh; pass mesh=make_mesh"),
        (dict(offload=("reference",), losses=[clipped_surrogate]), "keeps no copy of a reference policy; leave it out"),
    ],
)
def test_what_cannot_be_offloaded_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        composed(model, **({"mesh": make_mesh(1)} | options))


def gradient_program(remat: str, loop: str = "scanned"):
    model = transformer(TransformerConfig(**SIZES | {"layers": 4}, remat=remat, layer_loop=loop))
    tokens = jnp.tile(jnp.arange(256) % 16, (4, 1))
    positions = jnp.broadcast_to(jnp.arange(256), tokens.shape)

    def value(params):
        return jnp.sum(jnp.square(model.apply(params, tokens, positions, None)[0]))

    return jax.jit(jax.grad(value)).lower(jax.eval_shape(model.init, jax.random.key(0))).compile()


PARAMS = jax.jit(transformer(TransformerConfig(**SIZES | {"layers": 4})).init)


@pytest.mark.parametrize("remat", ["full", "dots", "attention", "offload_dots"])
def test_less_is_kept_for_the_backward_pass_and_gradients_are_the_same(remat):
    kept, again = gradient_program("none"), gradient_program(remat)
    params = PARAMS(jax.random.key(0))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max())),
        again(params),
        kept(params),
    )
    assert again.memory_analysis().temp_size_in_bytes < 0.8 * kept.memory_analysis().temp_size_in_bytes


def test_unrolled_blocks_are_rematerialised_too():
    params = PARAMS(jax.random.key(0))
    kept, again = (gradient_program(remat, "unrolled") for remat in ("none", "full"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), again(params), kept(params))
