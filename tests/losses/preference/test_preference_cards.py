"""Preference losses: the worked example of each card, in one program; what holds for all of them."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import losses
from jaxrl_llm.losses.preference.dpo import surplus_sums

# Better and worse answers to four prompts: summed log-probabilities under policy and reference, and lengths.
LOGP_W, LOGP_L = [-12, -8.5, -20.25, -5], [-14.5, -7, -26, -5.5]
REF_W, REF_L = [-13, -9, -18.75, -6], [-13.5, -8, -24, -4]
LENGTH_W, LENGTH_L = [6, 4, 10, 3], [7, 4, 12, 2]
PREV_W, PREV_L = [-12.5, -9, -19, -5.5], [-14, -7.5, -25, -4.5]


def spread(first, second, width=12):
    """Rows of pairs that follow one another, a sum spread evenly over the tokens of its row."""
    sums, lengths = np.stack([first, second], 1).reshape(-1), np.stack([LENGTH_W, LENGTH_L], 1).reshape(-1)
    inside = np.arange(width) < lengths[:, None]
    return jnp.asarray(np.where(inside, sums[:, None] / lengths[:, None], 0), jnp.float32)


P = {
    "logprobs": spread(LOGP_W, LOGP_L),
    "reference_logprobs": spread(REF_W, REF_L),
    "previous_logprobs": spread(PREV_W, PREV_L),
    "group": jnp.array([9, 9, 0, 0, 4, 4, 1, 1]),
    "preferred": jnp.array([1.0, 0.0] * 4),
    "mask": (spread(np.ones(4), np.ones(4)) > 0).astype(jnp.float32),
    "rewards": jnp.array([0.9, 0.1, 0.4, 0.6, 0.6, 0.6, 0.75, 0.25]),
}
T_SAID = jnp.array([[-0.5, -1.25, -0.75, 0], [-2, -0.25, -1, -0.5]])
T_REFERENCE = jnp.array([[-0.75, -1, -1.25, 0], [-1.5, -0.5, -1, -1.5]])
T_MASK = jnp.array([[1.0, 1, 1, 0], [1, 1, 1, 1]])
T = {"logprobs": T_SAID, "reference_logprobs": T_REFERENCE, "mask": T_MASK, "win_share": jnp.array([0.8, 0.3])}
T_PAIRS = {
    "logprobs": jnp.stack([T_SAID[0], jnp.array([-1, -0.5, 0, 0]), T_SAID[1], jnp.array([-0.25, -0.75, -1.5, 0])]),
    "reference_logprobs": jnp.stack(
        [T_REFERENCE[0], jnp.array([-0.5, -0.75, 0, 0]), T_REFERENCE[1], jnp.array([-0.5, -0.5, -1, 0])]
    ),
    "guide_logprobs": jnp.array([[-0.25, -1.5, -0.25, 0], [-1.5, -1, 0, 0], [-1, -1, -0.5, -1], [-0.5, -1.5, -0.5, 0]]),
    "mask": jnp.array([[1.0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]),
    "group": jnp.array([0, 0, 1, 1]),
    "preferred": jnp.array([1.0, 0, 1, 0]),
}


def with_likelihood(function, coefficient, reduction, **hyper):
    """A loss of pairs and a multiple of the likelihood of the better answers."""

    def both(**data):
        first = partial(function, **hyper)(**{name: data[name] for name in data if name in NEEDS[function]})
        second = losses.preferred_likelihood(data["logprobs"], data["preferred"], data["mask"], reduction=reduction)
        return losses.Loss(first.value + coefficient * second.value, jnp.float32(1.0))

    return both


PAIRS = ("logprobs", "group", "preferred", "mask")
NEEDS = {losses.dpo: (*PAIRS, "reference_logprobs"), losses.simpo: PAIRS, losses.odds_ratio: PAIRS}
WITH_REFERENCE = (*PAIRS, "reference_logprobs")

# name: (function, names of the data, data, expected)
EXAMPLES = {
    "exo": (partial(losses.dpo, link="exo", label_smoothing=1e-3), WITH_REFERENCE, P, 2.571161),
    "discopop": (partial(losses.dpo, link="discopop", beta=0.05), WITH_REFERENCE, P, 0.856952),
    "f-dpo forward": (partial(losses.dpo, divergence="forward_kl"), WITH_REFERENCE, P, 0.588610),
    "f-dpo js": (partial(losses.dpo, divergence="jensen_shannon"), WITH_REFERENCE, P, 0.660965),
    "f-dpo alpha": (partial(losses.dpo, divergence="alpha", alpha=0.5), WITH_REFERENCE, P, 0.623291),
    "r-dpo": (partial(losses.dpo, length_penalty=0.05), WITH_REFERENCE, P, 0.653058),
    "nca": (partial(losses.anchored_preference, form="nca"), WITH_REFERENCE, P, 1.361565),
    "bco pair": (partial(losses.anchored_preference, form="bco"), WITH_REFERENCE, P, 1.334025),
    "sppo": (partial(losses.anchored_preference, form="sppo", beta=0.5), WITH_REFERENCE, P, 2.9375),
    "apo zero": (losses.anchored_preference, WITH_REFERENCE, P, 0.971928),
    "apo down": (partial(losses.anchored_preference, form="apo_down"), WITH_REFERENCE, P, 0.978254),
    "aot paired": (partial(losses.optimal_transport, paired=True), WITH_REFERENCE, P, 0.639004),
    "aot": (losses.optimal_transport, WITH_REFERENCE, P, 0.639471),
    "simpo": (losses.simpo, PAIRS, P, 1.126637),
    "alphapo": (partial(losses.simpo, beta=2.5, margin=0.1, alpha=0.25), PAIRS, P, 0.721635),
    "cpo": (
        with_likelihood(losses.simpo, 1.0, "token_mean", beta=0.1, margin=0.0, length_normalised=False),
        PAIRS,
        P,
        2.604574,
    ),
    "orpo": (
        lambda **data: losses.Loss(
            losses.preferred_likelihood(data["logprobs"], data["preferred"], data["mask"]).value
            + 0.1 * losses.odds_ratio(**data).value,
            jnp.float32(1.0),
        ),
        PAIRS,
        P,
        2.050683,
    ),
    "rpo": (with_likelihood(losses.dpo, 0.05 * 0.1, "sum"), WITH_REFERENCE, P, 0.697437),
    "inpo": (partial(losses.inpo, eta=0.5, tau=0.2), (*WITH_REFERENCE, "previous_logprobs"), P, 0.828125),
    "dno": (
        lambda **data: losses.dno(**data | {"previous_logprobs": data["previous_logprobs"]}),
        ("logprobs", "previous_logprobs", "rewards", "group", "mask"),
        P | {"previous_logprobs": P["reference_logprobs"]},
        0.678724,
    ),
    "nash-md": (losses.nash_md, ("logprobs", "reference_logprobs", "win_share", "mask"), T, 0.0125),
    "tgdpo": (losses.token_guided, (*WITH_REFERENCE, "guide_logprobs"), T_PAIRS, 0.642902),
}


# Sequential KL of the better answers 1, 1/2, 0.2, 0.3 and of the worse ones 1/2, 1, 0.4, 0.1: beside Delta the margin
# has 1/2 * [1/2, -1/2, -0.2, 0.2].
TDPO = P | {"over_vocabulary": spread([1, 0.5, 0.2, 0.3], [0.5, 1, 0.4, 0.1])}
TDPO_NAMES = (*WITH_REFERENCE, "over_vocabulary")
EXAMPLES["tdpo"] = (
    losses.sequential_divergence_preference(),
    TDPO_NAMES,
    TDPO,
    np.logaddexp(0, -0.1 * np.array([2.25, -0.75, 0.4, 2.6])).mean(),
)
EXAMPLES["tdpo, alpha 0"] = (losses.sequential_divergence_preference(alpha=0.0), TDPO_NAMES, TDPO, 0.640249)


def values(changed=lambda data: data):
    def all_of_them(data):
        return {
            name: function(**{key: changed(data[name])[key] for key in names}).value
            for name, (function, names, _, _) in EXAMPLES.items()
        }

    return jax.jit(all_of_them)({name: data for name, (_, _, data, _) in EXAMPLES.items()})


def test_worked_examples_in_one_program():
    found = values()
    for name, (*_, expected) in EXAMPLES.items():
        np.testing.assert_allclose(found[name], expected, rtol=2e-6, atol=1e-6, err_msg=name)


def test_what_padding_holds_and_rows_that_are_absent_change_nothing():
    def spoiled(data):
        made = {}
        for name, value in data.items():
            if name.endswith("logprobs"):
                value = jnp.where(data["mask"] > 0, value, jnp.nan)
            row = jnp.full((1, *value.shape[1:]), jnp.nan) if value.dtype == jnp.float32 else value[:1] + 20
            row = jnp.zeros((1, value.shape[1])) if name == "mask" else row
            made[name] = jnp.concatenate([value, row])
        return made

    found, expected = values(spoiled), values()
    for name in EXAMPLES:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)


def test_gradients_are_finite_at_margins_of_fifty_and_in_bfloat16():
    def slopes(scale):
        found = {}
        for name, (function, names, data, _) in EXAMPLES.items():
            given = {key: data[key] for key in names}

            def value(said, function=function, given=given):
                return function(**given | {"logprobs": said}).value

            slope = jax.grad(value)((data["logprobs"] * scale).astype(jnp.bfloat16)).astype(jnp.float32)
            found[name] = slope, jnp.where(data["mask"] > 0, 0.0, slope)
        return found

    compiled = jax.jit(slopes)
    for scale in (1.0, 60.0):
        for name, (slope, outside) in compiled(scale).items():
            assert np.isfinite(slope).all(), (name, scale)
            assert not np.asarray(outside).any(), name


def test_gradients_of_the_cards():
    slope = jax.grad(lambda said: losses.nash_md(said, T_REFERENCE, T["win_share"], T_MASK).value)(T_SAID)
    expected = [[-0.1375, -0.1625, -0.125, 0], [0.075, 0.1125, 0.1, 0.15]]
    np.testing.assert_allclose(slope, expected, rtol=1e-5)

    def guided(said):
        given = {name: value for name, value in T_PAIRS.items() if name != "logprobs"}
        return losses.token_guided(said, **given).value

    slope = jax.grad(guided)(T_PAIRS["logprobs"])[::2]
    expected = [[-0.024589, -0.023389, -0.025188, 0], [-0.024018, -0.022846, -0.024018, -0.024018]]
    np.testing.assert_allclose(slope, expected, atol=1e-6)


def test_sums_up_to_the_length_that_both_have():
    said = T_PAIRS["logprobs"]
    found = surplus_sums(said, T_PAIRS["mask"], 0.5)
    np.testing.assert_allclose([found[0, 1], found[2, 3]], [-2.125, -3.5])
    np.testing.assert_allclose([found[1, 0], found[3, 2]], [-1.5, -2.5])
    given = {name: value for name, value in T_PAIRS.items() if name != "guide_logprobs"}
    whole, all_of_it = losses.dpo(**given), losses.dpo(**given, surplus=1.0)
    assert whole.value == all_of_it.value
    assert losses.dpo(**given, surplus=0.5).value != whole.value
    # With what the score is divided by or is a function of: log-ratios 1/4 and -1/4, 1/4 and -1/2 of the two pairs.
    gaps = {"length_normalised": [0.25 / 3 + 0.25 / 2, 0.25 / 4 + 0.5 / 3], "divergence": []}
    shannon = lambda rho: math.log(2) - np.logaddexp(0, -rho)  # noqa: E731
    gaps["divergence"] = [shannon(0.25) - shannon(-0.25), shannon(0.25) - shannon(-0.5)]
    for hyper, value in (("length_normalised", True), ("divergence", "jensen_shannon")):
        found = losses.dpo(**given, surplus=0.5, **{hyper: value}).value
        np.testing.assert_allclose(found, np.logaddexp(0, -0.1 * np.array(gaps[hyper])).mean(), rtol=1e-6)


def test_a_pair_that_is_wrong_by_thousands_is_still_pushed():
    """exp(-z) has no number there; the gate of discopop, which multiplies it, is 0."""
    said = jnp.array([[-3000.0], [-1.0]])
    given = {"group": jnp.zeros(2, int), "preferred": jnp.array([1.0, 0]), "mask": jnp.ones((2, 1))}
    loss = lambda x: losses.dpo(x, jnp.zeros((2, 1)), **given, link="discopop").value  # noqa: E731
    value, slope = jax.value_and_grad(loss)(said)
    np.testing.assert_allclose(value, 299.9, rtol=1e-5)
    np.testing.assert_allclose(slope, [[-0.1], [0.1]], rtol=1e-5)


def test_weights_of_pairs_by_how_likely_the_policy_is_to_write_them():
    collision = jnp.log(jnp.array([[0.5, 0.25, 0.4, 1], [0.2, 0.6, 0.3, 0.5]]))
    weight = losses.off_policy_weight(T_SAID, collision, T_MASK)
    np.testing.assert_allclose(weight, [1.179681, 1.069131], rtol=1e-6)
    log_p = jax.nn.log_softmax(jnp.array([[[1.0, 0, -1]]]))
    np.testing.assert_allclose(
        losses.log_collision_probability(log_p, jnp.zeros((1, 1))), jnp.log((jnp.exp(log_p) ** 2).sum(-1)), rtol=1e-6
    )
    given = {name: P[name] for name in WITH_REFERENCE}
    twice = losses.dpo(**given, pair_weight=jnp.full(8, 2.0))
    np.testing.assert_allclose(twice.value, 4 * losses.dpo(**given).value, rtol=1e-6)


def test_single_answers_and_their_running_shift():
    method = losses.running_shift(beta=0.1)
    given = (P["logprobs"], P["reference_logprobs"], P["mask"], jnp.ones(8))
    shift, memory = method.update(method.init(), *given)
    np.testing.assert_allclose(shift, np.full(8, -0.03125), rtol=1e-5)
    found = losses.binary_classifier(P["logprobs"], P["reference_logprobs"], P["preferred"], P["mask"], shift)
    np.testing.assert_allclose(found.value, 0.666891, rtol=1e-5)
    moved = losses.binary_classifier(
        P["logprobs"], P["reference_logprobs"], P["preferred"], P["mask"], shift + 0.3, beta=0.1
    )
    assert moved.value != found.value
    again, memory = method.update(memory, *given)
    np.testing.assert_allclose(again, shift, rtol=1e-5)
    assert memory["count"] == 16


def test_calibration_samples_shift_the_loss():
    said, reference = jnp.array([[-10.0], [-11], [-3]]), jnp.array([[-10.5], [-10], [-3]])
    term = losses.sample_log_ratio(said, reference, jnp.array([1.0, 1, 0]), jnp.ones((3, 1)))
    np.testing.assert_allclose(0.5 * 0.1 * term.value * 10, -0.125, rtol=1e-6)  # alpha beta mean = -0.0125
    assert term.denominator == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: losses.dpo(**d, link="exo"), "label_smoothing is 0, where link 'exo' is infinite"),
        (lambda d: losses.dpo(**d, divergence="chi"), "divergence is 'chi'; it must be one of reverse_kl"),
        (lambda d: losses.anchored_preference(**d, form="ipo"), "form is 'ipo'; it must be one of nca"),
        (lambda d: losses.inpo(**d, previous_logprobs=d["logprobs"], eta=0.1, tau=0.2), "tau is 0.2 and eta is 0.1"),
    ],
)
def test_what_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call({name: P[name] for name in WITH_REFERENCE})


def test_the_divergence_of_tdpo_is_exact_and_has_the_gradient_of_its_form():
    log_p, log_q = (jax.nn.log_softmax(jnp.array(x)) for x in ([[1.0, 0, -2]], [[0.5, 0.5, -jnp.inf]]))
    loss = losses.sequential_divergence_preference()
    expected = np.log(0.5) - np.asarray(log_p)[0, :2].mean()
    np.testing.assert_allclose(loss.over_vocabulary(log_p, log_q), [expected], rtol=1e-6)

    def slope(form, alpha):
        given = {name: TDPO[name] for name in TDPO_NAMES if name != "over_vocabulary"}
        function = losses.sequential_divergence_preference(form=form, alpha=alpha)
        return jax.grad(lambda k: function(over_vocabulary=k, **given).value)(TDPO["over_vocabulary"])

    better = np.asarray(P["preferred"])[:, None] * np.asarray(P["mask"])
    one, two = slope("both", 1.0), slope("worse", 1.0)
    assert np.all(np.asarray(one)[better > 0] < 0)  # TDPO1 moves the policy away along better answers
    np.testing.assert_array_equal(np.asarray(two)[better > 0], 0)
    np.testing.assert_allclose(np.where(better > 0, 0, one), two)
    with pytest.raises(ValueError, match="form is 'tdpo2'; it must be one of both, worse"):
        losses.sequential_divergence_preference(form="tdpo2")


def test_without_a_judge_the_row_wins_against_its_opponent():
    """SPIN: demonstrations against the last policy; DPO of the two."""
    said, reference = P["logprobs"], P["reference_logprobs"]
    found = losses.exploratory_preference(
        said[::2], reference[::2], said[1::2], reference[1::2], P["mask"][::2], P["mask"][1::2], alpha=0.0
    )
    np.testing.assert_allclose(found.value, 0.640249, rtol=2e-6)


def test_margins_as_weights_need_margins():
    with pytest.raises(ValueError, match="margin_use is 'weight', but no pair has a margin; give the file a column"):
        losses.bradley_terry(jnp.zeros(2), jnp.zeros(2, int), jnp.array([1.0, 0]), jnp.ones(2), margin_use="weight")


def test_views_of_demonstrations_and_of_fixed_answers():
    prompt, start = jnp.array([[0, 7, 8], [5, 6, 7]]), jnp.array([2, 3])
    tokens, length = jnp.array([[3, 2, 0], [4, 3, 2]]), jnp.array([2, 3])
    shown = losses.demonstrated(prompt, start, tokens, length)
    np.testing.assert_array_equal(shown.mask, [[1, 1, 0], [1, 1, 1]])
    encode = lambda text: [10 + int(letter) for letter in text]  # noqa: E731
    view = losses.followed_by(prompt, start, tokens, length, says="1", question="90", encode=encode)
    np.testing.assert_array_equal(view.prompt_length, [6, 8])
    asked = [row[-n:].tolist() for row, n in zip(np.asarray(view.prompt_tokens), [6, 8], strict=True)]
    assert asked == [[7, 8, 3, 2, 19, 10], [5, 6, 7, 4, 3, 2, 19, 10]]
    np.testing.assert_array_equal(view.tokens, [[11], [11]])
    np.testing.assert_array_equal(view.mask, [[1], [1]])
    plain = losses.followed_by(prompt, start, tokens, length, says="1", encode=encode)
    assert plain.prompt_length.tolist() == [4, 6]
    with pytest.raises(ValueError, match="says is '', which has no tokens"):
        losses.followed_by(prompt, start, tokens, length, says="", encode=encode)
