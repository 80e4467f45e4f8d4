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

ROWS, TOKENS = 7, 5
LENGTHS = np.array([5, 3, 1, 4, 5, 2, 0])
WEIGHTS = np.array([1.0, 1.0, 0.5, 2.0, 1.0, 0.0, 1.0])
# What a loss differentiates.
CURRENT = ("logprobs", "entropy", "values", "over_vocabulary", "token_reward_logits")


def batch():
    rng = np.random.default_rng(0)

    def tokens(low, high):
        return jnp.asarray(rng.uniform(low, high, (ROWS, TOKENS)), jnp.float32)

    old = tokens(-2.5, -0.1)
    rewards = jnp.asarray(rng.integers(0, 2, ROWS), jnp.float32)
    rewards = rewards.at[:3].set(jnp.array([1.0, 0.0, 1.0]))  # right and wrong answers in one group
    return {
        "old_logprobs": old,
        "logprobs": jnp.minimum(old + tokens(-0.7, 0.7), -1e-3),
        "reference_logprobs": jnp.minimum(old + tokens(-0.5, 0.5), -1e-3),
        "teacher_logprobs": jnp.minimum(old - 0.4 * jnp.sin(9 * old), -1e-3),
        "behaviour_logprobs": jnp.minimum(old + tokens(-0.1, 0.1), -1e-3),
        "advantages": tokens(-2.0, 2.0),
        "entropy": tokens(0.0, 3.0),
        "old_entropy": tokens(0.0, 3.0),
        "behaviour_entropy": tokens(0.0, 3.0),
        "values": tokens(-1.0, 1.0),
        "old_values": tokens(-1.0, 1.0),
        "returns": tokens(-1.0, 1.0),
        "over_vocabulary": tokens(0.0, 1.0),
        "token_weight": tokens(0.5, 1.5),
        "mask": jnp.asarray((np.arange(TOKENS) < LENGTHS[:, None]) * WEIGHTS[:, None], jnp.float32),
        "weight": jnp.asarray(WEIGHTS, jnp.float32),
        "length": jnp.asarray(LENGTHS, jnp.int32),
        "tokens": jnp.asarray(rng.integers(0, 9, (ROWS, TOKENS)), jnp.int32),
        "source": jnp.asarray(np.arange(TOKENS) < LENGTHS[:, None], jnp.int32),
        "turn": jnp.zeros((ROWS, TOKENS), jnp.int32),
        "proxy_logprobs": old + 0.3 * jnp.cos(jnp.arange(TOKENS)),
        "entropy_history": 0.2 + jnp.abs(old),
        "global_advantages": jnp.cos(7 * old),
        "token_reward_logits": 3 * jnp.sin(5 * old),
        "rewards": rewards,
        "correct": rewards,
        "preferred": rewards,
        "kl_anchor": jnp.full(ROWS, 0.25, jnp.float32),
        "truncated": jnp.zeros(ROWS, bool),
        # Rows of one group stand together, so that the splits below cut between groups.
        "group": jnp.asarray([0, 0, 0, 3, 4, 4, 4], jnp.int32),
    }


DATA = batch()
SPLITS = ((0, 4), (4, 7))


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
def loss(request):
    return CASES[request.param]


def read(loss):
    return signature(loss.func if isinstance(loss, functools.partial) else loss)


def names(loss):
    return [name for name in (*read(loss).required, *read(loss).optional) if name in DATA]


def differentiated(loss):
    return [name for name in names(loss) if name in CURRENT]


@functools.cache
def compiled(loss):
    def numerator(current, data):
        result = loss(**(data | current))
        return result.numerator, result

    return jax.jit(jax.value_and_grad(numerator, has_aux=True))


def with_gradient(loss, data):
    """(Loss, gradient of its numerator by everything of the current policy)."""
    data = {name: data[name] for name in names(loss)}
    current = {name: data[name] for name in differentiated(loss)}
    (_, result), gradient = compiled(loss)(current, data)
    return result, gradient


def assert_same_loss(a, b, **tolerance):
    tolerance = {"rtol": 2e-6, "atol": 1e-6} | tolerance
    np.testing.assert_allclose(a.numerator, b.numerator, **tolerance)
    assert (a.denominator is None) == (b.denominator is None)
    if a.denominator is not None:
        np.testing.assert_allclose(a.denominator, b.denominator, **tolerance)
    assert a.metrics.keys() == b.metrics.keys()
    for name in a.metrics:
        np.testing.assert_allclose(a.metrics[name], b.metrics[name], **tolerance, err_msg=name)


def rows(data, index):
    return {name: value[index] for name, value in data.items()}


def test_the_laws_reach_the_losses():
    policy = {"policy_gradient", "clipped_surrogate", "sequence_clipped_surrogate", "cispo", "sapo"}
    assert policy | {"entropy_bonus", "negative_log_likelihood", "clipped_value"} <= set(CASES)
    assert all(differentiated(case) for case in CASES.values())


def test_any_split_of_the_rows_gives_the_same_sums_and_gradient(loss):
    whole, gradient = with_gradient(loss, DATA)
    parts = [with_gradient(loss, rows(DATA, slice(*split))) for split in SPLITS]
    np.testing.assert_allclose(sum(p.numerator for p, _ in parts), whole.numerator, rtol=2e-6, atol=1e-6)
    if whole.denominator is not None:
        np.testing.assert_allclose(sum(p.denominator for p, _ in parts), whole.denominator, rtol=1e-6)
    for name in differentiated(loss):
        joined = np.concatenate([g[name] for _, g in parts])
        np.testing.assert_allclose(joined, gradient[name], rtol=2e-6, atol=1e-7)
    for name, (total, count) in whole.metrics.items():
        np.testing.assert_allclose(sum(p.metrics[name][0] for p, _ in parts), total, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(sum(p.metrics[name][1] for p, _ in parts), count, rtol=1e-6, atol=1e-6)


def test_what_stands_outside_the_mask_changes_nothing(loss):
    outside = DATA["mask"] == 0
    noise = {
        name: jnp.where(outside, jnp.asarray(37, value.dtype), value)
        for name, value in DATA.items()
        if value.ndim == 2 and name != "mask" and jnp.issubdtype(value.dtype, jnp.floating)
    }
    clean, gradient = with_gradient(loss, DATA)
    noisy, noisy_gradient = with_gradient(loss, DATA | noise)
    assert_same_loss(clean, noisy, rtol=0, atol=0)
    for name in differentiated(loss):
        np.testing.assert_array_equal(noisy_gradient[name], gradient[name])
        np.testing.assert_array_equal(np.asarray(gradient[name])[np.asarray(outside)], 0)


def test_the_order_of_rows_changes_nothing(loss):
    order = np.random.default_rng(1).permutation(ROWS)
    straight, gradient = with_gradient(loss, DATA)
    shuffled, shuffled_gradient = with_gradient(loss, rows(DATA, order))
    assert_same_loss(straight, shuffled)
    for name in differentiated(loss):
        np.testing.assert_allclose(shuffled_gradient[name], gradient[name][order], rtol=2e-6, atol=1e-7)


def test_rows_of_weight_zero_and_columns_of_padding_change_nothing(loss):
    absent = rows(DATA, np.array([0, 3, 4]))
    absent |= {"mask": jnp.zeros_like(absent["mask"]), "weight": jnp.zeros(3)}
    larger = {}
    for name, value in DATA.items():
        value = jnp.concatenate([value, absent[name]])
        if value.ndim == 2:
            value = jnp.pad(value, ((0, 0), (0, 3)), constant_values=0 if name == "mask" else 3)
        larger[name] = value
    straight, gradient = with_gradient(loss, DATA)
    extended, extended_gradient = with_gradient(loss, larger)
    assert_same_loss(straight, extended)
    for name in differentiated(loss):
        inside, outside = extended_gradient[name][:ROWS, :TOKENS], np.array(extended_gradient[name])
        np.testing.assert_allclose(inside, gradient[name], rtol=2e-6, atol=1e-7)
        outside[:ROWS, :TOKENS] = 0
        np.testing.assert_array_equal(outside, 0)


def test_weights_are_factors_of_rows_and_enter_nothing_else(loss):
    factor = jnp.asarray([3.0, 3.0, 3.0, 1.0, 0.5, 0.5, 0.5])  # constant along groups
    weighted = {"mask": DATA["mask"] * factor[:, None], "weight": DATA["weight"] * factor}
    result, _ = with_gradient(loss, DATA | weighted)
    parts = [with_gradient(loss, DATA | {"mask": DATA["mask"] * (factor == f)[:, None]})[0] for f in (3.0, 1.0, 0.5)]
    expected = sum(f * part.numerator for f, part in zip((3.0, 1.0, 0.5), parts, strict=True))
    np.testing.assert_allclose(result.numerator, expected, rtol=2e-6, atol=1e-6)
    if result.denominator is not None:
        expected = sum(f * part.denominator for f, part in zip((3.0, 1.0, 0.5), parts, strict=True))
        np.testing.assert_allclose(result.denominator, expected, rtol=1e-6)


def test_the_denominator_does_not_depend_on_the_current_policy(loss):
    broken = {name: jnp.full_like(DATA[name], jnp.nan) for name in differentiated(loss)}
    sound, _ = with_gradient(loss, DATA)
    result, _ = with_gradient(loss, DATA | broken)
    assert np.isnan(result.numerator)
    if sound.denominator is not None:
        np.testing.assert_array_equal(result.denominator, sound.denominator)


def test_an_empty_batch_has_value_and_gradient_zero(loss):
    empty = {"mask": jnp.zeros_like(DATA["mask"]), "weight": jnp.zeros_like(DATA["weight"])}
    result, gradient = with_gradient(loss, DATA | empty)
    assert result.numerator == 0
    assert result.value == 0
    assert result.denominator is None or result.denominator == 0
    for name in differentiated(loss):
        np.testing.assert_array_equal(gradient[name], 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shift", [-50.0, 50.0])
def test_extreme_log_ratios_have_finite_values_and_gradients(loss, shift, dtype):
    data = {k: v.astype(dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v for k, v in DATA.items()}
    far = {name: data[name] - jnp.asarray(shift, dtype) for name in ("old_logprobs", "reference_logprobs")}
    result, gradient = with_gradient(loss, data | far)
    assert result.numerator.dtype == jnp.float32
    assert np.isfinite(result.numerator)
    for name in differentiated(loss):
        assert gradient[name].dtype == dtype
        assert np.isfinite(gradient[name].astype(jnp.float32)).all()
