"""Mixtures of experts: both ways to compute them, the balance loss against `transformers`, and replayed choices."""

from __future__ import annotations

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import ExpertsConfig, TransformerConfig, load_balancing_loss, transformer
from jaxrl_llm.models.experts import expert_mlp, route

COUNT, PER_TOKEN = 5, 2


def arrays():
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 7, 6), "router": (6, COUNT), "gate_up": (COUNT, 6, 2, 4), "down": (COUNT, 4, 6)}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def mixed(a, *, ragged, normalise=True, choices=None):
    routing = route(a["x"], a["router"], ExpertsConfig(COUNT, PER_TOKEN, normalise), choices)
    return expert_mlp(
        a["x"], routing, a["gate_up"], a["down"], gated=lambda gate, up: jax.nn.silu(gate) * up, ragged=ragged
    )


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("normalise", [True, False])
def test_each_token_gets_the_weighted_answers_of_its_experts(ragged, normalise):
    a = arrays()
    x, router, gate_up, down = (np.asarray(a[name], np.float64) for name in ("x", "router", "gate_up", "down"))
    ours = mixed(a, ragged=ragged, normalise=normalise)
    for row in range(2):
        for t in range(7):
            scores = np.exp(x[row, t] @ router)
            probabilities = scores / scores.sum()
            chosen = np.argsort(-probabilities)[:PER_TOKEN]
            total = probabilities[chosen].sum() if normalise else 1.0
            expected = 0
            for e in chosen:
                gate, up = x[row, t] @ gate_up[e, :, 0], x[row, t] @ gate_up[e, :, 1]
                expected = expected + probabilities[e] / total * (gate / (1 + np.exp(-gate)) * up) @ down[e]
            np.testing.assert_allclose(ours[row, t], expected, rtol=1e-4, atol=1e-5)


def test_a_long_batch_is_served_in_parts_with_the_same_values_and_gradients(monkeypatch):
    both = jax.value_and_grad(lambda a: jnp.sin(mixed(a, ragged=True)).sum())
    a = arrays()
    # A new function is traced anew.
    loops = lambda: str(jax.make_jaxpr(lambda a: both(a))(a)).count("scan[")  # noqa: E731
    whole, at_once = both(a), loops()
    # Parts that do not divide the tokens.
    monkeypatch.setattr("jaxrl_llm.models.experts.PAIRS_AT_A_TIME", a["x"].size // 2)
    assert loops() > at_once
    chex.assert_trees_all_close(both(a), whole, rtol=1e-5, atol=1e-6)


def test_the_ragged_and_the_dense_product_have_the_same_gradient():
    def gradient(ragged):
        return jax.jit(jax.grad(lambda a: jnp.sin(mixed(a, ragged=ragged)).sum()))(arrays())

    gradients = [gradient(True), gradient(False)]
    for name, leaf in gradients[0].items():
        assert float(jnp.abs(leaf).max()) > 1e-3, name
        np.testing.assert_allclose(leaf, gradients[1][name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_an_expert_that_nobody_chose_changes_nothing():
    a = arrays()
    choices = jnp.zeros((2, 7, PER_TOKEN), jnp.int32).at[..., 1].set(3)
    for ragged in (True, False):
        spoilt = a | {"down": a["down"].at[jnp.array([1, 2, 4])].set(1e9)}
        np.testing.assert_array_equal(
            mixed(a, ragged=ragged, choices=choices), mixed(spoilt, ragged=ragged, choices=choices)
        )


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_choices_and_balance_equal_those_of_transformers(case, make_checkpoint, batch):
    torch = pytest.importorskip("torch")
    checkpoint = make_checkpoint(case)
    with torch.no_grad():
        theirs = checkpoint.theirs(
            torch.tensor(batch.tokens),
            attention_mask=torch.tensor(batch.mask.astype(int)),
            position_ids=torch.tensor(np.maximum(batch.positions, 0)),
            output_router_logits=True,
        )
    names = ("router_choices", "router_probabilities")
    _, _, seen = checkpoint.observe(checkpoint.params, batch.tokens, batch.positions, None, names=names)
    for layer, scores in enumerate(theirs.router_logits):
        expected = scores.softmax(-1).numpy().reshape(*batch.mask.shape, -1)[batch.mask]
        np.testing.assert_allclose(seen["router_probabilities"][layer][batch.mask], expected, atol=2e-5)
        best = np.argsort(-expected, axis=-1)[:, : seen["router_choices"].shape[-1]]
        np.testing.assert_array_equal(seen["router_choices"][layer][batch.mask], best)
    ours = load_balancing_loss(seen["router_probabilities"], seen["router_choices"], jnp.asarray(batch.mask))
    np.testing.assert_allclose(ours, theirs.aux_loss.item(), rtol=1e-5)


def test_balance_is_least_when_the_work_is_shared():
    even = jnp.full((1, 1, COUNT, COUNT), 1 / COUNT)
    shared = jnp.stack([jnp.arange(COUNT), (jnp.arange(COUNT) + 1) % COUNT], axis=-1)[None, None]
    mask = jnp.ones((1, COUNT))
    np.testing.assert_allclose(load_balancing_loss(even, shared, mask), PER_TOKEN, rtol=1e-6)
    skewed = jax.nn.one_hot(jnp.zeros((1, 1, COUNT), jnp.int32), COUNT)
    assert load_balancing_loss(skewed, jnp.zeros_like(shared), mask) > PER_TOKEN
    assert load_balancing_loss(even, shared, 0 * mask) == 0


@pytest.mark.parametrize("layer_loop", ["unrolled", "scanned"])
def test_recorded_choices_replay_the_pass_and_others_change_it(make_checkpoint, batch, layer_loop):
    checkpoint = make_checkpoint("qwen3_moe")
    config = checkpoint.model.config
    model = transformer(TransformerConfig(**(config.__dict__ | {"layer_loop": layer_loop})))
    arguments = (checkpoint.params, batch.tokens, batch.positions, None)
    hidden, _, seen = jax.jit(partial(model.observe, names=("router_choices",)))(*arguments)
    choices, apply = seen["router_choices"], jax.jit(model.apply)
    replayed, _ = apply(*arguments, router_choices=choices)
    np.testing.assert_array_equal(replayed, hidden)
    changed, _ = apply(*arguments, router_choices=(choices + 1) % config.experts.count)
    assert float(jnp.abs(changed - hidden)[batch.mask].max()) > 1e-2


def test_what_a_model_cannot_show_is_refused(make_checkpoint, batch):
    dense = make_checkpoint("llama")
    arguments = (dense.params, batch.tokens, batch.positions, None)
    with pytest.raises(ValueError, match="cannot return router_choices; known: hidden_states"):
        dense.model.observe(*arguments, names=("router_choices",))
    with pytest.raises(ValueError, match="router_choices were given to a model without experts"):
        dense.model.apply(*arguments, router_choices=jnp.zeros((3, 3, 14, 1), jnp.int32))


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(count=2, per_token=3), "per_token is 3 of model.experts.count 2"),
        (dict(count=2, per_token=0), "per_token is 0"),
        (dict(count=2, per_token=1, product="sparse"), "model.experts.product is 'sparse'"),
    ],
)
def test_bad_experts_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        ExpertsConfig(**bad)


def test_experts_that_have_become_impossible_still_have_finite_weights_and_gradients():
    a = arrays()
    choices = jnp.zeros((2, 7, PER_TOKEN), jnp.int32).at[..., 1].set(1)
    away = a["router"].at[:, 2].set(500.0 * jnp.sign(a["x"][0, 0]))
    loss = lambda router: jnp.sum(mixed(a | {"router": router}, ragged=False, choices=choices) ** 2)  # noqa: E731
    out, gradient = jax.jit(jax.value_and_grad(loss))(away)
    assert np.isfinite(float(out))
    assert np.isfinite(np.asarray(gradient)).all()
