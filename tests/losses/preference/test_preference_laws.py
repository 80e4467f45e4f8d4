"""What holds for every preference loss on pairs. They are found by their annotation, with their variants."""

from __future__ import annotations

import inspect
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import losses
from jaxrl_llm.signatures import signature

PAIRS = 6
LENGTHS = np.array([5, 3, 1, 4, 5, 2, 3, 3, 4, 5, 2, 2])
# The first place is kept free: one test has a token there.
MASK = ((np.arange(6) > 0) & (np.arange(6) <= LENGTHS[:, None])).astype(np.float32)


def data():
    rng = np.random.default_rng(4)
    tokens = lambda: jnp.asarray(rng.uniform(-2.5, -0.1, MASK.shape), jnp.float32)  # noqa: E731
    return {
        **{f"{name}logprobs": tokens() for name in ("", "reference_", "previous_", "guide_")},
        "mask": jnp.asarray(MASK),
        "group": jnp.asarray(np.repeat([4, 0, 7, 2, 9, 1], 2)),
        "preferred": jnp.tile(jnp.array([1.0, 0.0]), PAIRS),
        "weight": jnp.ones(2 * PAIRS),
        "reward_scores": jnp.asarray(rng.normal(0, 1, 2 * PAIRS), jnp.float32),
    }


DATA = data()
POLICY = {"logprobs", "group", "preferred", "mask"}
# Losses of pairs with what else they take, as variants beside their defaults.
VARIANTS = {
    losses.dpo: [
        {"link": "robust", "label_smoothing": 0.1},
        {"link": "hinge"},
        {"link": "square"},
        {"link": "exo", "label_smoothing": 0.01},
        {"link": "discopop"},
        {"label_smoothing": 0.2},
        {"length_normalised": True},
        {"surplus": 0.5},
        {"surplus": 0.5, "length_normalised": True},
        {"surplus": 0.5, "divergence": "jensen_shannon"},
        {"length_penalty": 0.05},
        *({"divergence": name} for name in ("forward_kl", "jensen_shannon", "alpha")),
    ],
    losses.simpo: [{"alpha": 0.25}, {"length_normalised": False, "margin": 0.0}],
    losses.anchored_preference: [{"form": name} for name in ("nca", "bco", "sppo", "apo_down")],
    losses.optimal_transport: [{"paired": True}],
    losses.bradley_terry: [{"label_smoothing": 0.1}, {"centring": 0.1}, {"centring": 0.1, "form": "each"}],
    losses.gaussian_bradley_terry: [{"form": "expected"}],
}


def one_gaussian_head(reward_scores, group, preferred, weight, *, form="marginal"):
    """The loss on scores with means alone: all deviations are exp(-0.5)."""
    scores = jnp.stack([reward_scores, jnp.full_like(reward_scores, -0.5)], 1)
    return losses.gaussian_bradley_terry(scores, group, preferred, weight, form=form)


def pair_losses():
    """Every exported loss that tells the better answer from the worse one of a group by `preferred`."""
    found = {}
    for name in losses.__all__:
        member = getattr(losses, name)
        if not inspect.isfunction(member) or inspect.signature(member).return_annotation != "Loss":
            continue
        needs = set(signature(member).required)
        if {"group", "preferred"} <= needs <= set(DATA):
            called = one_gaussian_head if member is losses.gaussian_bradley_terry else member
            found[name] = called
            for hyper in VARIANTS.get(member, ()):
                found[f"{name} {hyper}"] = partial(called, **hyper)
    return found


CASES = pair_losses()
# Value of a pair where the policy is the reference, for the losses that compare with one.
AT_THE_REFERENCE = {
    "dpo": math.log(2),
    "token_guided": math.log(2),
    "optimal_transport": math.log(2),
    "anchored_preference": 1.0,
    "inpo": (1 / (2 * 0.0075)) ** 2,
    "dpo {'link': 'hinge'}": 1.0,
    "dpo {'link': 'square'}": 25.0,
    "dpo {'link': 'discopop'}": (math.log(2) + 1) / 2,
    "dpo {'link': 'exo', 'label_smoothing': 0.01}": -0.5 * math.log(0.99) - 0.5 * math.log(0.01) - math.log(2),
    "dpo {'length_penalty': 0.05}": None,
    "anchored_preference {'form': 'nca'}": 2 * math.log(2),
    "anchored_preference {'form': 'bco'}": 2 * math.log(2),
    "anchored_preference {'form': 'sppo'}": 50.0,
    "anchored_preference {'form': 'apo_down'}": 1.0,
}


def function_of(name):
    case = CASES[name]
    return (case.func, case.keywords) if isinstance(case, partial) else (case, {})


def given(name, data):
    needs = signature(function_of(name)[0])
    return {key: data[key] for key in (*needs.required, *needs.optional) if key in data}


@pytest.fixture(autouse=True, scope="module")
def quickly_compiled():
    """These tests wait for the compiler, and for next to nothing else."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


@jax.jit
def _every(cases):
    found = {}
    for name, values in cases.items():
        function, hyper = function_of(name)
        current = "logprobs" if "logprobs" in values else "reward_scores"

        def value(x, values=values, function=function, hyper=hyper, current=current):
            return function(**values | {current: x}, **hyper).value

        found[name] = jax.value_and_grad(value)(values[current])
    return found


def all_values(data):
    """name -> (value, slope by logprobs or scores) of every loss: one program for all of these tests."""
    return jax.device_get(_every({name: given(name, data) for name in CASES}))


@pytest.fixture(scope="module")
def plain():
    return all_values(DATA)


def test_the_laws_reach_the_losses():
    assert {"dpo", "simpo", "odds_ratio", "inpo", "token_guided", "anchored_preference", "bradley_terry"} <= set(CASES)
    assert len(CASES) >= 25


def test_where_the_policy_is_the_reference_a_pair_costs_what_it_says():
    at = DATA | {f"{name}logprobs": DATA["logprobs"] for name in ("reference_", "previous_", "guide_")}
    found = all_values(at)
    for name in CASES:
        if "reference_logprobs" not in given(name, DATA):
            continue
        expected = AT_THE_REFERENCE.get(name, math.log(2))
        if expected is not None:
            np.testing.assert_allclose(found[name][0], expected, rtol=1e-5, err_msg=name)


def test_swapping_the_sides_turns_the_first_slopes_round():
    """At the reference the better answer is pushed as the worse one was, in the losses that are a function of a gap."""
    at = {f"{name}logprobs": DATA["logprobs"] for name in ("", "reference_", "previous_", "guide_")}
    at["reward_scores"] = jnp.zeros(2 * PAIRS)
    ahead, back = (all_values(DATA | at | {"preferred": one}) for one in (DATA["preferred"], 1 - DATA["preferred"]))
    for name in CASES:
        # These push the two sides with unequal strength, or have a gap of lengths or likelihoods besides.
        if any(
            word in name
            for word in ("simpo", "odds_ratio", "length_penalty", "nca", "apo_down", "token_guided", "optimal")
        ):
            continue
        np.testing.assert_allclose(ahead[name][1], -back[name][1], rtol=2e-4, atol=1e-6, err_msg=name)
        assert np.abs(ahead[name][1]).max() > 0, name


def test_a_constant_on_both_sides_changes_losses_of_a_gap_alone_not_at_all(plain):
    """One token more in both answers, whatever it costs: the sums of both move by the same number."""
    more = {key: value.at[:, 0].set(-0.75) for key, value in DATA.items() if "logprobs" in key}
    more |= {"logprobs": DATA["logprobs"].at[:, 0].set(-2.0), "mask": DATA["mask"].at[:, 0].set(1.0)}
    shifted = all_values(DATA | more | {"reward_scores": DATA["reward_scores"] + 3.0})
    moved = set()
    for name in CASES:
        same = np.allclose(shifted[name][0], plain[name][0], rtol=2e-5, atol=2e-6)
        moved |= set() if same else {name.split(" ")[0] + ("" if "divergence" not in name else " divergence")}
    # The mean over tokens, one answer alone, another divergence and centring see it; nothing else does.
    assert moved == {"simpo", "odds_ratio", "anchored_preference", "dpo", "dpo divergence", "bradley_terry"}
    for name in ("dpo", "dpo {'link': 'square'}", "inpo", "optimal_transport", "bradley_terry", "token_guided"):
        np.testing.assert_allclose(shifted[name][0], plain[name][0], rtol=2e-5, err_msg=name)


def test_a_pair_that_is_wrong_by_fifty_is_still_pushed_with_a_finite_slope():
    """Unless the loss is made to give up on it. In bfloat16 tests/losses/test_laws.py has it."""
    push = jnp.where(DATA["preferred"][:, None] == 1, -50.0, -0.01) * jnp.ones(MASK.shape, jnp.float32)
    scores = jnp.where(DATA["preferred"] == 1, -50.0, 50.0).astype(jnp.float32)
    gives_up = ("anchored", "robust", "forward_kl", "jensen", "alpha", "exo", "transport")
    for name, (value, slope) in all_values(DATA | {"logprobs": push, "reward_scores": scores}).items():
        assert np.isfinite(value), name
        assert np.isfinite(slope).all(), name
        assert np.abs(slope).max() > 1e-4 or any(word in name for word in gives_up), name


def trl(better, worse, reference_better, reference_worse, length_better, length_worse, name, beta=0.1, e=0.1):
    """`DPOTrainer.dpo_loss` of TRL 1.16, a pair each, in float64."""
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    chosen, rejected = better - reference_better, worse - reference_worse
    delta = chosen - rejected
    log = np.log
    match name:
        case "sigmoid":
            return -log(sigmoid(beta * delta)) * (1 - e) - log(sigmoid(-beta * delta)) * e
        case "robust":
            return (-log(sigmoid(beta * delta)) * (1 - e) + log(sigmoid(-beta * delta)) * e) / (1 - 2 * e)
        case "hinge":
            return np.maximum(1 - beta * delta, 0)
        case "ipo":
            return (chosen / length_better - rejected / length_worse - 1 / (2 * beta)) ** 2
        case "exo_pair":
            q = sigmoid(beta * delta)
            return q * (log(q) - log(1 - e)) + (1 - q) * (log(1 - q) - log(e))
        case "nca_pair":
            one, two = beta * chosen, beta * rejected
            return -log(sigmoid(one)) - 0.5 * log(sigmoid(-one)) - 0.5 * log(sigmoid(-two))
        case "sppo_hard":
            return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
        case "bco_pair":
            return -log(sigmoid(beta * chosen)) - log(sigmoid(-beta * rejected))
        case "apo_zero":
            return 1 - sigmoid(beta * chosen) + sigmoid(beta * rejected)
        case "apo_down":
            return sigmoid(beta * chosen) + 1 - sigmoid(beta * delta)
        case "discopop":
            z = delta * beta
            gate = sigmoid(z / 0.05)
            return -log(sigmoid(z)) * (1 - gate) + np.exp(-z) * gate
        case "sigmoid_norm":
            return -log(sigmoid(beta * (chosen / length_better - rejected / length_worse)))
        case "aot_unpaired":
            z = beta * (np.sort(chosen) - np.sort(rejected))
            return -log(sigmoid(z)) * (1 - e) - log(sigmoid(-z)) * e
        case "aot":
            z = beta * (np.sort(better - worse) - np.sort(reference_better - reference_worse))
            return -log(sigmoid(z)) * (1 - e) - log(sigmoid(-z)) * e
        case "simpo":
            return -log(sigmoid(2.0 * (better / length_better - worse / length_worse) - 1.0))
        case "cpo":
            return -log(sigmoid(beta * (better - worse)))


OURS = {
    "sigmoid": partial(losses.dpo, label_smoothing=0.1),
    "robust": partial(losses.dpo, link="robust", label_smoothing=0.1),
    "hinge": partial(losses.dpo, link="hinge"),
    "ipo": partial(losses.dpo, link="square", length_normalised=True),
    "exo_pair": partial(losses.dpo, link="exo", label_smoothing=0.1),
    "discopop": partial(losses.dpo, link="discopop"),
    "sigmoid_norm": partial(losses.dpo, length_normalised=True),
    "nca_pair": partial(losses.anchored_preference, form="nca"),
    "sppo_hard": partial(losses.anchored_preference, form="sppo"),
    "bco_pair": partial(losses.anchored_preference, form="bco"),
    "apo_zero": losses.anchored_preference,
    "apo_down": partial(losses.anchored_preference, form="apo_down"),
    "aot": partial(losses.optimal_transport, paired=True, label_smoothing=0.1),
    "aot_unpaired": partial(losses.optimal_transport, label_smoothing=0.1),
    "simpo": losses.simpo,
    "cpo": partial(losses.simpo, beta=0.1, margin=0.0, length_normalised=False),
}


def test_every_loss_of_trl_on_random_tensors():
    sums = {
        key: np.asarray((DATA[key] * DATA["mask"]).sum(1), np.float64) for key in ("logprobs", "reference_logprobs")
    }
    sides = [sums[key][side::2] for key in ("logprobs", "reference_logprobs") for side in (0, 1)]
    lengths = LENGTHS[0::2], LENGTHS[1::2]

    def ours(data):
        return {
            name: function(**{key: data[key] for key in signature(getattr(function, "func", function)).required}).value
            for name, function in OURS.items()
        }

    found = jax.jit(ours)(DATA)
    for name in OURS:
        np.testing.assert_allclose(found[name], trl(*sides, *lengths, name).mean(), rtol=2e-6, err_msg=name)
