"""The gradient on sampled tokens is, on average, that of the divergence from the teacher."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import teacher_reverse_kl

SYMBOLS = 3
RNG = np.random.default_rng(4)


def drawn_scores():
    """Of a first token, and of a second one given the first."""
    return tuple(RNG.normal(size=shape).astype(np.float32) for shape in (SYMBOLS, (SYMBOLS, SYMBOLS)))


STUDENT, TEACHER = drawn_scores(), drawn_scores()
ALL = np.array(list(itertools.product(range(SYMBOLS), repeat=2)))
MASK = np.ones(ALL.shape, np.float32)
LP, OLD, REF = np.float32([[-1.0, -2.0, -0.5]]), np.float32([[-1.2, -2.0, -0.5]]), np.float32([[-1.5, -1.0, -0.25]])
INSIDE = np.float32([[1.0, 1, 0]])


def scored(scores):
    first, second = jax.nn.log_softmax(scores[0]), jax.nn.log_softmax(scores[1])
    return jnp.stack([first[ALL[:, 0]], second[ALL[:, 0], ALL[:, 1]]], axis=1)


def expected_gradient(horizon, old=STUDENT):
    """Mean over all completions of the loss's gradient, each as often as `old` draws it."""

    def of_a_row(lp, old, teacher):
        options = {"horizon": horizon, "aggregation": "seq_mean_token_sum"}
        return teacher_reverse_kl(lp[None], old[None], teacher[None], MASK[:1], **options).value

    def mean(scores):
        rows = jax.vmap(of_a_row)(scored(scores), scored(old), scored(TEACHER))
        return (jnp.exp(scored(old).sum(1)) * rows).sum()

    return jax.jit(jax.grad(mean))(STUDENT)


def divergence(scores):
    """KL of whole completions."""
    lp, teacher = scored(scores).sum(1), scored(TEACHER).sum(1)
    return (jnp.exp(lp) * (lp - teacher)).sum()


def at_visited_states(scores):
    """KL of next-token distributions at states that the student as it stands visits."""
    kl = lambda s, t: (jnp.exp(s) * (s - t)).sum(-1)  # noqa: E731
    (s1, s2), (t1, t2) = ([jax.nn.log_softmax(x) for x in part] for part in (scores, TEACHER))
    return kl(s1, t1) + (jax.nn.softmax(STUDENT[0]) * kl(s2, t2)).sum()


@pytest.mark.parametrize(("horizon", "exact"), [("token", at_visited_states), ("rest", divergence)])
def test_the_mean_gradient_is_that_of_the_divergence(horizon, exact):
    for found, wanted in zip(expected_gradient(horizon), jax.jit(jax.grad(exact))(STUDENT), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_tokens_of_an_older_policy_are_weighted():
    older = STUDENT[0], STUDENT[1] + drawn_scores()[1]  # the first token drawn alike
    for found, wanted in zip(
        expected_gradient("token", older), jax.jit(jax.grad(at_visited_states))(STUDENT), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_worked_example():
    token = teacher_reverse_kl(LP, OLD, REF, INSIDE)
    np.testing.assert_allclose(token.value, (np.exp(0.2) * 0.5 - 1.0) / 2, rtol=1e-6)
    np.testing.assert_allclose(token.metrics["teacher_kl"], (-0.5, 2.0), rtol=1e-6)
    rest = teacher_reverse_kl(LP, OLD, REF, INSIDE, horizon="rest")
    np.testing.assert_allclose(rest.value, (np.exp(0.2) * -0.5 - 1.0) / 2, rtol=1e-6)


@pytest.mark.parametrize("horizon", ["token", "rest"])
def test_a_student_that_is_its_teacher_learns_nothing(horizon):
    value, gradient = jax.value_and_grad(lambda x: teacher_reverse_kl(x, LP, LP, INSIDE, horizon=horizon).value)(LP)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("horizon", ["token", "rest"])
@pytest.mark.parametrize("shift", [-50.0, 50.0])
def test_far_teachers_have_finite_gradients(horizon, shift):
    gradient = jax.grad(lambda x: teacher_reverse_kl(x, OLD, REF + shift, INSIDE, horizon=horizon).value)(LP)
    assert np.isfinite(gradient).all()
    assert gradient[0, 2] == 0


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="horizon is 'sequence'; it must be one of token, rest"):
        teacher_reverse_kl(LP, OLD, REF, INSIDE, horizon="sequence")
    with pytest.raises(ValueError, match=r"log_ratio_limit is 0\.0"):
        teacher_reverse_kl(LP, OLD, REF, INSIDE, log_ratio_limit=0.0)
