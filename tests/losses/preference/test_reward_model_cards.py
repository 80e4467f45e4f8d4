"""Losses of reward models, and RL against them: the worked examples of the cards in one program, and laws."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import advantages, evaluation, losses, rewards, schedules, selection
from jaxrl_llm.data.label_denoising import label_actions, preference_strength

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

PIT = {
    # Better and worse answers of two pairs: after the other answer, and after themselves.
    "reward_partner_scores": jnp.array([1.5, -1, 0.2, 0.3]),
    "reward_itself_scores": jnp.array([0.1, -0.2, 0, 0.1]),
    "group": jnp.array([0, 0, 1, 1]),
    "preferred": jnp.array([1.0, 0, 1, 0]),
    "weight": jnp.ones(4),
}
REGRET = {
    "reward_values": jnp.array([[-1.0, -1], [-1, 0], [0, 1], [0.5, 0]]),
    "values": jnp.array([[5.0, 9], [5, 9], [2, 9], [2, 9]]),
    "end_values": jnp.array([7.0, 4, 0.5, 1.5]),
    "mask": jnp.ones((4, 2)),
    "group": jnp.array([0, 0, 1, 1]),
    "preferred": jnp.array([1.0, 0, 1, 0]),
}
SCORED = {"logprobs": jnp.array([[-0.5, -2, -0.1]]), "mask": jnp.ones((1, 3))}
# The first sequence of the fixture against the second, with a chosen answer of the opponent.
XPO = {
    "logprobs": jnp.array([[-12.0], [-7], [-20.25], [-5]]),
    "reference_logprobs": jnp.array([[-13.0], [-8], [-18.75], [-6]]),
    "opponent_logprobs": jnp.array([[-14.5], [-8.5], [-26], [-5.5]]),
    "reference_opponent_logprobs": jnp.array([[-13.5], [-9.0], [-24], [-4]]),
    "mask": jnp.ones((4, 1)),
    "opponent_mask": jnp.ones((4, 1)),
    "win_share": jnp.array([1.0, 0, 1, 1]),
}
CRITIC = {
    "verdict": jnp.array([1, 1, 0, 0, jnp.nan, 1, 0]),
    "original_correct": jnp.array([1, 0, 0, 1, 1, 1, 0.0]),
    "refined_correct": jnp.array([1, 1, 1, 1, 1, 0, 0.0]),
}

# name: (function, data, expected); the value of a loss, or the array.
EXAMPLES = {
    "pit": (losses.gap_relations, PIT, 1.970835 * 2),
    "regret": (losses.regret_preference, REGRET, -np.log(0.880797) - np.log(0.377541)),
    # only by the sums of rewards: -2 against -1, and 1 against 0.5
    "regret, without values": (
        losses.regret_preference,
        {name: REGRET[name] for name in ("reward_values", "mask", "group", "preferred")},
        -np.log(0.268941) - np.log(0.622459),
    ),
    "moss, contrast": (
        partial(losses.sentence_contrast, temperature=0.5),
        {"contrast_scores": jnp.array([[1.0, 0], [0, 1], [1, 1], [7, 7]]), "own_place": jnp.arange(4)}
        | {"candidates": jnp.array([[1, 0.2], [0.1, 1], [0.8, 1], [0, 0]])}
        | {"weight": jnp.array([1.0, 1, 1, 0])},
        0.662494 * 3,
    ),
    "moss, spread": (
        losses.score_spread,
        {
            "reward_scores": jnp.array([[1.0, 1], [0, 0.5], [-1, 0], [0.2, 0], [0.4, 1], [1, -1]])
            @ jnp.array([0.5, -0.25])
        }
        | {"mask": jnp.ones((6, 1)), "group": jnp.array([4, 4, 4, 1, 1, 1])},
        0.416547 * 2,
    ),
    "unlikelihood": (
        partial(losses.unlikelihood, threshold=0.75),
        SCORED | {"rating": jnp.array([[1, 0.2, 0.7]])},
        0.999194 * 3,
    ),
    "unlikelihood, soft": (
        losses.unlikelihood,
        SCORED | {"rating": jnp.array([0.5])},
        sum(0.5 * -x - 0.5 * np.log1p(-np.exp(x)) for x in (-0.5, -2, -0.1)),
    ),
    "awr": (
        losses.advantage_weighted_likelihood,
        SCORED | {"rating": jnp.array([[0, -0.8, -0.3]]), "values": jnp.full((1, 3), -0.2)},
        0.368135 * 3,
    ),
    "rwr": (
        losses.reward_weighted_likelihood,
        SCORED | {"rating": jnp.array([[0.2, -0.6, -0.1]])},
        0.599603 * 3,
    ),
    # DPO of the same pairs (the opponent wins the second), and its log-probability.
    "xpo": (partial(losses.exploratory_preference, alpha=0.01), XPO, 4 * 0.640249 + 0.01 * (-14.5 - 8.5 - 26 - 5.5)),
    "critique, verdict": (partial(rewards.critique_reward, form="verdict"), CRITIC, [1, -1, 1, -1, -1, 1, 1]),
    "critique": (rewards.critique_reward, CRITIC, [1.2, -1, 1.2, -1, -1, 0.2, 0.2]),
    "critique, delta": (partial(rewards.critique_reward, form="delta"), CRITIC, [0.2, -1, 1.2, -1, -1, -0.8, 0.2]),
    "critique, correct": (partial(rewards.critique_reward, form="correct"), CRITIC, [0.4, -1, 1.2, -1, -1, 0.2, 0.2]),
    "urpo": (
        rewards.ranking_agreement,
        {"quality": jnp.array([8.0, 5, 6, 2]), "rewards": jnp.array([4.0, 3, 2, 1]), "group": jnp.zeros(4, int)}
        | {"weight": jnp.ones(4)},
        [1, 1 / 3, 1 / 3, 1],  # the mean is tau-a, 2/3
    ),
    "helpsteer": (
        partial(rewards.attribute_reward, weights=(0.65, 0.8, 0.45)),
        {"reward_scores": jnp.array([[3.5, 2, 4], [1, 0.5, 2]])},
        [5.675, 1.95],
    ),
    "preflexor": (
        partial(losses.answer_part, marker_id=9),
        {
            "tokens": jnp.array([[5, 9, 6, 9, 7], [1, 2, 3, 4, 5]]),
            "mask": jnp.array([[0.0, 1, 1, 1, 1], [0, 0, 1, 1, 0]]),
        },
        [[0, 0, 0, 1, 1], [0, 0, 1, 1, 0]],
    ),
    "kepo gate": (
        losses.rewarded_part,
        {"rewards": jnp.array([2.0, 0, 1]), "mask": jnp.array([[1.0, 1], [1, 1], [1, 0]]), "weight": jnp.ones(3)},
        [[1, 1], [0, 0], [1, 0]],
    ),
    "goal quality": (
        losses.goal_quality,
        {"goal_values": jnp.array([[[1.0, 0], [0, 1], [1, 1]]]), "goal": jnp.ones(2), "mask": jnp.ones((1, 3))},
        [[0.707107, 0.707107, 1.0]],
    ),
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
    "threshold": (
        selection.by_threshold,
        {"rewards": jnp.array([6.0, 3, 5, 5]), "group": jnp.zeros(4, int), "weight": jnp.ones(4)},
        [1, 0, 1, 1],
    ),
    "no good answer": (
        selection.by_threshold,
        {"rewards": jnp.array([4.0, 3, jnp.nan]), "group": jnp.zeros(3, int), "weight": jnp.ones(3)},
        [-1, -1, -1],
    ),
    "margins": (
        selection.reward_gap,
        GROUPED | {"preferred": jnp.array([-1.0, 1, 0, 1])},
        [1.1, 1.1, 1.1, 1.1],
    ),
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
    """A row of weight 0 with arbitrary values, in a separate group, so that it is in no pair."""

    def longer(data):
        n = len(data["weight"])
        made = {}
        for name, value in data.items():
            fill = 0 if name == "weight" or value.dtype.kind in "ib" else jnp.nan
            # An id below B, as segment reductions require.
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
    assert slopes["attributes"][0, 2] == 0  # without a rating
    np.testing.assert_allclose(slopes["plackett-luce"][:3].sum(), 0.0, atol=1e-6)  # invariant to a shift


def _largest(jaxpr):
    """Entries of the largest array of a program and of the programs inside it."""
    is_jaxpr = lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")  # noqa: E731
    leaves = [leaf for e in jaxpr.eqns for leaf in jax.tree.leaves(e.params, is_leaf=is_jaxpr) if is_jaxpr(leaf)]
    inside = [_largest(getattr(leaf, "jaxpr", leaf)) for leaf in leaves]
    return max([*inside, *(math.prod(v.aval.shape) for e in jaxpr.eqns for v in e.outvars)], default=0)


def test_what_compares_all_rows_or_tokens_holds_few_of_them_at_once():
    """The gradient, too: 2048 rows in groups of 4, or 16 rows of 64 tokens."""
    rows, group = jnp.zeros(2048), jnp.arange(2048) // 4
    spread = lambda r: losses.score_spread(r, jnp.ones((2048, 1)), group).value  # noqa: E731
    assert _largest(jax.make_jaxpr(jax.grad(spread))(rows).jaxpr) <= 64 * 2048
    blend = schedules.implicit_blend(primary="a", reward_names=("a", "b"), form="preferences", inner_steps=2)
    given = jnp.zeros((2048, 2)), jnp.zeros((2048, 4)), group, jnp.ones(2048), jnp.int32(0)
    assert _largest(jax.make_jaxpr(blend.update)(blend.init(), *given).jaxpr) <= 64 * 2048
    assert losses.embeddings_of_all(jnp.ones((2048, 4)), jnp.ones(2048))[0].shape == (2048, 4)
    states, label = jnp.zeros((16, 64, 8)), jnp.tile(jnp.array([1.0, 0]), 8)
    goal = lambda h: losses.goal_contrast(h, jnp.ones((16, 64)), group[:16] // 2, label, jnp.ones(16)).value  # noqa: E731
    assert _largest(jax.make_jaxpr(jax.grad(goal))(states).jaxpr) <= 4 * 64 * 64


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
    # Calibrated: p = 3/4, and three of four pairs are in order.
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


# ---- models of two answers, embeddings, bilevel learning, wrong labels ----------------------------------------------


def test_a_view_of_two_answers_has_the_partner_s_in_front():
    rows = {
        "prompt_tokens": jnp.array([[0, 7], [0, 7], [8, 9], [8, 9]]),
        "prompt_length": jnp.array([1, 1, 2, 2]),
        "tokens": jnp.array([[1, 2, 0], [3, 0, 0], [4, 5, 6], [5, 2, 0]]),
        "length": jnp.array([2, 1, 3, 2]),
    }
    pairs = {"group": jnp.array([0, 0, 1, 1]), "preferred": jnp.array([1.0, 0, 1, -1]), "weight": jnp.ones(4)}
    made = losses.beside_partner(**rows, **pairs)
    np.testing.assert_array_equal(made.prompt_tokens[:2], [[0, 0, 0, 7, 3], [0, 0, 7, 1, 2]])
    np.testing.assert_array_equal(made.prompt_length[:2], [2, 3])
    np.testing.assert_array_equal(made.mask, [[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]])  # the others are not pairs
    own = losses.beside_itself(**rows)
    np.testing.assert_array_equal(own.prompt_tokens[2], [8, 9, 4, 5, 6])
    np.testing.assert_array_equal(own.tokens, rows["tokens"])


def test_a_gap_that_is_a_difference_has_all_four_relations_where_the_better_answer_scores_more():
    def of(better, worse):
        crossed, zero = jnp.array([better - worse, worse - better]), jnp.zeros(2)
        return losses.gap_relations(crossed, zero, jnp.zeros(2, int), jnp.array([1.0, 0]), jnp.ones(2))

    assert of(8.0, -8.0).value < 1e-2 < of(0.0, 0.0).value
    np.testing.assert_allclose(of(1.0, 1.0).value, 4 * np.log(2), rtol=1e-6)


def test_states_of_a_better_answer_point_to_its_goal_and_padding_does_not():
    rng = np.random.default_rng(0)
    states, mask = jnp.asarray(rng.normal(0, 1, (4, 3, 2)), jnp.float32), jnp.array([[1.0, 1, 1], [1, 1, 0]] * 2)
    pairs = (jnp.array([0, 0, 1, 1]), jnp.array([1.0, 0, 1, 0]), jnp.ones(4))
    found = losses.goal_contrast(states, mask, *pairs)
    spoiled = losses.goal_contrast(jnp.where(mask[..., None] > 0, states, 99.0), mask, *pairs)
    np.testing.assert_allclose(spoiled.value, found.value, rtol=1e-6)
    # By the definition, pair by pair: two uniform draws, the smaller is the source.
    total = 0.0
    for better, worse in ((0, 1), (2, 3)):
        unit = [np.asarray(states[row][: int(mask[row].sum())]) for row in (better, worse)]
        unit = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in unit]
        sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
        draws = np.sort(rng.random((200_000, 2)), axis=1)
        other = rng.permutation(draws[:, 1])  # every source is compared with every goal
        place = lambda u, one: np.minimum((u * len(one)).astype(int), len(one) - 1)  # noqa: E731
        same = sigmoid((unit[0][place(draws[:, 0], unit[0])] * unit[0][place(other, unit[0])]).sum(1)).mean()
        away = sigmoid(unit[0] @ unit[1].T).mean()
        total += -np.log(same) - np.log(1 - away)
    np.testing.assert_allclose(found.value, total / 2, rtol=3e-3)


BLEND = jnp.array([[1, 0.2], [0.5, 1], [0, 0.6]])


def solved(reward_of, outer, lam=0.5):
    def lower(outer, theta):
        return jax.nn.softmax(theta) @ reward_of(outer) - lam / 2 * jnp.sum(theta**2)

    def one(theta, _):
        return theta + jax.grad(lower, argnums=1)(outer, theta), None

    return lower, jax.lax.scan(one, jnp.zeros(3), None, length=300)[0]


def test_implicit_gradients_of_the_cards_and_that_they_are_those_of_solving_again():
    primary = jnp.array([1, 0.5, 0])
    reward = lambda phi: BLEND @ phi  # noqa: E731
    labels = jax.nn.sigmoid(jnp.array([1.0, 0, 0.5])[:, None] - jnp.array([1.0, 0, 0.5])[None])

    def barfi(phi, theta):
        return jax.nn.softmax(theta) @ primary

    def parl(nu, theta):
        gap = reward(nu)[:, None] - reward(nu)[None]
        loss = -labels * jax.nn.log_sigmoid(gap) - (1 - labels) * jax.nn.log_sigmoid(-gap)
        pi = jax.nn.softmax(theta)
        return pi @ loss @ pi

    for upper, outer, value, expected in (
        (barfi, jnp.array([0.5, 1.0]), 0.506889, [0.068980, -0.031357]),
        (parl, jnp.array([0.2, 0.4]), 0.714949, [-0.033307, 0.082604]),
    ):
        lower, theta = solved(reward, outer)
        gradient, rest = schedules.implicit_gradient(lower, upper, outer, theta)
        np.testing.assert_allclose(upper(outer, theta), value, atol=1e-5)
        np.testing.assert_allclose(gradient, expected, atol=1e-5)
        assert rest < 1e-5

        def again(outer, upper=upper):
            return upper(outer, solved(reward, outer)[1])

        np.testing.assert_allclose(gradient, jax.grad(again)(outer), atol=1e-4)


def test_strength_of_preferences_and_what_is_done_about_weak_ones():
    better, worse = (
        [[1, 0.2, -0.5], [0.5, 0.8, -0.1], [1.5, 0.5, -0.9]],
        [[0.4, 0.6, -0.2], [0.1, 0.9, -0.3], [0.2, 0.4, -0.4]],
    )
    mean, deviation = preference_strength(better, worse)
    np.testing.assert_allclose(mean, [0.766667, -0.133333, -0.2], atol=1e-6)
    np.testing.assert_allclose(deviation, [0.385861, 0.205480, 0.294392], atol=1e-6)
    actions = label_actions([0.5, -1.2, 0.1, 2, -0.3, 0.9, 0, 1.5, -0.1, 0.7])
    assert [("keep", "smooth", "flip").index(one) for one in actions] == [0, 2, 0, 0, 1, 0, 0, 0, 1, 0]
    assert "flip" not in label_actions([0.1, 0.2], flip=0.5, smooth=1.0)
    with pytest.raises(ValueError, match=r"better has the shape \(3, 3\) and worse \(2, 3\)"):
        preference_strength(better, worse[:2])
    with pytest.raises(ValueError, match=r"flip is 0.5 and smooth is 0.1; 0 <= flip <= smooth"):
        label_actions([1.0], flip=0.5, smooth=0.1)


def test_judges_by_a_reference_and_verdicts_of_the_policy():
    items = [{"answer": "42"}] * 3
    won = rewards.closer_than_opponent(["42", "40", "4"], ["41", "42", None], items)
    assert won == [1.0, 0.0, None]
    assert rewards.closer_than_opponent(["42"], ["42"], items[:1]) == [0.5]
    assert rewards.verdict_question(["p{completion}"], ["c{prompt}"], question="{prompt}|{completion}") == [
        "p{completion}|c{prompt}"
    ]
    with pytest.raises(ValueError, match=r"question is 'right', without \{completion\}"):
        rewards.verdict_question(["p"], ["c"], question="right")
    said = rewards.verdict_agreement(["yes", " no", "maybe", None], [1.0, 0.0, 1.0, 1.0])
    assert said == [1.0, 1.0, 0.0, None]
    with pytest.raises(ValueError, match="weights has 2 numbers, but the head has 3 outputs"):
        rewards.attribute_reward(jnp.ones((1, 3)), weights=(1.0, 2.0))
    # The card's verdicts, from text; one that is stated twice is missing.
    texts = [f"<t>1+1=2</t><a>{one}</a>" for one in "YY"] + ["<a>N</a><a>N</a>", "<a> N </a>"]
    verdicts = rewards.stated_verdict(texts)
    assert verdicts == [1.0, 1.0, None, 0.0]
    assert rewards.stated_verdict(["T", "F", None, "<a>T</a>"], right="T", wrong="F", tags=None) == [1, 0, None, None]
    assert rewards.right_verdict([*texts, "<a>Y</a>"], ["Y", "N", "N", "N", "7"]) == [1.0, 0.0, 0.0, 1.0, None]
    paid = rewards.critique_reward(jnp.array([1, 1, jnp.nan, 0]), jnp.array([1.0, 0, 0, 0]), form="verdict")
    np.testing.assert_array_equal(paid, [1, -1, -1, 1])
    with pytest.raises(ValueError, match="form is 'delta', which needs refined_correct; fill it first"):
        rewards.critique_reward(jnp.ones(1), jnp.ones(1), form="delta")
    with pytest.raises(ValueError, match="form is 'gain'; it must be one of verdict, refine"):
        rewards.critique_reward(jnp.ones(1), jnp.ones(1), jnp.ones(1), form="gain")


def test_rewards_count_more_after_a_step_that_pushed_out_the_front():
    names = ("right", "short")
    method = rewards.hypervolume_guided(objectives=names, reference=(0.0, 0.0), reward_names=names, every_steps=2)
    memory = method.init() | {"points": jnp.zeros((32, 2)).at[0].set(jnp.array([0.3, 0.2])), "count": jnp.int32(1)}
    # The card's buffer and point, relative to its reference point and with the second objective negated.
    components = jnp.array([[0.3, 0.2], [0.5, 0.4], [9.0, 9.0]])
    given = (jnp.ones(3), components, jnp.array([1.0, 1, 0]))
    scaled, memory = jax.jit(method.update)(memory, *given, jnp.int32(2))
    gain = 0.4 * 0.3 - 0.3 * 0.2
    np.testing.assert_allclose(scaled, np.full(3, 0.5 + 1.5 * np.tanh(gain)), rtol=1e-6)
    assert memory["count"] == 2
    for step, expected in ((3, scaled[0]), (4, 0.5)):  # it is constant until the next point, which adds nothing
        again, memory = jax.jit(method.update)(memory, *given, jnp.int32(step))
        np.testing.assert_allclose(again, np.full(3, expected), rtol=1e-6)
    assert memory["count"] == 2
    np.testing.assert_allclose(0.5 + 1.5 * np.tanh(0.09), 0.634637, atol=1e-6)
    points = np.random.default_rng(0).random((6, 3)).astype(np.float32)
    found = rewards.dominated_volume(jnp.asarray(points), jnp.arange(6) < 5)
    np.testing.assert_allclose(found, evaluation.hypervolume(points[:5], [0, 0, 0]), rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"objectives are \['right', 'short'\] and reference \[0.0\]; give one to three"
    ):
        rewards.hypervolume_guided(objectives=names, reference=(0.0,), reward_names=names)
