"""Agreement with the losses of TRL 1.16 and verl, written out again in float64 numpy.

Gradients are central differences, so nothing is shared with the code under test. What a library detaches is an argument
of its own (`frozen`) that the differences leave alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import (
    aggregate,
    cispo,
    clipped_surrogate,
    clipped_value,
    policy_gradient,
    sapo,
    sequence_clipped_surrogate,
)

RNG = np.random.default_rng(3)
B, T = 5, 6
MASK = (np.arange(T) < np.array([6, 4, 1, 5, 3])[:, None]).astype(np.float64)
OLD = RNG.uniform(-2.5, -0.2, (B, T)).astype(np.float32).astype(np.float64)
LOGPROBS = (OLD + RNG.normal(0, 0.35, (B, T))).astype(np.float32).astype(np.float64)
ADVANTAGES = RNG.normal(0, 1.0, (B, 1)).astype(np.float32).astype(np.float64)
LONGEST = 16


def trl_loss(lp, frozen, *, loss_type, level="token", low=0.2, high=0.28, delta=None, beta_pos=1.0, beta_neg=1.05):
    """GRPOTrainer without KL, entropy mask or vLLM correction; `loss_type` decides surrogate and normaliser."""
    difference = lp - OLD
    if level == "sequence":
        difference = (difference * MASK).sum(1, keepdims=True) / np.maximum(MASK.sum(1, keepdims=True), 1.0)
    coefficient = np.exp(difference)
    if loss_type == "cispo":
        constant = np.minimum(np.exp(frozen - OLD), high)
        per_token = -constant * ADVANTAGES * lp
    elif loss_type == "sapo":
        temperature = np.where(ADVANTAGES > 0, beta_pos, beta_neg)
        per_token = -ADVANTAGES * 4 / temperature / (1 + np.exp(-temperature * (coefficient - 1)))
    else:
        limited = np.clip(coefficient, 1 - low, 1 + high)
        free = coefficient if delta is None else np.minimum(coefficient, delta)
        per_token = -np.minimum(free * ADVANTAGES, limited * ADVANTAGES)
    if loss_type in ("grpo", "sapo"):
        return ((per_token * MASK).sum(-1) / np.maximum(MASK.sum(-1), 1.0)).mean()
    if loss_type == "bnpo":
        return (per_token * MASK).sum() / max(MASK.sum(), 1.0)
    if loss_type == "dr_grpo":
        return (per_token * MASK).sum() / (len(MASK) * LONGEST)
    # "dapo" and "cispo" divide by the completion tokens of the whole batch, on all processes.
    return (per_token * MASK).sum() / MASK.sum()


def verl_average(per_token, mode):
    tokens, rows = MASK.sum(-1), MASK.any(-1)
    match mode:
        case "token-mean":
            return (per_token * MASK).sum() / MASK.sum()
        case "seq-mean-token-sum":
            return ((per_token * MASK).sum(-1) * rows).sum() / rows.sum()
        case "seq-mean-token-mean":
            return ((per_token * MASK).sum(-1) / tokens * rows).sum() / rows.sum()
        case "seq-mean-token-sum-norm":
            return (per_token * MASK).sum() / T


def verl_vanilla(lp, frozen, *, mode, low=0.2, high=0.28, dual=3.0, rollout_weight=1.0):
    ratio = np.exp(np.clip(lp - OLD, -20, 20))
    worst = np.maximum(-ADVANTAGES * ratio, -ADVANTAGES * np.clip(ratio, 1 - low, 1 + high))
    bounded = np.minimum(worst, -ADVANTAGES * dual)
    return verl_average(np.where(ADVANTAGES < 0, bounded, worst) * rollout_weight, mode)


def verl_gspo(lp, frozen, *, low, high):
    average = ((frozen - OLD) * MASK).sum(-1, keepdims=True) / MASK.sum(-1, keepdims=True)
    ratio = np.exp(np.minimum(lp - frozen + average, 10.0))
    worst = np.maximum(-ADVANTAGES * ratio, -ADVANTAGES * np.clip(ratio, 1 - low, 1 + high))
    return verl_average(worst, "seq-mean-token-mean")


def verl_gpg(lp, frozen, *, mode):
    return verl_average(-ADVANTAGES * lp, mode)


def verl_cispo(lp, frozen, *, low, high):
    constant = np.clip(np.exp(np.clip(frozen - OLD, -20, 20)), 1 - low, 1 + high)
    return verl_average(-constant * ADVANTAGES * lp, "token-mean")


def central_differences(function, at, step=1e-5):
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        shift = np.zeros_like(at)
        shift[index] = step
        gradient[index] = (function(at + shift) - function(at - shift)) / (2 * step)
    return gradient


def ours(method, *weights, **hyper):
    arguments = [jnp.asarray(x, jnp.float32) for x in (OLD, np.broadcast_to(ADVANTAGES, (B, T)), MASK, *weights)]
    if method is policy_gradient:
        arguments = arguments[1:]
    function = jax.jit(jax.value_and_grad(lambda x: method(x, *arguments, **hyper).value))
    return function(jnp.asarray(LOGPROBS, jnp.float32))


def assert_agrees(reference, computed):
    value, gradient = computed
    np.testing.assert_allclose(value, reference(LOGPROBS, LOGPROBS), rtol=1e-6, atol=1e-6)
    slopes = central_differences(lambda x: reference(x, LOGPROBS), LOGPROBS)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-6, atol=1e-6)


TRL = {
    "grpo": ({"loss_type": "grpo"}, clipped_surrogate, {"aggregation": "seq_mean_token_mean"}),
    "bnpo": ({"loss_type": "bnpo"}, clipped_surrogate, {}),
    "dapo": ({"loss_type": "dapo"}, clipped_surrogate, {}),
    "dr_grpo": (
        {"loss_type": "dr_grpo"},
        clipped_surrogate,
        {"aggregation": "dr_grpo", "max_completion_tokens": LONGEST},
    ),
    "two_sided": (
        {"loss_type": "grpo", "delta": 1.4},
        clipped_surrogate,
        {"aggregation": "seq_mean_token_mean", "ratio_cap": 1.4},
    ),
}


@pytest.mark.parametrize("name", TRL)
def test_trl_clipped_losses(name):
    options, method, hyper = TRL[name]
    assert_agrees(lambda lp, frozen: trl_loss(lp, frozen, **options), ours(method, clip_high=0.28, **hyper))


def test_trl_gspo_is_the_grpo_loss_with_sequence_level_ratios():
    computed = ours(sequence_clipped_surrogate, clip_low=0.05, clip_high=0.07)
    options = {"loss_type": "grpo", "level": "sequence", "low": 0.05, "high": 0.07}
    assert_agrees(lambda lp, frozen: trl_loss(lp, frozen, **options), computed)
    computed = ours(sequence_clipped_surrogate, clip_low=0.05, clip_high=0.07, aggregation="token_mean")
    assert_agrees(lambda lp, frozen: trl_loss(lp, frozen, **(options | {"loss_type": "dapo"})), computed)


def test_trl_cispo_has_no_lower_bound_and_names_the_ceiling():
    computed = ours(cispo, clip_low=1.0, clip_high=0.25)
    assert_agrees(lambda lp, frozen: trl_loss(lp, frozen, loss_type="cispo", high=1.25), computed)


def test_trl_sapo():
    assert_agrees(lambda lp, frozen: trl_loss(lp, frozen, loss_type="sapo"), ours(sapo))


VERL_MODES = {
    "token-mean": "token_mean",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-mean": "seq_mean_token_mean",
    "seq-mean-token-sum-norm": "token_sum_const",
}


@pytest.mark.parametrize("theirs", VERL_MODES)
def test_verl_vanilla_with_dual_clip_and_rollout_weights(theirs):
    weight = RNG.uniform(0.5, 2.0, (B, T)).astype(np.float32).astype(np.float64)
    hyper = {"clip_high": 0.28, "aggregation": VERL_MODES[theirs]}
    # 1.3: low enough for the bound to be met by some of these ratios.
    for dual in (3.0, 1.3):
        assert_agrees(
            lambda lp, frozen, dual=dual: verl_vanilla(lp, frozen, mode=theirs, dual=dual, rollout_weight=weight),
            ours(clipped_surrogate, weight, dual_clip=dual, **hyper),
        )


@pytest.mark.parametrize("ratio", ["token", "geometric_mean"])
def test_verl_gspo(ratio):
    computed = ours(sequence_clipped_surrogate, ratio=ratio, clip_low=0.05, clip_high=0.07)
    assert_agrees(lambda lp, frozen: verl_gspo(lp, frozen, low=0.05, high=0.07), computed)


def test_verl_gpg():
    for theirs, mine in VERL_MODES.items():
        computed = ours(policy_gradient, aggregation=mine)
        assert_agrees(lambda lp, frozen, mode=theirs: verl_gpg(lp, frozen, mode=mode), computed)


def test_verl_cispo():
    computed = ours(cispo, clip_low=0.2, clip_high=0.28)
    assert_agrees(lambda lp, frozen: verl_cispo(lp, frozen, low=0.2, high=0.28), computed)


def test_verl_value_loss():
    values, old, returns = RNG.normal(0, 1, (3, B, T)).astype(np.float32).astype(np.float64)

    def theirs(v):
        limited = np.clip(v, old - 0.5, old + 0.5)
        return 0.5 * verl_average(np.maximum((v - returns) ** 2, (limited - returns) ** 2), "token-mean")

    arrays = [jnp.asarray(x, jnp.float32) for x in (old, returns, MASK)]
    ours = jax.jit(jax.value_and_grad(lambda v: clipped_value(v, *arrays, clip=0.5).value))
    value, gradient = ours(jnp.asarray(values, jnp.float32))
    np.testing.assert_allclose(value, theirs(values), rtol=1e-6)
    np.testing.assert_allclose(gradient, central_differences(theirs, values), rtol=1e-6, atol=1e-6)


def test_verl_aggregation():
    x = jnp.asarray(LOGPROBS, jnp.float32)
    for theirs, mine in VERL_MODES.items():
        loss = aggregate(x, jnp.asarray(MASK, jnp.float32), aggregation=mine)
        np.testing.assert_allclose(loss.value, verl_average(LOGPROBS, theirs), rtol=1e-6, err_msg=theirs)
