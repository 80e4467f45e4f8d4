"""A checkpoint gives back what was written, or says why it does not fit."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.experience import NetworkState, TrainState
from jaxrl_llm.run import checkpoints, stored_states
from jaxrl_llm.run.checkpoints import CheckpointError

META = {"stage": "reinforcement", "seconds": {"set-up": 1.5}, "before": {"greedy": 0.25}}


def make_state(width: int = 3) -> TrainState:
    params = {"blocks": {"w": jnp.arange(2.0 * width).reshape(2, width)}, "norm": jnp.ones(width, jnp.bfloat16)}
    state = TrainState(
        networks={
            "policy": NetworkState(params, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)).init(params)),
            "reference": NetworkState(jax.tree.map(lambda x: x + 1, params)),
        },
        memory={"advantages:running_mean_baseline": {"sum": jnp.float32(0.5), "counts": jnp.arange(3)}},
        key=jax.random.key(7),
        step=jnp.int32(12),
    )
    return state


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(checkpoints directory with the steps 4, 8 and 12 of which two are kept, the state of step 12)."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with checkpoints.checkpoint_manager(directory, keep=2) as manager:
        for step in (4, 8, 12):
            checkpoints.save(manager, step, replace(make_state(), step=jnp.int32(step)), META | {"at": step})
    return directory, make_state()


def with_policy(state, **changes):
    policy = replace(state.networks["policy"], **changes)
    return replace(state, networks={**state.networks, "policy": policy})


def bits(tree):
    key = lambda leaf: jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf  # noqa: E731
    return jax.tree.map(lambda leaf: np.asarray(key(leaf)), tree)


def test_a_state_comes_back_as_it_was(stored):
    directory, state = stored
    found = stored_states.restore(directory, 12, jax.tree.map(jnp.zeros_like, replace(state, key=jax.random.key(0))))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [leaf.dtype for leaf in jax.tree.leaves(state)]
    jax.tree.map(np.testing.assert_array_equal, bits(found), bits(state))
    assert jax.random.bits(found.key) == jax.random.bits(state.key)


def test_shapes_are_enough_to_restore(stored):
    directory, state = stored
    found = stored_states.restore(directory, 8, jax.eval_shape(lambda: make_state()))
    assert found.step == 8
    jax.tree.map(np.testing.assert_array_equal, found.params, state.params)


def test_the_newest_are_kept_and_the_meta_is_read_alone(stored):
    directory, _ = stored
    assert checkpoints.latest_step(directory) == 12
    assert sorted(path.name for path in directory.iterdir()) == ["12", "8"]
    assert checkpoints.read_meta(directory, 12) == META | {"at": 12}


def test_the_policy_is_read_alone_whatever_else_there_is(stored):
    directory, state = stored
    found = stored_states.restore_params(directory, 12, jax.eval_shape(lambda: make_state()).params)
    assert jax.tree.structure(found) == jax.tree.structure(state.params)
    jax.tree.map(np.testing.assert_array_equal, found, state.params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: with_policy(s, params=make_state(4).params),
            r"'networks/policy/params/blocks/w' as float32\[2, 3\], .* float32\[2, 4\]",
        ),
        (
            lambda s: with_policy(s, params=s.params | {"norm": jnp.ones(3)}),
            r"'networks/policy/params/norm' as bfloat16\[3\], .* float32",
        ),
        (lambda s: replace(s, step=jnp.float32(0)), r"'step' as int32\[\], but this config makes it float32\[\]"),
        (
            lambda s: with_policy(s, params=s.params | {"bias": jnp.ones(3)}),
            "lacks 'networks/policy/params/bias'; it belongs to a run with",
        ),
        (
            lambda s: replace(s, networks={"policy": s.networks["policy"]}),
            "has a surplus 'networks/reference/params/blocks/w'",
        ),
        (lambda s: replace(s, memory={}), "has a surplus 'memory/advantages:running_mean_baseline/"),
        (
            lambda s: with_policy(s, optimizer_state=optax.sgd(0.1).init(s.params)),
            "has a surplus 'networks/policy/optimizer_state/",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused(stored, change, message):
    directory, state = stored
    with pytest.raises(CheckpointError, match=message):
        stored_states.restore(directory, 12, change(state))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (make_state(4).params, r"'networks/policy/params/blocks/w' as float32\[2, 3\]"),
        ({"norm": jnp.ones(3, jnp.bfloat16)}, "has a surplus 'networks/policy/params/blocks/w'"),
        (make_state().params | {"norm": jnp.ones(3)}, "'networks/policy/params/norm' as bfloat16"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(stored, params, message):
    directory, _ = stored
    with pytest.raises(CheckpointError, match=message):
        stored_states.restore_params(directory, 12, params)


@pytest.mark.parametrize("read", [stored_states.restore, stored_states.restore_params])
def test_a_step_that_is_not_there_is_refused(stored, read):
    directory, state = stored
    with pytest.raises(CheckpointError, match="holds no checkpoint of step 4; there are 8, 12"):
        read(directory, 4, state)


def test_a_step_is_never_written_twice(stored, tmp_path):
    with checkpoints.checkpoint_manager(tmp_path, keep=2) as manager:
        checkpoints.save(manager, 3, make_state(), META)
        with pytest.raises(CheckpointError, match=r"checkpoint 3 in .* exists already, .* use another run_dir"):
            checkpoints.save(manager, 3, make_state(), META)
    with (
        checkpoints.checkpoint_manager(tmp_path, keep=2) as manager,
        pytest.raises(CheckpointError, match="exists already"),
    ):
        checkpoints.save(manager, 3, make_state(), META)


def test_what_happens_after_saving_is_not_in_the_checkpoint(tmp_path):
    # It is written in the background, while the run goes on to count.
    meta = {"tokens": 0, "seconds": {"learning": 1.0}}
    with checkpoints.checkpoint_manager(tmp_path, keep=20) as manager:
        for step in range(1, 9):
            meta["tokens"] = step
            checkpoints.save(manager, step, {"step": jnp.int32(step)}, meta)
            meta["tokens"] = -1
            meta["seconds"]["learning"] += 1.0
    assert [checkpoints.read_meta(tmp_path, step)["tokens"] for step in range(1, 9)] == list(range(1, 9))
    assert checkpoints.read_meta(tmp_path, 3)["seconds"]["learning"] == 3.0


def test_a_write_that_was_cut_short_is_no_checkpoint(tmp_path):
    assert checkpoints.latest_step(tmp_path / "nowhere") is None
    assert checkpoints.latest_step(tmp_path) is None
    (tmp_path / "7.orbax-checkpoint-tmp-1").mkdir()
    (tmp_path / "notes.txt").touch()
    assert checkpoints.latest_step(tmp_path) is None


def test_a_hash_covers_values_and_not_their_order():
    assert checkpoints.config_hash({"a": 1, "b": [2]}) == checkpoints.config_hash({"b": [2], "a": 1})
    assert checkpoints.config_hash({"a": 1}) != checkpoints.config_hash({"a": 1.5})
    assert len(checkpoints.config_hash({})) == 16
