"""Optimisers by name, and parameters of bfloat16 that do not lose small steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.config import TrainingConfig
from jaxrl_llm.models import TransformerConfig, transformer
from jaxrl_llm.models.experts import ExpertsConfig
from jaxrl_llm.run.optimizers import (
    clipping,
    learning_rate,
    long_warmup,
    muon_matrices,
    optimizer,
    skipping_non_finite,
    stochastically_rounded,
    with_master,
    with_stochastic_rounding,
)
from jaxrl_llm.run.paired_updates import climb_then_descend
from jaxrl_llm.run.recipes import RecipeError

MODEL = transformer(TransformerConfig(vocabulary_size=11, width=16, layers=2, heads=2, kv_heads=1, mlp_width=24))
NAMES = ["adamw", "adafactor", "muon", "lion", "sgd"]


def quadratic(params):
    return sum(jnp.sum(jnp.square(leaf.astype(jnp.float32) - 0.3)) for leaf in jax.tree.leaves(params))


def trained(made, params, steps: int):
    state = made.init(params)

    def step(carry, _):
        params, state = carry
        updates, state = made.update(jax.grad(quadratic)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=steps)[0])((params, state))


@pytest.mark.parametrize("name", NAMES)
def test_every_optimiser_goes_downhill_on_the_parameters_of_a_model(name):
    rate = 1e-3 if name == "lion" else 1e-2
    made = optimizer(TrainingConfig(optimizer=name, learning_rate=rate, max_gradient_norm=1e9))
    params = jax.jit(MODEL.init)(jax.random.key(0))
    after, _ = trained(made, params, 60)
    assert quadratic(after) < 0.9 * quadratic(params)


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "sgd"])
def test_first_moments_have_the_dtype_that_was_asked_for(name):
    params = jax.eval_shape(MODEL.init, jax.random.key(0))
    config = TrainingConfig(optimizer=name, moment_dtype="bfloat16")
    if name == "sgd":  # without momentum there is none
        assert not [x for x in jax.tree.leaves(jax.eval_shape(optimizer(config).init, params)) if x.ndim]
        return
    dtypes = {x.dtype for x in jax.tree.leaves(jax.eval_shape(optimizer(config).init, params)) if x.ndim > 1}
    assert jnp.dtype("bfloat16") in dtypes


@pytest.mark.parametrize("name", NAMES)
def test_what_only_takes_part_in_a_choice_is_kept_whatever_the_weight_decay(name):
    params = {"blocks": {"selection_bias": jnp.ones((2, 3)), "down": jnp.ones((2, 3, 4))}}
    made = optimizer(TrainingConfig(optimizer=name, weight_decay=0.5, learning_rate=0.1, warmup_steps=0))
    updates, _ = jax.jit(made.update)(jax.tree.map(jnp.zeros_like, params), made.init(params), params)
    assert not updates["blocks"]["selection_bias"].any()
    assert updates["blocks"]["down"].any()


def test_adafactor_has_no_first_moment_to_choose_a_dtype_for():
    with pytest.raises(ValueError, match=r"training.moment_dtype is 'bfloat16', but adafactor keeps no first moments"):
        TrainingConfig(optimizer="adafactor", moment_dtype="bfloat16")


@pytest.mark.parametrize("experts", [None, ExpertsConfig(4, 2)])
def test_muon_takes_the_matrices_of_the_blocks(experts):
    config = TransformerConfig(vocabulary_size=11, width=16, layers=2, heads=4, kv_heads=2, experts=experts)
    params = jax.eval_shape(transformer(config).init, jax.random.key(0))
    chosen = muon_matrices(params)
    for name, leaf in params["blocks"].items():
        found = chosen["blocks"][name]
        if name not in ("qkv", "attention_out", "gate_up", "down"):
            assert found is None
            continue
        axes = [*found.reduction_axis, *found.output_axis]
        # Axes that stand for many matrices: layers, experts, gate and up.
        many = 1 + (experts is not None and name in ("gate_up", "down")) + (name == "gate_up")
        assert len(set(axes)) == leaf.ndim - many
        assert 0 not in axes
    assert chosen["embedding"] is None


def test_a_master_copy_adds_up_steps_that_bfloat16_would_lose():
    params = {"w": jnp.full((64,), 1.0, jnp.bfloat16)}  # its neighbours are 2^-8 and 2^-7 away
    step = optax.sgd(1e-4)  # the gradient is 1.4: a step of 1.4e-4
    lost, _ = trained(step, params, 100)
    np.testing.assert_array_equal(lost["w"], params["w"])
    kept, state = trained(with_master(step), params, 100)
    exact, _ = trained(step, {"w": jnp.full((64,), 1.0)}, 100)
    np.testing.assert_allclose(state.master["w"], exact["w"], rtol=1e-4)
    np.testing.assert_array_equal(kept["w"], state.master["w"].astype(jnp.bfloat16))


def test_stochastic_rounding_is_right_in_the_mean_and_exact_on_what_bfloat16_has():
    x = jnp.asarray([1.0, 1.0 + 2**-9, 1.0 + 2**-10, -3.3, 1e-30, 0.0, jnp.inf, jnp.nan], jnp.float32)
    draws = jax.vmap(lambda key: stochastically_rounded(x, key))(jax.random.split(jax.random.key(0), 4000))
    draws = np.asarray(draws.astype(jnp.float32), np.float64)
    assert (draws[:, [0, 5]] == [1.0, 0.0]).all()
    assert np.isinf(draws[:, 6]).all()
    assert np.isnan(draws[:, 7]).all()
    np.testing.assert_allclose(draws[:, :5].mean(0), np.asarray(x[:5], np.float64), rtol=2e-4)
    assert len(set(draws[:, 3])) == 2


def test_stochastic_steps_get_there_on_average_and_are_repeatable():
    params = {"w": jnp.full((4096,), 1.0, jnp.bfloat16)}
    made = with_stochastic_rounding(optax.sgd(1e-4), seed=3)
    after, state = trained(made, params, 100)
    exact, _ = trained(optax.sgd(1e-4), {"w": jnp.full((4096,), 1.0)}, 100)
    assert int(state.count) == 100
    assert float(after["w"].astype(jnp.float32).mean()) == pytest.approx(float(exact["w"][0]), abs=2e-4)
    again, _ = trained(made, params, 100)
    np.testing.assert_array_equal(after["w"], again["w"])
    other, _ = trained(with_stochastic_rounding(optax.sgd(1e-4), seed=4), params, 100)
    assert (np.asarray(other["w"]) != np.asarray(after["w"])).any()


@pytest.mark.parametrize("wrapper", [with_master, with_stochastic_rounding])
def test_moments_of_bfloat16_parameters_are_float32(wrapper):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), jax.jit(MODEL.init)(jax.random.key(0)))
    state = wrapper(optax.adamw(1e-3)).init(params)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.inner) if x.ndim)
    after, _ = trained(wrapper(optax.adamw(1e-3)), params, 3)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(after))


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_not_finite_changes_nothing_and_others_are_taken_as_ever(name):
    made = optimizer(TrainingConfig(optimizer=name, learning_rate=1e-2))
    guarded = skipping_non_finite(made)
    params = {"down": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)}
    gradient = jax.tree.map(jnp.cos, params)
    state = made.init(params)
    assert jax.tree.structure(guarded.init(params)) == jax.tree.structure(state)
    expected, found = jax.jit(made.update)(gradient, state, params), jax.jit(guarded.update)(gradient, state, params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    for wrong in (jnp.nan, jnp.inf):
        broken = {"down": gradient["down"].at[1, 2].set(wrong)}
        steps, after = jax.jit(guarded.update)(broken, state, params)
        assert not np.asarray(steps["down"]).any()
        jax.tree.map(np.testing.assert_array_equal, after, state)
        steps, after = jax.jit(guarded.update)(gradient, state, params, value=jnp.float32(wrong))
        assert not np.asarray(steps["down"]).any()
        jax.tree.map(np.testing.assert_array_equal, after, state)


def test_a_warm_up_longer_than_the_run_is_told():
    assert long_warmup(TrainingConfig(steps=10, minibatches_per_epoch=2, warmup_steps=19)) == ""
    said = long_warmup(TrainingConfig(steps=10, minibatches_per_epoch=2, warmup_steps=20, learning_rate=0.1))
    assert said.startswith("training.warmup_steps is 20, but there are 20 updates, so the learning rate never reaches")
    assert long_warmup(TrainingConfig(steps=0)) == ""


def test_null_clips_no_gradient():
    grads = {"w": jnp.full(4, 100.0)}
    for norm, expected in ((None, 100.0), (1.0, 0.5)):
        clip = clipping(norm)
        assert clip.update(grads, clip.init(grads))[0]["w"][0] == pytest.approx(expected)


def test_any_optimiser_of_optax_and_a_schedule_may_be_named_with_hyper_parameters():
    params, gradient = {"w": jnp.ones(3)}, {"w": jnp.full(3, 0.5)}
    named = TrainingConfig(
        steps=10,
        learning_rate=0.1,
        max_gradient_norm=None,
        optimizer={"sgd": {"momentum": 0.9}},
        schedule={"stable_then_decay": {"decay_share": 0.5}},
    )
    made = optimizer(named)
    state, seen = made.init(params), []
    for _ in range(10):
        step, state = made.update(gradient, state, params)
        seen.append(float(step["w"][0]))
    momentum = np.cumsum(0.9 ** np.arange(10)) * 0.5
    factor = 1 - np.clip((np.arange(10) / 10 - 0.5) / 0.5, 0, 1)
    np.testing.assert_allclose(seen, -0.1 * factor * momentum, rtol=1e-5)
    assert float(learning_rate(TrainingConfig(steps=4, learning_rate=1.0, schedule="linear_decay"))(3)) == 0.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer": "adamv"},
            "optimizer names 'adamv', which is not an optimiser of optax; did you mean 'adam",
        ),
        ({"optimizer": {"adamw": {"epz": 1}}}, r"training\.optimizer\.adamw\.epz is not a hyper-parameter of adamw"),
        ({"optimizer": {"sgd": {}}, "weight_decay": 0.1}, "weight_decay is 0.1, but sgd takes none"),
        ({"optimizer": {"adamw": {}}, "moment_dtype": "bfloat16"}, "give mu_dtype there"),
        ({"schedule": "linear"}, "training.schedule names 'linear', which does not exist; did you mean 'linear_decay'"),
        (
            {"schedule": {"adaptive_kl": {"target": 1.0, "sequences_per_step": 4, "horizon": 4}}},
            "not a function of step only",
        ),
    ],
)
def test_optimisers_and_schedules_that_are_none(changes, message):
    with pytest.raises(RecipeError, match=message):
        optimizer(TrainingConfig(steps=4, **changes))


def test_an_update_climbs_and_the_next_one_descends_from_before_it():
    """MetaRM of the card: a linear reward, J of unlabelled answers and the Bradley-Terry loss of pairs."""
    unlabelled = jnp.array([[[1.0, 1], [0, 0.5], [-1, 0]], [[0.2, 0], [0.4, 1], [1, -1]]])
    apart = jnp.array([[1.0, -1], [0, 1]])  # chosen less rejected features

    def spread(w):
        r = unlabelled @ w
        i, j = jnp.triu_indices(3, 1)
        return (2 / 9 * jax.nn.sigmoid(jnp.abs(r[:, i] - r[:, j])).sum(1)).mean()

    def ranking(w):
        return -jax.nn.log_sigmoid(apart @ w).mean()

    made = climb_then_descend(0.05, ascent=0.1, descent="sgd")
    start = w = jnp.array([0.5, -0.25])
    state = made.init(w)
    for gradient, expected in ((spread, [0.513084, -0.254916]), (ranking, [0.507923, -0.243838])):
        updates, state = made.update(jax.grad(gradient)(w), state, w)
        w = optax.apply_updates(w, updates)
        np.testing.assert_allclose(w, expected, atol=1e-6)
    assert (w != start).all()
    with pytest.raises(ValueError, match="ascent is 0; it must be above 0"):
        climb_then_descend(0.1, ascent=0)
