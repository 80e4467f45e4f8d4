"""Mixtures of experts in training: recorded experts are replayed, and the balance loss balances."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses
from jaxrl_llm.losses import router_balance
from jaxrl_llm.models import ExpertsConfig, TransformerConfig, transformer
from jaxrl_llm.models.decoder import observed_forward
from jaxrl_llm.models.experts import route
from jaxrl_llm.rollout import completion_positions, generate, plans, prompt_positions
from jaxrl_llm.training import Rollout, Update, make_train_step

EXPERTS, PER_TOKEN, LAYERS = 4, 2, 2
CONFIG = TransformerConfig(
    vocabulary_size=16, width=16, layers=LAYERS, heads=2, kv_heads=1, experts=ExpertsConfig(EXPERTS, PER_TOKEN)
)
MODEL = transformer(CONFIG)
SIZES = {"samples_per_prompt": 2, "max_completion_tokens": 5, "eos_ids": (2,), "pad_id": 0}


@pytest.fixture(scope="module")
def prompts(make_prompts):
    return make_prompts(3)


@pytest.fixture(scope="module")
def params():
    drawn = MODEL.init(jax.random.key(0))
    drawn["blocks"]["router"] = 3.0 * jax.random.normal(jax.random.key(1), drawn["blocks"]["router"].shape)
    return drawn


@pytest.fixture(scope="module")
def rows(params, prompts):
    run = jax.jit(lambda p: generate(MODEL, p, prompts, jax.random.key(3), 0, record_router=True, **SIZES))
    return run(params)


def test_the_recorded_experts_are_those_of_a_whole_forward_pass(rows, params):
    width, steps = rows.prompt_tokens.shape[1], rows.tokens.shape[1]
    positions = jnp.concatenate(
        [prompt_positions(rows.prompt_length, width), completion_positions(rows.prompt_length, rows.length, steps)], 1
    )
    tokens = jnp.concatenate([rows.prompt_tokens, rows.tokens], 1)
    watched = jax.jit(partial(observed_forward, config=CONFIG, names=("router_choices",)))
    _, _, observed = watched(params, tokens, positions)
    whole = np.moveaxis(np.asarray(observed["router_choices"]), 0, 2)
    # The last token is never fed back, so no expert served it.
    fed = np.arange(width + steps) < width + np.asarray(rows.length)[:, None] - 1
    real = fed & (np.asarray(positions) >= 0)
    assert rows.router_choices.shape == (6, width + steps, LAYERS, PER_TOKEN)
    assert real.sum() > 20
    np.testing.assert_array_equal(np.asarray(rows.router_choices)[real], whole[real])


def composed(*, micro=None):
    return make_train_step(
        MODEL,
        optax.sgd(1e-2),
        source=Rollout(**SIZES, replay_router=True, prompts_per_step=3),
        rewards=[lambda tokens: (tokens == 3).sum(1)],
        credit=[("advantages", advantages.group_normalized)],
        losses=[losses.clipped_surrogate, router_balance],
        update=Update(sequences_per_microbatch=micro),
    )


@pytest.fixture(scope="module")
def learned(prompts, params):
    """Rows of a microbatch -> the numbers of one step."""
    found = {}

    def at(micro):
        if micro not in found:
            step = composed(micro=micro)
            found[micro] = jax.device_get(step(step.init(jax.random.key(0), params), prompts)[1])
        return found[micro]

    return at


@pytest.mark.slow
def test_training_learns_through_the_recorded_experts(learned):
    """The first update starts from the sampler: ratio 1 exactly, whatever experts another router would pick."""
    metrics = learned(None)
    assert abs(float(metrics["sampler_gap_max"])) < 1e-5
    assert np.isfinite(float(metrics["loss/router_balance"]))


@pytest.mark.slow
def test_the_balance_loss_does_not_depend_on_the_split(learned):
    norms = [(float(m["loss/router_balance"]), float(m["gradient_norm"])) for m in map(learned, (None, 2))]
    np.testing.assert_allclose(norms, [norms[0]] * 2, rtol=1e-5)


def test_the_balance_loss_balances():
    rng = np.random.default_rng(0)
    x, router = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((8, 12, 6), (6, EXPERTS)))
    ones = jnp.ones(8, jnp.int32)

    def loss(router):
        routing = route(x, router, CONFIG.experts)
        parts = router_balance(
            routing.probabilities[:, :, None], routing.choices[:, :, None], 4 * ones, 8 * ones, jnp.ones((8, 8)), ones
        )
        return parts.numerator / parts.denominator

    router = router.at[:, 0].add(3.0 * x[0, 0])
    slope, before = jax.jit(jax.value_and_grad(loss)), None
    for _ in range(100):
        value, gradient = slope(router)
        before = float(value) if before is None else before
        router = router - 0.5 * gradient
    assert before > 1.15
    assert float(value) < 1.05


def balance(probabilities, choices, prompt_length=2, length=3, weight=(1.0,)):
    rows, places = len(weight), np.asarray(probabilities).shape[0]
    everywhere = lambda x: jnp.broadcast_to(jnp.asarray(x)[None, :, None], (rows, places, 1, np.shape(x)[-1]))  # noqa: E731
    loss = router_balance(
        everywhere(np.asarray(probabilities, np.float32)),
        everywhere(np.asarray(choices)),
        jnp.full(rows, prompt_length),
        jnp.full(rows, length),
        jnp.ones((rows, places - 2)),
        jnp.asarray(weight),
    )
    return float(loss.numerator), float(loss.denominator)


def test_even_use_gives_one_and_certain_collapse_experts_over_k():
    even = [[0.25] * 4] * 6
    assert balance(even, [[0, 1], [2, 3]] * 3, length=2)[0] == pytest.approx(1.0)
    assert balance([[0.5, 0.5, 0.0, 0.0]] * 6, [[0, 1]] * 6)[0] == pytest.approx(4 / 2)


def test_by_hand_and_padding_and_weights():
    probabilities = [[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5], [0.1, 0.9], [0.3, 0.7]]
    choices = [[0], [0], [1], [0], [1], [1]]
    # Two prompt tokens and one of the completion are real: f = (2/3, 1/3), P = (1.7/3, 1.3/3).
    expected = 2 * (2 / 3 * 1.7 / 3 + 1 / 3 * 1.3 / 3)
    assert balance(probabilities, choices, length=1)[0] == pytest.approx(expected)
    spoilt = [*probabilities[:3], *[[7.0, -5.0]] * 3]
    assert balance(spoilt, choices, length=1)[0] == pytest.approx(expected)
    assert balance(probabilities, choices, length=1, weight=(0.0, 0.5)) == pytest.approx((0.5 * expected, 0.5))


def test_what_needs_experts_is_refused_without_them(prompts):
    plain = transformer(TransformerConfig(vocabulary_size=16, width=16, layers=1, heads=2, kv_heads=1))
    parts = dict(
        rewards=[lambda tokens: (tokens == 3).sum(1)],
        credit=[("advantages", advantages.group_normalized)],
    )
    with pytest.raises(ValueError, match=r"loss 'router_balance' names 'router_.*not a mixture of experts"):
        make_train_step(plain, optax.sgd(0.1), source=Rollout(**SIZES), losses=[router_balance], **parts)
    with pytest.raises(ValueError, match=r"rollout.replay_router is true, but the model is not a mixture"):
        make_train_step(
            plain,
            optax.sgd(0.1),
            source=Rollout(**SIZES, replay_router=True),
            losses=[losses.clipped_surrogate],
            **parts,
        )
    with_demonstration = plans.demonstration_in_group(
        plans.plain(samples_per_prompt=2), max_completion_tokens=5, pad_id=0
    )
    with pytest.raises(
        ValueError, match=r"rollout.replay_router needs tokens that were all sampled by the policy \(drawn_by_policy\)"
    ):
        make_train_step(
            MODEL,
            optax.sgd(0.1),
            source=Rollout(**SIZES, replay_router=True, plan=with_demonstration),
            losses=[losses.clipped_surrogate],
            **parts,
        )
