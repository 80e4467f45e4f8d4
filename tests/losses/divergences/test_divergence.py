"""Divergences: worked examples, identities of the family, refused options, and finite numbers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import divergence, divergence_reward, generator, js_definition, kl_estimate, renyi
from jaxrl_llm.losses.divergences.divergence import GRADIENTS
from jaxrl_llm.losses.divergences.generators import GENERATORS
from jaxrl_llm.signatures import signature

MASK = jnp.array([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
LP = jnp.array([[-0.9, -0.8, -0.25], [-0.9, -0.3, 0], [-1.9, -0.05, -1.15], [-0.78, 0, 0]])
REF = jnp.array([[-1.1, -0.6, -0.4], [-0.6, -1.2, 0], [-1.7, -0.3, -1.0], [-0.9, 0, 0]])
OLD = jnp.array([[-1.2, -0.7, -0.3], [-0.5, -1.6, 0], [-2.0, -0.4, -0.9], [-0.8, 0, 0]])

# generator: f at u = exp(0.5), mean on samples of the reference, mean on samples of the policy, over a vocabulary
GOLDEN = {
    "reverse_kl": (0.175639, 0.101812, 0.0529142, 0.266217),
    "forward_kl": (0.148721, 0.0803722, 0.04463, 0.308994),
    "jensen_shannon": (0.0401279, 0.0221712, 0.0119414, 0.0687116),
    "alpha": (0.161341, 0.0898651, 0.0482593, 0.281),
    "chi_square": (0.420839, 0.272763, 0.133286, 0.531629),
    "neyman_chi_square": (0.255252, 0.133286, 0.0791963, 0.85519),
    "squared_hellinger": (0.0403352, 0.0224663, 0.0120648, 0.0702499),
    "total_variation": (0.324361, 0.167521, 0.122376, 0.331908),
    "jeffreys": (0.324361, 0.182185, 0.0975442, 0.57521),
}
# Every member once, with orders and mixtures other than their defaults.
FAMILY = {name: {"generator": name} for name in GENERATORS} | {
    "alpha(2)": {"generator": "alpha", "alpha": 2.0},
    "alpha(-1)": {"generator": "alpha", "alpha": -1.0},
    "alpha(1.5)": {"generator": "alpha", "alpha": 1.5},
    "alpha(0.2)": {"generator": "alpha", "alpha": 0.2},
    "jensen_shannon(0.1)": {"generator": "jensen_shannon", "mixture": 0.1},
}
# With divergences that are no means of samples.
WIDER = FAMILY | {"renyi": {"generator": "renyi"}, "renyi(2)": {"generator": "renyi", "alpha": 2.0}}
DIRECTIONS = ("policy_to_reference", "reference_to_policy")
SAMPLED_FORMS = [
    (samples, gradient, level)
    for samples in ("policy", "reference")
    for gradient in GRADIENTS[samples]
    for level in ("token", "sequence")
    if (samples, gradient, level) != ("policy", "pathwise", "sequence")
]


def member(options: dict, **more):
    """The generator object that a family entry describes."""
    rest = {key: value for key, value in options.items() if key != "generator"}
    return generator(options["generator"], **rest, **more)


def evaluated(loss, lp, ref, mask, old):
    """Call a sampled form with the data that it names."""
    return loss(lp, ref, mask, old) if "old_logprobs" in signature(loss).required else loss(lp, ref, mask)


def close(value, expected, digits=2e-6):
    np.testing.assert_allclose(np.asarray(value), expected, rtol=digits, atol=digits / 4)


def log_distributions(shape):
    draws = np.random.default_rng(0).normal(scale=1.5, size=(2, *shape))
    p, q = jax.nn.log_softmax(jnp.asarray(draws, jnp.float32))
    return p, q


def all_vocabulary_forms(form_of):
    """name -> form_of(name, options) for every member and Renyi's: one program for all of them."""
    found = functools.cache(lambda: jax.device_get(jax.jit(lambda: {k: form_of(k, v) for k, v in WIDER.items()})()))
    return lambda name: found()[name]


# Worked examples


@pytest.mark.parametrize("name", GOLDEN)
def test_worked_example_of_each_generator(name):
    at_half, on_reference, on_policy, over_vocabulary = GOLDEN[name]
    close(generator(name).value(jnp.float32(0.5)), at_half)
    close(divergence(generator=name, samples="reference")(LP, REF, MASK).value, on_reference)
    for gradient in ("score_function", "pathwise"):
        close(divergence(generator=name, gradient=gradient)(LP, REF, MASK).value, on_policy)
    p, q = jax.nn.log_softmax(jnp.arange(3.0)), jax.nn.log_softmax(jnp.zeros(3))
    close(divergence(generator=name, samples="vocabulary").over_vocabulary(p, q), over_vocabulary)


def test_worked_example_of_renyi():
    p, q = jax.nn.log_softmax(jnp.arange(3.0)), jax.nn.log_softmax(jnp.zeros(3))
    close(divergence(generator="renyi", samples="vocabulary").over_vocabulary(p, q), 0.145679)
    log_moment = jnp.log(jnp.sum(jnp.exp(2 * (LP - REF)) * MASK) / MASK.sum())
    close(renyi(log_moment, alpha=2.0), 0.472886)


def test_worked_example_of_kl_estimators():
    row = slice(0, 1)
    for estimator, expected in {
        "k1": [0.2, -0.2, 0.15],
        "k2": [0.02, 0.02, 0.01125],
        "k3": [0.0187308, 0.0214028, 0.010708],
    }.items():
        for position in range(3):
            only = jnp.eye(3)[position][None]
            value = kl_estimate(LP[row], REF[row], only, estimator=estimator).value
            close(value, expected[position], 4e-6)

    def total(lp):
        return kl_estimate(lp, REF[row], jnp.ones((1, 3)), estimator="k3").numerator

    close(jax.grad(total)(LP[row]), [[0.181269, -0.221403, 0.139292]], 4e-6)


def test_worked_examples_of_dph_rl():
    def value_and_gradient(**options):
        loss = divergence(samples="reference", **options)
        return jax.value_and_grad(lambda lp: loss(lp, REF, MASK).value)(LP)

    value, gradient = value_and_gradient(generator="forward_kl", value_limit=10.0)
    close(value, 0.0803722)
    close(
        gradient,
        [
            [0.0246003, -0.020141, 0.0179816],
            [-0.028798, 0.162178, 0],
            [-0.020141, 0.0315584, -0.0154769],
            [0.0141663, 0, 0],
        ],
    )
    value, gradient = value_and_gradient(generator="jensen_shannon")
    close(2 * value, 0.0443424)
    close(
        2 * gradient,
        [
            [0.0128937, -0.0095511, 0.00931922],
            [-0.0132695, 0.096196, 0],
            [-0.0095511, 0.016722, -0.00744129],
            [0.00729128, 0, 0],
        ],
    )
    close(value_and_gradient(generator="alpha", alpha=1 - 0.2)[0], 0.0966954)
    close(js_definition(LP, REF, MASK).value, 0.0246971)


def test_k3_with_the_gradient_of_k2():
    loss = divergence(generator="reverse_kl")
    value, gradient = jax.value_and_grad(lambda lp: loss(lp, REF, MASK).value)(LP)
    close(value, kl_estimate(LP, REF, MASK, estimator="k3").value)
    close(gradient, jax.grad(lambda lp: kl_estimate(lp, REF, MASK, estimator="k2").value)(LP))


def test_k3_back_propagated_as_released():
    loss = divergence(generator="reverse_kl", gradient="pathwise", value_limit=10.0)
    lp = LP.at[0, 0].set(-5.0)  # k3 = 44 there: clipped to 10 and without gradient
    ours = jax.value_and_grad(lambda x: loss(x, REF, MASK).value)(lp)
    released = jax.value_and_grad(lambda x: kl_estimate(x, REF, MASK, estimator="k3").value)(lp)
    close(ours[0], released[0])
    close(ours[1], released[1])
    assert released[1][0, 0] == 0


# Identities of the family


@pytest.mark.parametrize("name", FAMILY)
def test_normalised_and_non_negative(name):
    f = member(FAMILY[name])
    log_u = jnp.linspace(-4.5, 4.5, 91)
    assert f.value(jnp.float32(0)) == 0
    assert f.derivative(jnp.float32(0)) == 0
    assert bool((f.value(log_u) >= -1e-6).all())
    close(f.value_over_u(log_u), f.value(log_u) * jnp.exp(-log_u), 2e-5)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_derivative_is_that_of_the_value(name, direction):
    f = member(FAMILY[name], direction=direction)
    log_u = jnp.array([-4.0, -1.0, -0.1, 0.3, 2.0, 4.0])
    slope_in_log_u = jax.vmap(jax.grad(f.value))(log_u)
    close(slope_in_log_u * jnp.exp(-log_u), f.derivative(log_u), 2e-5)


@pytest.mark.parametrize("name", FAMILY)
def test_swapping_the_arguments_is_u_times_f_of_one_over_u(name):
    log_u = jnp.linspace(-4.0, 4.0, 41)
    swapped = member(FAMILY[name], direction="reference_to_policy").value(log_u)
    np.testing.assert_allclose(swapped, jnp.exp(log_u) * member(FAMILY[name]).value(-log_u), rtol=2e-5, atol=2e-5)


def test_swapped_pairs_and_symmetric_members():
    p, q = log_distributions(shape=(12, 7))
    exact = {name: divergence(generator=name, samples="vocabulary").over_vocabulary for name in GENERATORS}
    for name, partner in {
        "reverse_kl": "forward_kl",
        "chi_square": "neyman_chi_square",
        "jensen_shannon": "jensen_shannon",
        "alpha": "alpha",  # of order 1/2
        "total_variation": "total_variation",
        "squared_hellinger": "squared_hellinger",
        "jeffreys": "jeffreys",
    }.items():
        swapped = divergence(generator=name, samples="vocabulary", direction="reference_to_policy")
        np.testing.assert_allclose(exact[name](p, q), exact[partner](q, p), rtol=1e-4)
        np.testing.assert_allclose(swapped.over_vocabulary(p, q), exact[partner](p, q), rtol=1e-4)


def test_limits_of_alpha_and_mixture():
    log_u = jnp.linspace(-2, 2, 9)
    reverse, forward = generator("reverse_kl").value(log_u), generator("forward_kl").value(log_u)
    tolerance = {"rtol": 2e-2, "atol": 2e-3}
    np.testing.assert_allclose(generator("alpha", alpha=0.995).value(log_u), reverse, **tolerance)
    np.testing.assert_allclose(generator("alpha", alpha=1.005).value(log_u), reverse, **tolerance)
    np.testing.assert_allclose(generator("alpha", alpha=0.005).value(log_u), forward, **tolerance)
    np.testing.assert_allclose(generator("alpha", alpha=-0.005).value(log_u), forward, **tolerance)
    # mixture -> 0 leaves mixture * KL(policy || reference), mixture -> 1 leaves (1 - mixture) * KL(reference || policy)
    small = generator("jensen_shannon", mixture=0.002).value(log_u) / 0.002
    large = generator("jensen_shannon", mixture=0.998).value(log_u) / 0.002
    np.testing.assert_allclose(small, reverse, **tolerance)
    np.testing.assert_allclose(large, forward, **tolerance)


def test_members_that_are_multiples_of_each_other():
    log_u = jnp.linspace(-4.5, 4.5, 19)
    close(generator("alpha").value(log_u), 4 * generator("squared_hellinger").value(log_u), 1e-5)
    close(generator("alpha", alpha=2.0).value(log_u), generator("chi_square").value(log_u) / 2, 1e-5)
    close(generator("alpha", alpha=-1.0).value(log_u), generator("neyman_chi_square").value(log_u) / 2, 1e-5)
    both = generator("reverse_kl").value(log_u) + generator("forward_kl").value(log_u)
    close(generator("jeffreys").value(log_u), both, 1e-5)
    far = jnp.array([-60.0, -8.0, 8.0, 60.0])  # the same limit on the log-ratio as the chi-squares
    close(generator("alpha", alpha=2.0).value(far), generator("chi_square").value(far) / 2, 1e-5)


@pytest.mark.parametrize("name", FAMILY)
def test_conjugate_is_the_fenchel_supremum(name):
    f = member(FAMILY[name])
    log_u = jnp.linspace(-4.9, 4.9, 20001)
    grid_u, grid_f = np.exp(np.asarray(log_u, np.float64)), np.asarray(f.value(log_u), np.float64)
    for at in (-1.5, -0.6, -0.01, 0.4, 1.3):
        t = float(f.derivative(jnp.float32(at)))
        supremum = np.max(grid_u * t - grid_f)
        np.testing.assert_allclose(float(f.conjugate(jnp.float32(t))), supremum, rtol=2e-4, atol=2e-5)
        at_the_point = np.exp(at) * t - float(f.value(jnp.float32(at)))
        np.testing.assert_allclose(supremum, at_the_point, rtol=1e-4, atol=1e-5)


def test_conjugate_is_infinite_outside_its_domain():
    for name, options, t in [
        ("forward_kl", {}, 1.5),
        ("jensen_shannon", {}, 0.5),
        ("alpha", {}, 2.5),
        ("alpha", {"alpha": -1.0}, 0.6),
        ("neyman_chi_square", {}, 1.5),
        ("squared_hellinger", {}, 0.7),
        ("total_variation", {}, 0.7),
    ]:
        assert generator(name, **options).conjugate(jnp.float32(t)) == jnp.inf, name
    assert generator("chi_square").conjugate(jnp.float32(-3.0)) == -1  # the supremum is at u = 0
    assert generator("total_variation").conjugate(jnp.float32(-3.0)) == -0.5
    close(generator("alpha", alpha=2.0).conjugate(jnp.float32(-3.0)), -0.5)


def test_bounded_members_reach_their_bounds():
    p, q = jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.array([0.0, 1.0]))  # disjoint
    for name, bound in {"jensen_shannon": np.log(2), "squared_hellinger": 1.0, "total_variation": 1.0}.items():
        close(divergence(generator=name, samples="vocabulary").over_vocabulary(p, q), bound)


# Over the vocabulary


@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon", "alpha(1.5)"])
def test_chunked_pass_equals_the_whole_array(name):
    log_p, log_q = log_distributions(shape=(2, 6, 11))
    mask = jnp.array([[1.0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    loss = divergence(**FAMILY[name], samples="vocabulary")
    f = member(FAMILY[name])

    def chunked(log_p):
        rows = (log_p.reshape(4, 3, 11), log_q.reshape(4, 3, 11))
        per_token = jax.lax.map(lambda pair: loss.over_vocabulary(*pair), rows).reshape(2, 6)
        return loss(per_token, mask).value

    def direct(log_p):
        per_token = jnp.sum(jnp.exp(log_q) * f.value(log_p - log_q), axis=-1)
        return jnp.sum(per_token * mask) / mask.sum()

    (value, slope), (expected, expected_slope) = (jax.jit(jax.value_and_grad(x))(log_p) for x in (chunked, direct))
    close(value, expected, 1e-5)
    close(slope, expected_slope, 1e-4)


@all_vocabulary_forms
def over_the_top_k(name, options):
    """k -> values of distributions over seven tokens; without a k the exact ones."""
    p, q = log_distributions(shape=(12, 7))
    forms = {k: divergence(**options, samples="top_k", k=k) for k in (1, 3, 6, 7, 100)}
    forms[0] = divergence(**options, samples="vocabulary")
    return {k: form.over_vocabulary(p, q) for k, form in forms.items()}


@pytest.mark.parametrize("name", WIDER)
def test_top_k_is_a_lower_bound_that_grows_to_the_exact_value(name):
    at = over_the_top_k(name)
    one, three, six, exact = at[1], at[3], at[6], at[0]
    np.testing.assert_array_equal(at[7], exact)
    np.testing.assert_array_equal(at[100], exact)
    np.testing.assert_allclose(six, exact, rtol=1e-3, atol=1e-5)  # a remainder of one token is exact
    slack = 1e-4 * exact + 1e-6
    assert (one <= three + slack).all()
    assert (three <= six + slack).all()
    assert (one < exact).all()


def test_top_k_keeps_the_reference_s_largest_and_all_of_the_mass():
    log_q = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
    log_p = jnp.log(jnp.array([0.3, 0.1, 0.5, 0.1]))
    got = divergence(samples="top_k", k=2).over_vocabulary(log_p, log_q)
    p, q = np.array([0.1, 0.1, 0.8]), np.array([0.4, 0.3, 0.3])
    close(got, np.sum(p * np.log(p / q)), 1e-5)
    # all tokens of the reference tie: two are kept, and the other two are the remainder
    uniform = jnp.log(jnp.full(4, 0.25))
    p, q = np.array([0.3, 0.1, 0.6]), np.array([0.25, 0.25, 0.5])
    close(divergence(samples="top_k", k=2).over_vocabulary(log_p, uniform), np.sum(p * np.log(p / q)), 1e-5)


def test_renyi_follows_from_alpha_and_is_swapped_by_direction():
    p, q = log_distributions(shape=(12, 7))
    for order in (0.3, 0.5, 2.0):
        alpha_divergence = divergence(generator="alpha", alpha=order, samples="vocabulary").over_vocabulary(p, q)
        options = {"generator": "renyi", "alpha": order, "samples": "vocabulary"}
        got = divergence(**options).over_vocabulary(p, q)
        np.testing.assert_allclose(
            got, np.log1p(order * (order - 1) * np.asarray(alpha_divergence)) / (order - 1), rtol=1e-4
        )
        swapped = divergence(**options, direction="reference_to_policy")
        np.testing.assert_allclose(swapped.over_vocabulary(q, p), got, rtol=1e-5)


def at_the_extremes(name, samples):
    options = WIDER[name]
    loss = divergence(**options, samples=samples, **({"k": 2} if samples == "top_k" else {}))
    peaks = jnp.array([[50.0, 0, 0, -50], [-50, 0, 0, 50], [0, 0, 0, 0], [50, 0, 0, 0]])
    masked = peaks.at[3, 1].set(-jnp.inf)  # a token that cannot be sampled
    dtype = jnp.bfloat16 if options["generator"] == "jeffreys" else jnp.float32
    log_q = jax.nn.log_softmax(peaks[jnp.array([1, 0, 0, 1])].astype(dtype))
    return jax.value_and_grad(lambda logits: loss.over_vocabulary(jax.nn.log_softmax(logits), log_q).sum())(
        masked.astype(dtype)
    )


@all_vocabulary_forms
def every_extreme(name, options):
    return {samples: at_the_extremes(name, samples) for samples in ("vocabulary", "top_k")}


@pytest.mark.parametrize("name", WIDER)
@pytest.mark.parametrize("samples", ["vocabulary", "top_k"])
def test_vocabulary_forms_stay_finite_at_the_extremes(name, samples):
    value, gradient = every_extreme(name)[samples]
    assert value.dtype == jnp.float32
    assert np.isfinite(value)
    assert np.isfinite(gradient.astype(np.float32)).all()


# Laws of every sampled form


EXTREME_MASK = np.float32([[1.0, 1, 1, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0]])


@jax.jit
def every_sampled_form(lp, ref, old):
    """(name, *form) -> (value, gradient by the log-probabilities) of every member in every sampled form."""

    def value_and_slope(name, samples, gradient, level):
        loss = divergence(**FAMILY[name], samples=samples, gradient=gradient, level=level)
        # All generators share the cast to float32, so one of them is tested in bfloat16.
        data = [x.astype(jnp.bfloat16 if name == "jeffreys" else jnp.float32) for x in (lp, ref, old)]
        return jax.value_and_grad(lambda lp, ref, old: evaluated(loss, lp, ref, EXTREME_MASK, old).value)(*data)

    return {(name, *form): value_and_slope(name, *form) for name in FAMILY for form in SAMPLED_FORMS}


@pytest.fixture(scope="module")
def clean_and_dirty():
    """What every form makes of extreme log-ratios, and of those with junk outside the mask."""
    lp = np.float32([[-50.0, 0, -1, -1], [-0.01, -50, -1, -np.inf], [0, 0, 0, 0]])
    ref = np.float32([[0.0, -50, -1, -2], [-50, 0, -1, -1], [0, 0, 0, 0]])
    old = np.float32([[0.0, -50, -50, -1], [-1, -1, -1, -1], [0, 0, 0, 0]])
    junk = np.where(EXTREME_MASK > 0, 0, np.float32([np.nan, np.inf, -np.inf, np.nan]))
    return [jax.device_get(every_sampled_form(*(x + more for x in (lp, ref, old)))) for more in (0 * lp[2:], junk)]


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("samples,gradient,level", SAMPLED_FORMS)
def test_finite_at_the_extremes_and_blind_outside_the_mask(clean_and_dirty, name, samples, gradient, level):
    (clean, slope), (dirty, dirty_slope) = (found[name, samples, gradient, level] for found in clean_and_dirty)
    assert clean.dtype == np.float32
    assert np.isfinite(clean)
    assert np.isfinite(slope.astype(np.float32)).all()
    np.testing.assert_array_equal(dirty, clean)
    np.testing.assert_array_equal(dirty_slope, slope)
    assert (dirty_slope == 0)[EXTREME_MASK == 0].all()


@pytest.mark.parametrize("samples,gradient,level", SAMPLED_FORMS)
def test_sum_and_count_survive_padding_permutation_and_splits(samples, gradient, level):
    loss = divergence(generator="jensen_shannon", samples=samples, gradient=gradient, level=level)
    apply = jax.jit(functools.partial(evaluated, loss))
    whole = apply(LP, REF, MASK, OLD)
    assert whole.denominator == MASK.sum()
    order = jnp.array([2, 0, 3, 1])
    close(apply(*(x[order] for x in (LP, REF, MASK, OLD))).value, whole.value)
    wide = [jnp.pad(x, ((0, 1), (0, 2))) for x in (LP, REF, MASK, OLD)]
    close(apply(*wide).value, whole.value)
    parts = [apply(*(x[rows] for x in (LP, REF, MASK, OLD))) for rows in (slice(0, 1), slice(1, 4))]
    close(sum(part.numerator for part in parts), whole.numerator)
    close(sum(part.denominator for part in parts), whole.denominator)
    lost = apply(jnp.full_like(LP, jnp.nan), REF, MASK, OLD)
    assert lost.denominator == whole.denominator


def test_samples_beyond_the_limit_keep_pulling():
    """A token with zero probability under the policy still has a gradient that raises it."""
    zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))

    def slope(**options):
        loss = divergence(samples="reference", **options)
        return float(jax.grad(lambda lp: loss(lp, zero, one).value)(jnp.full((1, 1), -60.0))[0, 0])

    for name, pull in {"forward_kl": -1.0, "jeffreys": -1.0, "neyman_chi_square": np.exp(-5) - np.exp(5)}.items():
        close(slope(generator=name), pull, 1e-5)
    assert slope(generator="forward_kl", value_limit=10.0) == 0  # as in the released code, if requested


def test_a_row_s_sequence_value_does_not_depend_on_the_token_count():
    log_u = jnp.array([[0.4, -0.1, 0.3, 0.0]])
    loss = divergence(level="sequence", samples="reference", aggregation="seq_mean_token_sum")
    total = generator("reverse_kl").value(jnp.float32(0.6))
    close(loss(log_u, jnp.zeros((1, 4)), jnp.array([[1.0, 1, 1, 0]])).value, total)
    close(loss(log_u, jnp.zeros((1, 4)), jnp.ones((1, 4))).value, total)
    close(loss(log_u, jnp.zeros((1, 4)), jnp.full((1, 4), 0.25)).value, total)
    mean = divergence(level="sequence", samples="reference")(log_u, jnp.zeros((1, 4)), jnp.ones((1, 4)))
    close(mean.value, total / 4)


def test_reward_is_minus_beta_times_the_derivative():
    reward = divergence_reward(LP, REF, MASK.at[0, 1].set(0.5), beta=0.1)
    close(reward, -0.1 * (LP - REF) * MASK)
    junk = jnp.where(MASK > 0, 0.0, jnp.nan)
    np.testing.assert_array_equal(divergence_reward(LP + junk, REF, MASK, beta=0.1), reward)
    forward = divergence_reward(LP, REF, MASK, beta=1.0, generator="reverse_kl", direction="reference_to_policy")
    close(forward, -(1 - jnp.exp(REF - LP)) * MASK, 4e-6)
    slope = jax.grad(lambda lp: divergence_reward(lp, REF, MASK, beta=0.1).sum())(LP)
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("drawn_by", ["reference", "policy"])
def test_js_definition_stays_finite(drawn_by):
    lp, ref = jnp.array([[-50.0, 0, jnp.nan]]), jnp.array([[0.0, -50, -jnp.inf]])
    mask = jnp.array([[1.0, 1, 0]])
    value, slope = jax.value_and_grad(lambda x: js_definition(x, ref, mask, samples=drawn_by).value)(lp)
    assert bool(jnp.isfinite(value))
    assert bool(jnp.isfinite(slope).all())


# The factory


def test_a_configured_loss_names_the_data_it_needs():
    sampled = ("logprobs", "reference_logprobs", "mask")
    assert signature(divergence()).required == sampled
    assert signature(divergence(samples="reference")).required == sampled
    assert signature(divergence(gradient="importance_corrected")).required == (*sampled, "old_logprobs")
    for samples in ("vocabulary", "top_k"):
        loss = divergence(samples=samples)
        assert signature(loss).required == ("over_vocabulary", "mask")
        assert callable(loss.over_vocabulary)
    assert not hasattr(divergence(), "over_vocabulary")
    assert signature(divergence).required == ()  # a factory has no data


@pytest.mark.parametrize(
    "options,message",
    [
        ({"generator": "revers_kl"}, "did you mean 'reverse_kl'"),
        ({"generator": "zzz"}, "known: alpha"),
        ({"direction": "backwards"}, "policy_to_reference, reference_to_policy"),
        ({"samples": "demonstrations"}, "policy, reference, vocabulary, top_k"),
        ({"gradient": "exact"}, "score_function, importance_corrected, pathwise"),
        ({"gradient": "straight_through"}, "score_function"),
        ({"samples": "reference", "gradient": "importance_corrected"}, "pathwise"),
        ({"samples": "reference", "gradient": "score_function"}, "pathwise"),
        ({"samples": "vocabulary", "gradient": "pathwise"}, "exact"),
        ({"level": "word"}, "token, sequence"),
        ({"level": "sequence", "samples": "vocabulary"}, "cannot be enumerated"),
        ({"level": "sequence", "samples": "top_k"}, "cannot be enumerated"),
        ({"level": "sequence", "gradient": "pathwise"}, "another divergence"),
        ({"generator": "alpha", "alpha": 0}, "'forward_kl' for alpha 0"),
        ({"generator": "alpha", "alpha": 1.0}, "'reverse_kl' for alpha 1"),
        ({"generator": "alpha", "alpha": float("nan")}, "finite"),
        ({"generator": "forward_kl", "alpha": 0.3}, "no order"),
        ({"generator": "renyi", "alpha": -1.0, "samples": "vocabulary"}, "alpha > 0"),
        ({"generator": "renyi"}, "logarithm of a mean"),
        ({"generator": "renyi", "samples": "reference"}, "logarithm of a mean"),
        ({"generator": "jensen_shannon", "mixture": 0.0}, "between 0 and 1"),
        ({"generator": "jensen_shannon", "mixture": 1.0}, "between 0 and 1"),
        ({"generator": "reverse_kl", "mixture": 0.3}, "no midpoint"),
        ({"samples": "top_k", "k": 0}, "k is 0; it must be at least 1"),
        ({"samples": "vocabulary", "k": 8}, "keeps no k symbols"),
        ({"value_limit": 10.0}, "pathwise"),
        ({"samples": "reference", "value_limit": 0.0}, "value_limit is 0.0; it must be above 0"),
        ({"aggregation": "mean"}, "token_mean"),
    ],
)
def test_options_that_do_not_go_together_are_refused_when_configured(options, message):
    with pytest.raises(ValueError, match=message):
        divergence(**options)


def test_bad_options_of_the_other_functions():
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate(LP, REF, MASK, estimator="k4")
    with pytest.raises(ValueError, match="'reference' or 'policy'"):
        js_definition(LP, REF, MASK, samples="vocabulary")
    with pytest.raises(ValueError, match="not an f-divergence"):
        divergence_reward(LP, REF, MASK, beta=0.1, generator="renyi")
