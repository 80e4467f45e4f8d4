"""Losses of reward models, and RL against them: the worked examples of the cards in one program, and what holds."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import advantages, evaluation, losses, rewards, schedules, selection

ONES = jnp.ones(8)
RANKED = {
    "reward_scores": jnp.array([2, 1, -0.5, 0.3, 0.4, 0]),
    "rank": jnp.array([0.0, 1, 2, 0, 1, 2]),
    "group": jnp.array([7, 7, 7, 2, 2, 2]),
    "weight": jnp.ones(6),
}
PAIRS = {
    "reward_scores": jnp.array([1.2, 0.7, 0.1, -0.3, 0.8, 0.8, 2, -1]),
    "group": jnp.array([0, 0, 1, 1, 2, 2, 3, 3]),
    # HelpSteer2: y = -2 and -1 prefer the first, 1 and 3 the second answer.
    "preferred": jnp.array([1.0, 0, 1, 0, 0, 1, 1, 0]),
    "margin": jnp.array([2.0, 0, 1, 0, 0, 3, 1, 0]),
    "weight": ONES,
}
VERDICT = jax.nn.log_softmax(jnp.array([[2, 0.5, 0, -1], [0, 1.5, 0, 0], [0, 1, 0.5, 0], [0.5, 1, 0, -0.5]]))
SAID = {"yes_logprobs": VERDICT[:, :1], "no_logprobs": VERDICT[:, 1:2]} | {
    f"{name}_mask": jnp.ones((4, 1)) for name in ("yes", "no")
}
JUDGED = SAID | {"group": jnp.array([0, 0, 1, 1]), "preferred": jnp.array([1.0, 0, 1, 0]), "weight": jnp.ones(4)}
T_SAID = jnp.array([[-0.5, -1.25, -0.75, 0], [-2, -0.25, -1, -0.5]])
T_REFERENCE = jnp.array([[-0.75, -1, -1.25, 0], [-1.5, -0.5, -1, -1.5]])
T_MASK = jnp.array([[1.0, 1, 1, 0], [1, 1, 1, 1]])
TOKENS = {"old_logprobs": T_SAID, "reference_logprobs": T_REFERENCE, "mask": T_MASK}
GUIDE = jnp.array([[-0.25, -1.5, -0.25, 0], [-1, -1, -0.5, -4]])
GROUPED = {"rewards": jnp.array([0.3, 0.9, -0.2, 0.9]), "group": jnp.zeros(4, int), "weight": jnp.ones(4)}
RSO = {"rewards": jnp.array([0, 1, 0.5]), "group": jnp.zeros(3, int), "weight": jnp.ones(3)}
POLAR = {"reward_scores": jnp.array([0.5, -0.5, -1, -0.75]), "preferred": jnp.array([1.0, 0, 1, 0])}
WEAK = {"reward_scores": jnp.array([1, 0.5, -1, -0.3]), "weak_share": jnp.array([0.9, 0.4, 0.7, 0.2])}

# name: (function, data, expected); the value of a loss, or the array.
EXAMPLES = {
    "all pairs": (partial(losses.ranked_answers, form="all_pairs"), RANKED, 0.400889 * 2),
    "plackett-luce": (losses.ranked_answers, RANKED, 1.065939 * 2),
    "scaled": (partial(losses.bradley_terry, margin_use="weight"), PAIRS, 0.897300 * 4),
    "polar": (
        losses.bradley_terry,
        POLAR | {"group": jnp.array([0, 0, 1, 1]), "weight": jnp.ones(4)},
        0.569601 * 2,
    ),
    "attributes": (
        losses.rating_regression,
        {
            "reward_scores": jnp.array([[3.5, 2, 4], [1, 0.5, 2]]),
            "rating": jnp.array([[4, 2, jnp.nan], [0, 1, 2]]),
            "weight": jnp.ones(2),
        },
        0.3 * 5,
    ),
    "orm": (
        losses.outcome_cross_entropy,
        {"reward_scores": jnp.array([2, -1, 0]), "preferred": jnp.array([1.0, 1, 0]), "weight": jnp.ones(3)},
        0.711112 * 3,
    ),
    "weak to strong": (losses.weak_labels, WEAK | {"weight": jnp.ones(4)}, 0.558739 * 4),
    "rewarddance": (losses.verdict_ranking, JUDGED, 0.687475 * 2),
    "yes": (rewards.verdict_score, SAID, [0.710100, None, 0.157060, None]),
    "two way": (partial(rewards.verdict_score, form="two_way"), SAID, [0.817574, None, 0.268941, None]),
    "pairwise": (
        rewards.unbiased_comparison,
        {"first_share": jnp.array([0.9, 0.4, 0.55]), "swapped_share": jnp.array([0.3, 0.7, 0.45])},
        [0.3, -0.15, 0.05],
    ),
    "rto": (
        advantages.implicit_token_rewards,
        TOKENS | {"rewards": jnp.array([1.5, -0.5]), "guide_logprobs": GUIDE},
        [[0.0225, -0.0225, 1.545, 0], [0.03, -0.0275, 0.025, -0.56]],
    ),
    "ppo recipe": (
        lambda rewards, truncated, **tokens: advantages.kl_penalized_rewards(
            advantages.missing_end_penalty(rewards, truncated), **tokens, kl_coefficient=0.05
        ),
        TOKENS | {"rewards": jnp.array([1.5, 0.7]), "truncated": jnp.array([False, True])},
        [[-0.0125, 0.0125, 1.475, 0], [0.025, -0.0125, 0, -10.05]],
    ),
    "drw": (
        partial(schedules.influence_weights, learning_rate=0.1, mu=1.0),
        {
            "weights": jnp.array([0.5, 0.25, 0.25]),
            "gradients": jnp.array([[1, 0, 0.5], [0, 1, -0.5], [-0.5, 0.5, 0]]),
        },
        [0.487190, 0.269214, 0.243595],
    ),
    "online pair": (selection.best_and_worst, GROUPED, [-1, 1, 0, -1]),
    "two of each": (partial(selection.best_and_worst, count=9), GROUPED, [0, 1, 0, 1]),
    "gap": (partial(selection.best_and_worst, least_gap=1.2), GROUPED, [-1, -1, -1, -1]),
    "rso": (partial(selection.acceptance_probability, beta=0.5), RSO, [0.135335, 1, 0.367879]),
}


def results(data):
    found = {name: function(**data[name]) for name, (function, _, _) in EXAMPLES.items()}
    return {name: one.value * one.denominator if isinstance(one, losses.Loss) else one for name, one in found.items()}


@pytest.fixture(scope="module")
def compiled():
    return jax.jit(results)


def test_worked_examples_in_one_program(compiled):
    found = compiled({name: data for name, (_, data, _) in EXAMPLES.items()})
    for name, (*_, expected) in EXAMPLES.items():
        wanted = np.array(expected, float)
        np.testing.assert_allclose(
            np.where(np.isnan(wanted), np.nan, found[name]), wanted, rtol=3e-6, atol=1e-6, err_msg=name
        )


def test_absent_rows_change_nothing(compiled):
    """A row of weight 0, whatever it holds; in a group of its own, so that it makes no pair."""

    def longer(data):
        n = len(data["weight"])
        made = {}
        for name, value in data.items():
            fill = 0 if name == "weight" or value.dtype.kind in "ib" else jnp.nan
            # An id that segment reductions over B know.
            row = jnp.full((1, *value.shape[1:]), n if name == "group" else fill, value.dtype)
            made[name] = jnp.concatenate([value, row])
        return made

    with_weight = {name for name, (_, data, _) in EXAMPLES.items() if "weight" in data}
    data = {name: longer(d) if name in with_weight else d for name, (_, d, _) in EXAMPLES.items()}
    spoiled, whole = compiled(data), compiled({name: data for name, (_, data, _) in EXAMPLES.items()})
    for name in with_weight:
        found = spoiled[name] if spoiled[name].ndim == 0 else spoiled[name][:-1]
        np.testing.assert_allclose(found, whole[name], rtol=1e-5, err_msg=name)


def test_gradients_are_finite_and_where_they_belong():
    names = ("plackett-luce", "all pairs", "scaled", "attributes", "orm", "weak to strong")

    def slopes_at(scale):
        found = {}
        for name in names:
            function, data, _ = EXAMPLES[name]
            value = lambda s, f=function, d=data: f(**d | {"reward_scores": s}).value  # noqa: E731
            found[name] = jax.grad(value)(data["reward_scores"] * scale)
        return found

    at = jax.jit(slopes_at)
    slopes = at(1.0)
    for name in names:
        assert np.isfinite(slopes[name]).all(), name
        assert np.isfinite(at(60.0)[name]).all(), name
    assert slopes["attributes"][0, 2] == 0  # nobody rated it
    np.testing.assert_allclose(slopes["plackett-luce"][:3].sum(), 0.0, atol=1e-6)  # scores have no zero


def test_two_answers_are_bradley_terry():
    scores, group, weight = PAIRS["reward_scores"][:4], PAIRS["group"][:4], jnp.ones(4)
    expected = losses.bradley_terry(scores, group, jnp.array([1.0, 0, 1, 0]), weight).value
    for form in ("all_pairs", "plackett_luce"):
        found = losses.ranked_answers(scores, jnp.array([0.0, 1, 0, 1]), group, weight, form=form).value
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    alone = losses.ranked_answers(scores, jnp.zeros(4), jnp.arange(4), weight)
    assert alone.value == alone.denominator == 0


def test_kept_samples_are_those_of_the_tilted_policy():
    n = 512
    group, r = jnp.arange(n) // 4, jnp.tile(jnp.array([0.0, 0.2, 0.5, 1.0]), n // 4)
    kept = jax.jit(selection.rejection_sampled)(r, group, jnp.ones(n), jnp.int32(3), group, jnp.arange(n) % 4)
    share = np.asarray(kept).reshape(-1, 4).mean(0)
    np.testing.assert_allclose(share, np.exp((np.array([0, 0.2, 0.5, 1]) - 1) / 0.5), atol=0.12)


def test_figures_of_reward_models_and_of_what_they_are_driven_to():
    found = evaluation.preference_metrics([1, 0.2, 0.5, 0], [0.5, 0.3, 0.9, 0], [(9, 3), (4, 4), (2, 5), (1, 1)])
    assert (found["accuracy"], found["ties"]) == (0.25, 0.25)
    np.testing.assert_allclose(found["loss"], np.mean(np.logaddexp(0, [-0.5, 0.1, 0.4, 0])))
    assert found["length_correlation"] > 0.9
    # Right as often as it says: p = 3/4, and three of four pairs in order.
    sure = [np.log(3.0)] * 3 + [0.0]
    assert evaluation.preference_metrics(sure, [0.0] * 3 + [np.log(3.0)])["calibration_error"] < 1e-12
    kl = [0.25, 1, 4, 9, 25, 64]
    gain = [round(np.sqrt(k) * (1 - 0.4 * np.log(np.sqrt(k))), 4) for k in kl]
    fit = evaluation.overoptimisation_fit(kl, gain)
    np.testing.assert_allclose(list(fit.values()), [1.000003, 0.400001, 4.481691, 1.792682], atol=6e-6)
    parabola = evaluation.overoptimisation_fit(kl, [np.sqrt(k) - 0.1 * k for k in kl], curve="best_of_n")
    np.testing.assert_allclose(list(parabola.values()), [1, 0.1, 5, 2.5], rtol=1e-9)
    assert "peak_gain" not in evaluation.overoptimisation_fit([1, 4], [1, 8])
    assert evaluation.hypervolume([], [0, 0]) == evaluation.hypervolume([[1, -1]], [0, 0]) == 0
    np.testing.assert_allclose(evaluation.hypervolume([[1, 2, 3], [2, 1, 1]], [0, 0, 0]), 7)
    # The second objective is minimised, and so negated.
    np.testing.assert_allclose(
        evaluation.hypervolume_factor([[0.5, -0.8]], [0.6, -0.6], [0.2, -0.9]),
        (0.09, 0.634637),
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.ranked_answers(**RANKED, form="pairs"), "form is 'pairs'; it must be one of all_pairs"),
        (lambda: losses.bradley_terry(**PAIRS, margin_use="scale"), "margin_use is 'scale'; it must be one of shift"),
        (lambda: losses.weak_labels(**WEAK, weight=jnp.ones(4), confidence=2.0), "confidence"),
        (lambda: rewards.verdict_score(**SAID, form="log"), "form is 'log'; it must be one of probability"),
        (lambda: advantages.missing_end_penalty(ONES, ONES, form="add"), "form is 'add'; it must be one of replace"),
        (lambda: selection.best_and_worst(**GROUPED, count=0), "count"),
        (lambda: evaluation.preference_metrics([], []), "give one score of each a pair"),
        (lambda: evaluation.preference_metrics([np.nan], [0]), "pair 0 has a score that is not finite"),
        (lambda: evaluation.overoptimisation_fit([0, 1], [1, 1]), "each KL above 0"),
        (lambda: evaluation.overoptimisation_fit([1, 2], [1, 1], curve="log"), "curve is 'log'"),
        (lambda: evaluation.performance_gap_recovered(0.5, 0.6, 0.5), "no gap to recover"),
        (lambda: evaluation.hypervolume([[1, 2]], [0]), "one number an objective"),
    ],
)
def test_what_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()
