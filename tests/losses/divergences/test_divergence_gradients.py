"""A divergence knows its gradient: every form against exact enumeration.

A tabular autoregressive policy over 5 symbols and sequences of 3 tokens has 31 states and 125 sequences. Each row of a
batch is one sequence and the mask carries the probability that it is drawn, so one call of a loss gives the exact
expectation of its estimate and of its gradient. The targets are written from textbook formulas in u, not normalised.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import divergence, divergence_reward, js_definition, kl_estimate
from jaxrl_llm.signatures import signature

V, T = 5, 3
SEQUENCES = np.array(list(itertools.product(range(V), repeat=T)))
PREFIX = np.stack(  # number of the state in which each token of each sequence is drawn
    [np.zeros(len(SEQUENCES), int), 1 + SEQUENCES[:, 0], 1 + V + V * SEQUENCES[:, 0] + SEQUENCES[:, 1]], axis=1
)
STATES = 1 + V + V * V

_DRAWS = np.random.default_rng(7).normal(size=(3, STATES, V)).astype(np.float32)
POLICY, REFERENCE = 0.45 * _DRAWS[:2]
OLD = POLICY + 0.3 * _DRAWS[2]

TEXTBOOK = {
    "reverse_kl": ({}, lambda u: u * jnp.log(u)),
    "forward_kl": ({}, lambda u: -jnp.log(u)),
    "jensen_shannon": ({}, lambda u: 0.5 * (u * jnp.log(u) - (1 + u) * jnp.log((1 + u) / 2))),
    "jensen_shannon(0.2)": (
        {"mixture": 0.2},
        lambda u: 0.2 * u * jnp.log(u / (0.2 * u + 0.8)) - 0.8 * jnp.log(0.2 * u + 0.8),
    ),
    "alpha": ({}, lambda u: 4 * (1 - jnp.sqrt(u))),
    "alpha(0.2)": ({"alpha": 0.2}, lambda u: (1 - u**0.2) / 0.16),
    "alpha(1.5)": ({"alpha": 1.5}, lambda u: (u**1.5 - 1) / 0.75),
    "alpha(2)": ({"alpha": 2.0}, lambda u: (u**2 - 1) / 2),
    "alpha(-1)": ({"alpha": -1.0}, lambda u: (1 / u - 1) / 2),
    "chi_square": ({}, lambda u: u**2 - 1),
    "neyman_chi_square": ({}, lambda u: 1 / u - 1),
    "squared_hellinger": ({}, lambda u: 1 - jnp.sqrt(u)),
    "total_variation": ({}, lambda u: 0.5 * jnp.abs(u - 1)),
    "jeffreys": ({}, lambda u: (u - 1) * jnp.log(u)),
}
DIRECTIONS = ("policy_to_reference", "reference_to_policy")
every_member = pytest.mark.parametrize("name", TEXTBOOK)
every_direction = pytest.mark.parametrize("direction", DIRECTIONS)
# A direction is another generator, for which other tests have every form.
one_direction_first = pytest.mark.parametrize(
    "direction", [DIRECTIONS[0], pytest.param(DIRECTIONS[1], marks=pytest.mark.slow)]
)


def configured(name, **more):
    return divergence(generator=name.split("(")[0], **TEXTBOOK[name][0], aggregation="token_sum_const", **more)


@jax.jit
def token_logprobs(logits):
    return jax.nn.log_softmax(logits)[PREFIX, SEQUENCES]


def sequence_probability(logits):
    return jnp.exp(token_logprobs(logits).sum(-1))


def state_probability(logits):
    """Probability that a sequence visits each state, held fixed."""
    visits = np.zeros(STATES, np.float32)
    np.add.at(visits, PREFIX, np.asarray(sequence_probability(logits))[:, None])
    return visits


def between(f, direction, p, q):
    """Sum over the last axis of the divergence between probabilities p (policy) and q (reference)."""
    first, second = (p, q) if direction == "policy_to_reference" else (q, p)
    return jnp.sum(second * f(first / second), axis=-1)


def token_level(f, direction, sampler):
    """theta -> sum over states of their probability under the sampler, held fixed, times the divergence there."""
    visited = state_probability(sampler)

    def total(theta):
        return jnp.sum(visited * between(f, direction, jax.nn.softmax(theta), jax.nn.softmax(REFERENCE)))

    return total


def sequence_level(f, direction):
    return lambda theta: between(f, direction, sequence_probability(theta), sequence_probability(REFERENCE))


def expected(loss, sampler):
    """theta -> expectation of a sampled loss under the sampler's sequences."""
    mask = jnp.repeat(sequence_probability(sampler)[:, None], T, 1)
    ref, old = token_logprobs(REFERENCE), token_logprobs(OLD)

    def total(theta):
        data = (token_logprobs(theta), ref, mask)
        data += (old,) if "old_logprobs" in signature(loss).required else ()
        # token_sum_const divides by T; every row is counted with its probability
        return T * loss(*data).value

    return total


def assert_same(got, want, tolerance=2e-4):
    """Value and gradient agree, on the scale of the gradient."""
    (value, gradient), (true_value, true_gradient) = (jax.value_and_grad(x)(POLICY) for x in (got, want))
    np.testing.assert_allclose(value, true_value, rtol=tolerance, atol=2e-6)
    scale = float(jnp.abs(true_gradient).max())
    np.testing.assert_allclose(gradient, true_gradient, rtol=0, atol=tolerance * scale + 1e-6)


def gradients_differ(got, want):
    gradient, other = jax.grad(got)(POLICY), jax.grad(want)(POLICY)
    return float(jnp.linalg.norm(gradient - other) / jnp.linalg.norm(other)) > 0.05


def test_the_enumeration_is_complete():
    np.testing.assert_allclose(sequence_probability(POLICY).sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(state_probability(POLICY).sum(), T, rtol=1e-6)
    ratio = (token_logprobs(POLICY) - token_logprobs(REFERENCE)).sum(-1)
    assert 2 < float(jnp.abs(ratio).max()) < 4.5  # far from 0, and inside every limit on the log-ratio


# Token level


@every_member
@every_direction
def test_score_function_on_policy_samples(name, direction):
    loss = configured(name, direction=direction)
    assert_same(expected(loss, POLICY), token_level(TEXTBOOK[name][1], direction, POLICY))


@every_member
@one_direction_first
def test_importance_correction_on_samples_of_an_older_policy(name, direction):
    loss = configured(name, direction=direction, gradient="importance_corrected")
    truth = token_level(TEXTBOOK[name][1], direction, OLD)
    assert_same(expected(loss, OLD), truth)
    uncorrected = configured(name, direction=direction)
    assert gradients_differ(expected(uncorrected, OLD), truth)


@every_member
def test_importance_correction_on_fresh_samples_is_the_score_function(name):
    lp, ref = token_logprobs(POLICY), token_logprobs(REFERENCE)
    mask = jnp.ones_like(lp)
    corrected, plain = configured(name, gradient="importance_corrected"), configured(name)
    got = jax.value_and_grad(lambda x: corrected(x, ref, mask, lp).value)(lp)
    want = jax.value_and_grad(lambda x: plain(x, ref, mask).value)(lp)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)


@every_member
def test_importance_correction_equals_differentiating_ratio_times_value(name):
    lp, ref, old = (token_logprobs(x) for x in (POLICY, REFERENCE, OLD))
    mask = jnp.ones_like(lp)
    corrected = configured(name, gradient="importance_corrected")
    f = TEXTBOOK[name][1]

    def through_both_factors(x):
        return jnp.sum(jnp.exp(x - old) * f(jnp.exp(x - ref)) / jnp.exp(x - ref)) / T

    # The textbook form is not normalised: it differs by tilt * (u - 1) in f, which is (1 - 1 / u) on each sample.
    tilt = 0.0 if name == "total_variation" else jax.grad(f)(jnp.float32(1))

    def normalised(x):
        return through_both_factors(x) - tilt * jnp.sum(jnp.exp(x - old) - jnp.exp(ref - old)) / T

    got = jax.value_and_grad(lambda x: corrected(x, ref, mask, old).value)(lp)
    want = jax.value_and_grad(normalised)(lp)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-3, atol=1e-5)


@every_member
@every_direction
def test_pathwise_on_reference_samples(name, direction):
    loss = configured(name, direction=direction, samples="reference")
    assert_same(expected(loss, REFERENCE), token_level(TEXTBOOK[name][1], direction, REFERENCE))


@every_member
@one_direction_first
def test_pathwise_on_policy_samples_is_the_gradient_of_another_divergence(name, direction):
    """Unbiased value, biased gradient: that of the generator g with g' = f' - f / u, f normalised."""
    f = TEXTBOOK[name][1]

    def oriented(u):
        return f(u) if direction == "policy_to_reference" else u * f(1 / u)

    tilt = jax.grad(oriented)(jnp.float32(1)) if name != "total_variation" else 0.0

    def normalised(u):
        return oriented(u) - tilt * (u - 1)

    got, truth = (
        expected(configured(name, direction=direction, gradient="pathwise"), POLICY),
        token_level(f, direction, POLICY),
    )
    np.testing.assert_allclose(got(POLICY), truth(POLICY), rtol=2e-4, atol=2e-6)
    assert gradients_differ(got, truth)

    u = jax.nn.softmax(POLICY) / jax.nn.softmax(REFERENCE)
    weight = jax.vmap(jax.vmap(jax.grad(normalised)))(u) - normalised(u) / u
    joint = state_probability(POLICY)[:, None] * jax.nn.softmax(POLICY)
    other = jax.grad(lambda theta: jnp.sum(joint * weight * jax.nn.log_softmax(theta)))(POLICY)
    np.testing.assert_allclose(jax.grad(got)(POLICY), other, rtol=0, atol=3e-4 * float(jnp.abs(other).max()))


# Without samples


def over_all_states(loss):
    """theta -> expectation of a vocabulary-wide loss over the states that the policy visits."""
    mask = jnp.repeat(sequence_probability(POLICY)[:, None], T, 1)

    def total(theta):
        log_p, log_q = jax.nn.log_softmax(theta)[PREFIX], jax.nn.log_softmax(REFERENCE)[PREFIX]
        return T * loss(loss.over_vocabulary(log_p, log_q), mask).value

    return total


@every_member
@every_direction
def test_exact_over_the_vocabulary(name, direction):
    truth = token_level(TEXTBOOK[name][1], direction, POLICY)
    assert_same(over_all_states(configured(name, direction=direction, samples="vocabulary")), truth)


@every_member
def test_exact_over_the_top_k(name):
    q = jax.nn.softmax(REFERENCE)
    order = jnp.argsort(-q, axis=-1)
    visited = state_probability(POLICY)

    def merged(x):
        x = jnp.take_along_axis(x, order, axis=-1)
        return jnp.concatenate([x[:, :2], x[:, 2:].sum(-1, keepdims=True)], axis=-1)

    def truth(theta):
        return jnp.sum(visited * between(TEXTBOOK[name][1], DIRECTIONS[0], merged(jax.nn.softmax(theta)), merged(q)))

    assert_same(over_all_states(configured(name, samples="top_k", k=2)), truth)


@pytest.mark.parametrize("order", [0.5, 0.9, 2.0, 3.0])
@every_direction
def test_renyi_and_its_gradient(order, direction):
    q, visited = jax.nn.softmax(REFERENCE), state_probability(POLICY)

    def truth(theta):
        p = jax.nn.softmax(theta)
        first, second = (p, q) if direction == "policy_to_reference" else (q, p)
        return jnp.sum(visited * jnp.log(jnp.sum(first**order * second ** (1 - order), axis=-1))) / (order - 1)

    loss = divergence(
        generator="renyi", alpha=order, samples="vocabulary", direction=direction, aggregation="token_sum_const"
    )
    assert_same(over_all_states(loss), truth)
    if direction == "policy_to_reference":  # at one state: alpha / E_reference[u^alpha] times the gradient of alpha
        alpha_loss = divergence(generator="alpha", alpha=order, samples="vocabulary")
        log_q = jax.nn.log_softmax(REFERENCE[0])
        renyi_slope, alpha_slope = (
            jax.grad(lambda x, one=one: one.over_vocabulary(jax.nn.log_softmax(x), log_q))(POLICY[0])
            for one in (loss, alpha_loss)
        )
        moment = jnp.sum(jax.nn.softmax(POLICY[0]) ** order * jnp.exp(log_q) ** (1 - order))
        np.testing.assert_allclose(renyi_slope, order / moment * alpha_slope, rtol=1e-3, atol=1e-5)


# Sequence level


@every_member
@one_direction_first
def test_sequence_level_on_every_kind_of_samples(name, direction):
    truth = sequence_level(TEXTBOOK[name][1], direction)
    options = {"direction": direction, "level": "sequence"}
    assert_same(expected(configured(name, **options), POLICY), truth)
    assert_same(expected(configured(name, **options, gradient="importance_corrected"), OLD), truth)
    assert_same(expected(configured(name, **options, samples="reference"), REFERENCE), truth)


def test_token_sums_equal_sequence_divergences_only_for_kl_from_the_generating_side():
    for name in TEXTBOOK:
        f = TEXTBOOK[name][1]
        on_policy = token_level(f, DIRECTIONS[0], POLICY)(POLICY), sequence_level(f, DIRECTIONS[0])(POLICY)
        on_reference = token_level(f, DIRECTIONS[0], REFERENCE)(POLICY), sequence_level(f, DIRECTIONS[0])(POLICY)
        assert np.isclose(*on_policy, rtol=1e-3) == (name == "reverse_kl"), name
        assert np.isclose(*on_reference, rtol=1e-3) == (name == "forward_kl"), name
    # and then the gradients agree too where the states are the reference's, which do not depend on the policy
    loss = configured("forward_kl", samples="reference")
    assert_same(expected(loss, REFERENCE), sequence_level(TEXTBOOK["forward_kl"][1], DIRECTIONS[0]))


# KL estimators, rewards, the definition of Jensen-Shannon


def test_what_back_propagating_k1_k2_k3_really_does():
    reverse = token_level(TEXTBOOK["reverse_kl"][1], DIRECTIONS[0], POLICY)
    forward = token_level(TEXTBOOK["forward_kl"][1], DIRECTIONS[0], POLICY)

    def estimator(name):
        def loss(logprobs, reference_logprobs, mask):
            return kl_estimate(logprobs, reference_logprobs, mask, estimator=name, aggregation="token_sum_const")

        return expected(loss, POLICY)

    scale = float(jnp.abs(jax.grad(reverse)(POLICY)).max())

    def same_gradient(one, other):
        np.testing.assert_allclose(jax.grad(one)(POLICY), jax.grad(other)(POLICY), rtol=0, atol=2e-4 * scale)

    np.testing.assert_allclose(jax.grad(estimator("k1"))(POLICY), 0, atol=1e-6)
    same_gradient(estimator("k2"), reverse)
    same_gradient(estimator("k3"), forward)
    assert gradients_differ(forward, reverse)
    np.testing.assert_allclose(estimator("k1")(POLICY), reverse(POLICY), rtol=1e-4)
    np.testing.assert_allclose(estimator("k3")(POLICY), reverse(POLICY), rtol=1e-4)
    assert abs(estimator("k2")(POLICY) / reverse(POLICY) - 1) > 0.01
    same_gradient(expected(configured("reverse_kl", gradient="pathwise"), POLICY), forward)


@every_member
def test_policy_gradient_on_the_reward_descends_the_divergence(name):
    lp, ref = token_logprobs(POLICY), token_logprobs(REFERENCE)
    probability = sequence_probability(POLICY)[:, None]
    options = TEXTBOOK[name][0] | {"generator": name.split("(")[0]}
    reward = divergence_reward(lp, ref, jnp.ones_like(lp), beta=0.3, **options)
    got = jax.grad(lambda theta: -jnp.sum(probability * reward * token_logprobs(theta)))(POLICY)
    want = 0.3 * jax.grad(token_level(TEXTBOOK[name][1], DIRECTIONS[0], POLICY))(POLICY)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4 * float(jnp.abs(want).max()))


def test_k1_reward_summed_over_the_rest_of_the_completion_descends_the_sequence_kl():
    lp, ref = token_logprobs(POLICY), token_logprobs(REFERENCE)
    reward = divergence_reward(lp, ref, jnp.ones_like(lp), beta=1.0)
    to_go = jnp.cumsum(reward[:, ::-1], axis=1)[:, ::-1]
    probability = sequence_probability(POLICY)[:, None]
    got = jax.grad(lambda theta: -jnp.sum(probability * to_go * token_logprobs(theta)))(POLICY)
    want = jax.grad(sequence_level(TEXTBOOK["reverse_kl"][1], DIRECTIONS[0]))(POLICY)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4 * float(jnp.abs(want).max()))


def test_js_definition_halves():
    def half(drawn_by):
        return lambda logprobs, reference_logprobs, mask: js_definition(
            logprobs, reference_logprobs, mask, samples=drawn_by, aggregation="token_sum_const"
        )

    def reference_to_midpoint(u):  # KL(reference || M) = E_reference[-log((1 + u) / 2)]
        return -jnp.log((1 + u) / 2)

    def policy_to_midpoint(u):  # KL(policy || M) = E_reference[u log(2 u / (1 + u))]
        return u * jnp.log(2 * u / (1 + u))

    assert_same(expected(half("reference"), REFERENCE), token_level(reference_to_midpoint, DIRECTIONS[0], REFERENCE))
    on_policy = expected(half("policy"), POLICY)
    truth = token_level(policy_to_midpoint, DIRECTIONS[0], POLICY)
    np.testing.assert_allclose(on_policy(POLICY), truth(POLICY), rtol=1e-4)
    assert gradients_differ(on_policy, truth)
    both = truth(POLICY) + token_level(reference_to_midpoint, DIRECTIONS[0], POLICY)(POLICY)
    twice = token_level(TEXTBOOK["jensen_shannon"][1], DIRECTIONS[0], POLICY)(POLICY)
    np.testing.assert_allclose(both, 2 * twice, rtol=1e-4)


# Drawn samples


@pytest.mark.parametrize(
    "name,form,sampler",
    [
        ("reverse_kl", {}, POLICY),
        ("jensen_shannon", {"level": "sequence"}, POLICY),
        ("forward_kl", {"gradient": "importance_corrected"}, OLD),
    ],
)
def test_monte_carlo_estimates_converge(name, form, sampler):
    """With n samples value and gradient are within five standard errors; the errors come from n blocks."""
    blocks, each = 64, 2048
    drawn = jax.random.choice(jax.random.key(11), len(SEQUENCES), (blocks, each), p=sequence_probability(sampler))
    loss = configured(name, **form)
    ref, old = token_logprobs(REFERENCE), token_logprobs(OLD)

    def estimate(theta, rows):
        weight = jnp.full((each, T), 1.0 / each)
        data = (token_logprobs(theta)[rows], ref[rows], weight)
        data += (old[rows],) if "old_logprobs" in signature(loss).required else ()
        return T * loss(*data).value

    values, slopes = jax.lax.map(lambda rows: jax.value_and_grad(estimate)(POLICY, rows), drawn)
    truth = token_level(TEXTBOOK[name][1], DIRECTIONS[0], sampler)
    if form.get("level") == "sequence":
        truth = sequence_level(TEXTBOOK[name][1], DIRECTIONS[0])
    true_value, true_slope = jax.value_and_grad(truth)(POLICY)
    for got, want in ((values, true_value), (slopes[:, 0], true_slope[0])):  # gradient at the first state
        error = np.std(got, axis=0, ddof=1) / np.sqrt(blocks)
        assert bool((np.abs(np.mean(got, axis=0) - want) < 5 * error + 1e-6).all())
        assert bool((error < 0.05 * np.max(np.abs(want))).all())  # tight enough to mean something
