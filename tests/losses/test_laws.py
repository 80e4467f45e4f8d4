"""What must hold for every loss: it is a sum and a count, and absent things are absent.

Losses are found by their annotation, so a loss that `jaxrl_llm.losses` exports is held to the laws from its first day.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import losses
from jaxrl_llm.experience import Source
from jaxrl_llm.signatures import signature

# Four rows of at most five tokens are a part of the batch; so its second half and last columns are what a part lacks.
ROWS, TOKENS, PART, PART_TOKENS = 8, 8, 4, 5
LENGTHS = np.array([5, 3, 1, 4, 5, 2, 0, 3])
WEIGHTS = np.array([1.0, 1.0, 0.5, 2.0, 1.0, 0.0, 1.0, 1.0])
# What a loss differentiates.
CURRENT = ("logprobs", "entropy", "values", "over_vocabulary", "token_reward_logits")


def batch():
    rng = np.random.default_rng(0)

    def tokens(low, high):
        return rng.uniform(low, high, (ROWS, TOKENS))

    old = tokens(-2.5, -0.1)
    rewards = rng.integers(0, 2, ROWS)
    rewards[:3] = 1, 0, 1  # right and wrong answers in one group
    inside = np.arange(TOKENS) < LENGTHS[:, None]
    data = {
        "old_logprobs": old,
        "logprobs": np.minimum(old + tokens(-0.7, 0.7), -1e-3),
        "reference_logprobs": np.minimum(old + tokens(-0.5, 0.5), -1e-3),
        "teacher_logprobs": np.minimum(old - 0.4 * np.sin(9 * old), -1e-3),
        "behaviour_logprobs": np.minimum(old + tokens(-0.1, 0.1), -1e-3),
        "advantages": tokens(-2.0, 2.0),
        "entropy": tokens(0.0, 3.0),
        "old_entropy": tokens(0.0, 3.0),
        "behaviour_entropy": tokens(0.0, 3.0),
        "values": tokens(-1.0, 1.0),
        "old_values": tokens(-1.0, 1.0),
        "returns": tokens(-1.0, 1.0),
        "over_vocabulary": tokens(0.0, 1.0),
        "token_weight": tokens(0.5, 1.5),
        "mask": inside * WEIGHTS[:, None],
        "weight": WEIGHTS,
        "proxy_logprobs": old + 0.3 * np.cos(np.arange(TOKENS)),
        "entropy_history": 0.2 + np.abs(old),
        "global_advantages": np.cos(7 * old),
        "token_reward_logits": 3 * np.sin(5 * old),
        "rewards": rewards,
        "correct": rewards,
        "preferred": rewards,
        "kl_anchor": np.full(ROWS, 0.25),
    }
    whole_numbers = {
        "length": LENGTHS,
        "tokens": rng.integers(0, 9, (ROWS, TOKENS)),
        "source": inside,
        "turn": np.zeros((ROWS, TOKENS)),
        # Rows of one group stand together, so that the splits below cut between groups.
        "group": [0, 0, 0, 3, 4, 4, 4, 4],
    }
    data = {name: np.asarray(value, np.float32) for name, value in data.items()}
    data |= {name: np.asarray(value, np.int32) for name, value in whole_numbers.items()}
    return data | {"truncated": np.zeros(ROWS, bool)}


DATA = batch()


def returns_loss(function):
    annotation = inspect.signature(function).return_annotation
    return annotation == "Loss" or getattr(annotation, "__name__", None) == "Loss"


def exported_losses():
    found = {}
    for name in losses.__all__:
        member = getattr(losses, name)
        if not inspect.isfunction(member) or name == "aggregate" or not returns_loss(member):
            continue
        needs_hyper = any(
            p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in inspect.signature(member).parameters.values()
        )
        # Only what the step provides; parts of losses that take other arguments are tested where they belong.
        if not needs_hyper and set(signature(member).required) <= set(DATA):
            found[name] = member
    return found


def variant(function, **hyper):
    return functools.partial(function, **hyper)


def mixed_sources(logprobs, old_logprobs, advantages, tokens, mask):
    source = jnp.where(tokens % 2 == 0, Source.DEMONSTRATION, Source.SAMPLED)
    return losses.external_surrogate(logprobs, old_logprobs, advantages, source, mask)


def rehearsal(logprobs, reference_logprobs, mask):
    return losses.rehearsal_divergence()(logprobs, reference_logprobs, mask)


def likelihood(logprobs, mask):
    return losses.stored_likelihood(logprobs, mask)


def several_outputs(function):
    """A loss of a value head with two outputs, which differ by a constant."""

    def two(values, returns, mask):
        return function(jnp.stack([values, values + 0.5], axis=-1), returns, mask)

    return two


CASES = exported_losses() | {
    "quantile_value": several_outputs(losses.quantile_value),
    "several_values": several_outputs(losses.several_values),
    "external_surrogate/mixed_sources": mixed_sources,
    "external_surrogate/clipped": variant(
        losses.external_surrogate,
        clip_low=0.2,
        clip_high=0.28,
        aggregation="token_sum_const",
        max_completion_tokens=8,
    ),
    "rehearsal_divergence": rehearsal,
    "stored_likelihood": likelihood,
    "protected_surrogate/tight_clip": variant(losses.protected_surrogate, clip_low=0.2, clip_high=0.28),
    "entropy_band/deviation": variant(losses.entropy_band, selection="otsu", band="deviation"),
    "policy_gradient/seq_mean_token_sum": variant(losses.policy_gradient, aggregation="seq_mean_token_sum"),
    "policy_gradient/token_sum_const": variant(
        losses.policy_gradient, aggregation="token_sum_const", max_completion_tokens=8
    ),
    "policy_gradient/dr_grpo": variant(losses.policy_gradient, aggregation="dr_grpo", max_completion_tokens=8),
    "clipped_surrogate/grpo": variant(losses.clipped_surrogate, aggregation="seq_mean_token_mean"),
    "clipped_surrogate/all_limits": variant(
        losses.clipped_surrogate, clip_high=0.28, dual_clip=3.0, ratio_cap=2.5, off_policy_threshold=0.1
    ),
    "sequence_clipped_surrogate/token": variant(losses.sequence_clipped_surrogate, ratio="token", clip_high=0.3),
    "sequence_clipped_surrogate/product": variant(losses.sequence_clipped_surrogate, ratio="product", clip_low=0.3),
    "cispo/topr": variant(
        losses.cispo, clip_low=0.0, clip_high=0.0, negative_clip_low=1.0, negative_clip_high=0.0, level="sequence"
    ),
    "masked_policy_gradient/ring": variant(
        losses.masked_policy_gradient,
        keep="ring",
        importance="advantage",
        clip_low=0.1,
        clip_high=0.1,
        ring_low=0.3,
        ring_high=0.3,
        drift_penalty=0.1,
    ),
    "negative_aware_likelihood/sequence": variant(
        losses.negative_aware_likelihood, level="sequence", prompt_weight="odds", floor=0.1, max_completion_tokens=1
    ),
    "sequential_divergence_preference": losses.sequential_divergence_preference(),
    "sequential_divergence_preference/both": losses.sequential_divergence_preference(form="both", alpha=1.0),
    "random_policy_valuation": losses.random_policy_valuation(scale=0.5),
    "success_cloning/plain": variant(losses.success_cloning, scale_by_advantage=False),
    "decoupled_reward": variant(losses.decoupled_reward, max_completion_tokens=16),
    "decoupled_reward/disco": variant(
        losses.decoupled_reward, max_completion_tokens=16, temperature=0.5, length_temperature=None
    ),
    "dpo/square": variant(losses.dpo, link="square", length_normalised=True),
    "dpo/robust": variant(losses.dpo, link="robust", label_smoothing=0.1),
    "pairwise_surrogate/separate": variant(losses.pairwise_surrogate, form="separate"),
    "cispo/dispo": variant(losses.cispo, clip_low=0.2, negative_clip_low=0.8, negative_clip_high=2.0),
    "divergence/score_function": losses.divergence(),
    "divergence/importance_corrected": losses.divergence(gradient="importance_corrected"),
    "divergence/stored_answers": losses.divergence(generator="forward_kl", samples="reference"),
    "clipped_value/unclipped": variant(losses.clipped_value, clip=None),
}


@pytest.fixture(params=sorted(CASES))
def name(request):
    return request.param


def read(loss):
    return signature(loss.func if isinstance(loss, functools.partial) else loss)


def names(loss):
    return [name for name in (*read(loss).required, *read(loss).optional) if name in DATA]


def differentiated(loss):
    return [name for name in names(loss) if name in CURRENT]


def with_gradient(loss, data):
    """(Loss, gradient of its numerator by everything of the current policy)."""
    data = {name: data[name] for name in names(loss)}
    current = {name: data[name] for name in differentiated(loss)}

    def numerator(current):
        result = loss(**(data | current))
        return result.numerator, result

    gradient, result = jax.grad(numerator, has_aux=True)(current)
    return result, gradient


@jax.jit
def every_loss(data):
    return {name: with_gradient(loss, data) for name, loss in CASES.items()}


@functools.cache
def outcomes(data_of):
    """name -> (Loss, gradient) of every loss on the data that a function returns: one program for all cases."""
    return jax.device_get(every_loss(data_of()))


def assert_same_loss(a, b, **tolerance):
    tolerance = {"rtol": 2e-6, "atol": 1e-6} | tolerance
    np.testing.assert_allclose(a.numerator, b.numerator, **tolerance)
    assert (a.denominator is None) == (b.denominator is None)
    if a.denominator is not None:
        np.testing.assert_allclose(a.denominator, b.denominator, **tolerance)
    assert a.metrics.keys() == b.metrics.keys()
    for name in a.metrics:
        np.testing.assert_allclose(a.metrics[name], b.metrics[name], **tolerance, err_msg=name)


def whole():
    return DATA


def rows(data, index):
    return {name: value[index] for name, value in data.items()}


def part(data, index):
    """Some of the rows, without the columns that are padding in all rows."""
    return {name: value[:, :PART_TOKENS] if value.ndim == 2 else value for name, value in rows(data, index).items()}


def test_the_laws_reach_the_losses():
    policy = {"policy_gradient", "clipped_surrogate", "sequence_clipped_surrogate", "cispo", "sapo"}
    assert policy | {"entropy_bonus", "negative_log_likelihood", "clipped_value"} <= set(CASES)
    assert all(differentiated(case) for case in CASES.values())


def first_part():
    return part(DATA, slice(0, PART))


def second_part():
    return part(DATA, slice(PART, ROWS))


@pytest.mark.parametrize(
    "name",
    [one if not number % 3 else pytest.param(one, marks=pytest.mark.slow) for number, one in enumerate(sorted(CASES))],
)
def test_any_split_of_the_rows_gives_the_same_sums_and_gradient(name):
    (whole_loss, gradient), parts = outcomes(whole)[name], [outcomes(half)[name] for half in (first_part, second_part)]
    np.testing.assert_allclose(sum(p.numerator for p, _ in parts), whole_loss.numerator, rtol=2e-6, atol=1e-6)
    if whole_loss.denominator is not None:
        np.testing.assert_allclose(sum(p.denominator for p, _ in parts), whole_loss.denominator, rtol=1e-6)
    for current in gradient:
        joined = np.concatenate([g[current] for _, g in parts])
        np.testing.assert_allclose(joined, gradient[current][:, :PART_TOKENS], rtol=2e-6, atol=1e-7)
    for metric, (total, count) in whole_loss.metrics.items():
        np.testing.assert_allclose(sum(p.metrics[metric][0] for p, _ in parts), total, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(sum(p.metrics[metric][1] for p, _ in parts), count, rtol=1e-6, atol=1e-6)


def noise_outside_of_the_mask():
    noisy = {
        name: np.where(DATA["mask"] == 0, np.asarray(37, value.dtype), value)
        for name, value in DATA.items()
        if value.ndim == 2 and name != "mask" and np.issubdtype(value.dtype, np.floating)
    }
    return DATA | noisy


def test_what_stands_outside_the_mask_changes_nothing(name):
    (clean, gradient), (noisy, noisy_gradient) = outcomes(whole)[name], outcomes(noise_outside_of_the_mask)[name]
    assert_same_loss(clean, noisy, rtol=0, atol=0)
    for current in gradient:
        np.testing.assert_array_equal(noisy_gradient[current], gradient[current])
        np.testing.assert_array_equal(gradient[current][DATA["mask"] == 0], 0)


ORDER = np.random.default_rng(1).permutation(ROWS)


def another_order():
    return rows(DATA, ORDER)


def test_the_order_of_rows_changes_nothing(name):
    (straight, gradient), (shuffled, shuffled_gradient) = outcomes(whole)[name], outcomes(another_order)[name]
    assert_same_loss(straight, shuffled)
    for current in gradient:
        np.testing.assert_allclose(shuffled_gradient[current], gradient[current][ORDER], rtol=2e-6, atol=1e-7)


def first_part_with_absent_rows_and_columns():
    present, absent = first_part(), part(DATA, np.array([0, 3, 4, 7]))
    absent |= {"mask": np.zeros_like(absent["mask"]), "weight": np.zeros_like(absent["weight"])}
    larger = {}
    for name, value in present.items():
        value = np.concatenate([value, absent[name]])
        if value.ndim == 2:
            value = np.pad(value, ((0, 0), (0, TOKENS - PART_TOKENS)), constant_values=0 if name == "mask" else 3)
        larger[name] = value
    return larger


def test_rows_of_weight_zero_and_columns_of_padding_change_nothing(name):
    straight, gradient = outcomes(first_part)[name]
    extended, extended_gradient = outcomes(first_part_with_absent_rows_and_columns)[name]
    assert_same_loss(straight, extended)
    for current in gradient:
        inside, outside = extended_gradient[current][:PART, :PART_TOKENS], extended_gradient[current].copy()
        np.testing.assert_allclose(inside, gradient[current], rtol=2e-6, atol=1e-7)
        outside[:PART, :PART_TOKENS] = 0
        np.testing.assert_array_equal(outside, 0)


FACTOR = np.float32([3, 3, 3, 1, 0.5, 0.5, 0.5, 0.5])  # constant along groups


def weighted():
    return DATA | {"mask": DATA["mask"] * FACTOR[:, None], "weight": DATA["weight"] * FACTOR}


def rows_of_factor(factor):
    return DATA | {"mask": DATA["mask"] * (factor == FACTOR)[:, None]}


OF_FACTOR = {factor: functools.partial(rows_of_factor, factor) for factor in (3.0, 1.0, 0.5)}


def test_weights_are_factors_of_rows_and_enter_nothing_else(name):
    result, _ = outcomes(weighted)[name]
    parts = {factor: outcomes(data_of)[name][0] for factor, data_of in OF_FACTOR.items()}
    expected = sum(factor * part.numerator for factor, part in parts.items())
    np.testing.assert_allclose(result.numerator, expected, rtol=2e-6, atol=1e-6)
    if result.denominator is not None:
        expected = sum(factor * part.denominator for factor, part in parts.items())
        np.testing.assert_allclose(result.denominator, expected, rtol=1e-6)


def nothing_of_the_current_policy():
    return DATA | {name: np.full_like(DATA[name], np.nan) for name in CURRENT}


def test_the_denominator_does_not_depend_on_the_current_policy(name):
    (sound, _), (result, _) = outcomes(whole)[name], outcomes(nothing_of_the_current_policy)[name]
    assert np.isnan(result.numerator)
    if sound.denominator is not None:
        np.testing.assert_array_equal(result.denominator, sound.denominator)


def no_rows():
    return DATA | {"mask": np.zeros_like(DATA["mask"]), "weight": np.zeros_like(DATA["weight"])}


def test_an_empty_batch_has_value_and_gradient_zero(name):
    result, gradient = outcomes(no_rows)[name]
    assert result.numerator == 0
    assert result.value == 0
    assert result.denominator is None or result.denominator == 0
    for current in gradient:
        np.testing.assert_array_equal(gradient[current], 0)


def far_away(shift, dtype):
    data = {k: v.astype(dtype) if np.issubdtype(v.dtype, np.floating) else v for k, v in DATA.items()}
    return data | {name: data[name] - np.asarray(shift, dtype) for name in ("old_logprobs", "reference_logprobs")}


FAR_AWAY = {
    (shift, dtype): functools.partial(far_away, shift, dtype)
    for shift in (-50.0, 50.0)
    for dtype in (jnp.float32, jnp.bfloat16)
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shift", [-50.0, 50.0])
def test_extreme_log_ratios_have_finite_values_and_gradients(name, shift, dtype):
    result, gradient = outcomes(FAR_AWAY[shift, dtype])[name]
    assert result.numerator.dtype == jnp.float32
    assert np.isfinite(result.numerator)
    for current in gradient:
        assert gradient[current].dtype == dtype
        assert np.isfinite(gradient[current].astype(jnp.float32)).all()
