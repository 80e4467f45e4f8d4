"""Preference losses that are a sum over the two answers of a pair, and terms on single answers."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss, Method
from jaxrl_llm.losses.aggregation import row_weight
from jaxrl_llm.losses.preference.pairs import pairs_of
from jaxrl_llm.losses.ratio import on_mask
from jaxrl_llm.ranges import Positive, ranged

Form = Literal["nca", "bco", "sppo", "apo_zero", "apo_down"]
Reduction = Literal["sum", "answer_mean", "token_mean"]


@ranged
def anchored_preference(
    logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    group: Int[Array, "B"],
    preferred: Float[Array, "B"],
    mask: Float[Array, "B T"],
    win_share: Float[Array, "B"] | None = None,
    *,
    form: Form = "apo_zero",
    beta: Positive = 0.1,
) -> Loss:
    """Losses of pairs in which each answer is compared with the reference, not with its partner.

    With a = beta * rho_better and b = beta * rho_worse, rho = sum_t(log pi - log pi_reference),

        nca        x = -log sigmoid(a) - 1/2 log sigmoid(-a) - 1/2 log sigmoid(-b)
        bco        x = -log sigmoid(a) - log sigmoid(-b)
        sppo       x = (rho_better - (p_better - 1/2) / beta)^2 + (rho_worse - (p_worse - 1/2) / beta)^2
        apo_zero   x = 1 - sigmoid(a) + sigmoid(b)
        apo_down   x = sigmoid(a) + 1 - sigmoid(a - b)

    averaged over pairs. nca has a finite optimal rho of the better answer. sppo regresses each answer to its share of
    wins against the policy of the last round, which is the reference. apo_zero raises the better answer and lowers the
    worse one; apo_down lowers both, for better answers that are worse than the policy's own.

    Args:
      logprobs: log-probability of each token under the current policy.
      reference_logprobs: under the reference.
      group: id of the group each row belongs to; a microbatch then holds whole groups.
      preferred: 1 for the better answer of a group, 0 for the worse one.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      win_share: p of each row, for sppo; None is 1 for the better answer and 0 for the worse one.
      form: as above.
      beta: units of reward per nat.

    Returns:
      The loss; its count is the (weighted) number of pairs. Metrics: `preferred_share` and `margin` (a - b).

    Raises:
      ValueError: for an unknown form or a beta that is not positive.

    Reference: NCA (2402.05369); BCO (2404.04656); SPPO (2405.00675); APO (2408.06266).
    Certainty: verified
    """
    chex.assert_rank([logprobs, reference_logprobs, mask, group, preferred], [2, 2, 2, 1, 1])
    chex.assert_equal_shape([logprobs, reference_logprobs, mask])
    if form not in get_args(Form):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(Form))}")
    mask = mask.astype(jnp.float32)
    pairs = pairs_of(preferred, row_weight(mask), group)
    rho = (on_mask(logprobs, mask) - jax.lax.stop_gradient(on_mask(reference_logprobs, mask))).sum(-1)
    r, gap = beta * rho, beta * pairs.gap(rho)
    better, worse = r[:, None], r[None, :]
    match form:
        case "nca":
            good, bad = -jax.nn.log_sigmoid(r) - 0.5 * jax.nn.log_sigmoid(-r), -0.5 * jax.nn.log_sigmoid(-r)
            loss = good[:, None] + bad[None, :]
        case "bco":
            loss = -jax.nn.log_sigmoid(better) - jax.nn.log_sigmoid(-worse)
        case "sppo":
            share = preferred if win_share is None else jax.lax.stop_gradient(win_share)
            far = jnp.square(rho - (share.astype(jnp.float32) - 0.5) / beta)
            loss = far[:, None] + far[None, :]
        case "apo_zero":
            loss = jax.nn.sigmoid(-better) + jax.nn.sigmoid(worse)
        case _:
            loss = jax.nn.sigmoid(better) + jax.nn.sigmoid(-gap)
    metrics = {"preferred_share": (pairs.total(gap > 0), pairs.count), "margin": (pairs.total(gap), pairs.count)}
    return Loss(pairs.total(loss), pairs.count, metrics)


@ranged
def binary_classifier(
    logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    preferred: Float[Array, "B"],
    mask: Float[Array, "B T"],
    reward_shift: Float[Array, "B"] | None = None,
    *,
    beta: Positive = 0.1,
) -> Loss:
    """BCO on single answers: the log-ratio to the reference is the logit of a binary classifier.

        good   x = -log sigmoid(beta * rho - d)
        bad    x = -log sigmoid(-(beta * rho - d))

    averaged over answers, with d the running mean of beta * rho from `running_shift`.

    Args:
      logprobs: log-probability of each token under the current policy.
      reference_logprobs: under the reference.
      preferred: 1 for a good answer, 0 for a bad one; any other number leaves the row out.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      reward_shift: d; None is 0.
      beta: units of reward per nat.

    Returns:
      The loss; its count is the (weighted) number of answers.

    Reference: BCO (2404.04656).
    Certainty: verified
    """
    chex.assert_rank([logprobs, reference_logprobs, mask, preferred], [2, 2, 2, 1])
    mask = mask.astype(jnp.float32)
    weights = jnp.where((preferred == 1) | (preferred == 0), row_weight(mask), 0.0)
    rho = (on_mask(logprobs, mask) - jax.lax.stop_gradient(on_mask(reference_logprobs, mask))).sum(-1)
    shift = jnp.zeros_like(rho) if reward_shift is None else jnp.where(weights > 0, reward_shift, 0.0)
    logit = beta * rho - jax.lax.stop_gradient(shift)
    loss = -jax.nn.log_sigmoid(jnp.where(preferred == 1, logit, -logit))
    right = jnp.where((logit > 0) == (preferred == 1), weights, 0.0)
    counted = weights.sum()
    return Loss(jnp.where(weights > 0, weights * loss, 0.0).sum(), counted, {"right_share": (right.sum(), counted)})


@ranged
def running_shift(*, beta: Positive = 0.1) -> Method:
    """The running mean of beta * rho over all answers so far, this batch included: the shift of `binary_classifier`.

        d <- d + (mean of the batch - d) * n / (N + n)
        N <- N + n

    Args:
      beta: as in the loss.

    Returns:
      A method: (old_logprobs, reference_logprobs, mask, weight) -> d on every row, for the field `reward_shift`.

    Reference: BCO (2404.04656).
    Certainty: verified
    """

    def init() -> dict[str, Array]:
        return {"mean": jnp.float32(0.0), "count": jnp.float32(0.0)}

    def update(
        memory: dict[str, Array],
        old_logprobs: Float[Array, "B T"],
        reference_logprobs: Float[Array, "B T"],
        mask: Float[Array, "B T"],
        weight: Float[Array, "B"],
    ) -> tuple[Float[Array, "B"], dict[str, Array]]:
        there = (weight > 0).astype(jnp.float32)
        rho = (on_mask(old_logprobs, mask) - on_mask(reference_logprobs, mask)).sum(-1)
        count = there.sum()
        mean = beta * jnp.where(there > 0, rho, 0.0).sum() / jnp.maximum(count, 1.0)
        total = memory["count"] + count
        after = memory["mean"] + (mean - memory["mean"]) * count / jnp.maximum(total, 1.0)
        return jnp.full(weight.shape, after), {"mean": after, "count": total}

    return Method(init, update)


@ranged
def preferred_likelihood(
    logprobs: Float[Array, "B T"],
    preferred: Float[Array, "B"],
    mask: Float[Array, "B T"],
    *,
    reduction: Reduction = "token_mean",
) -> Loss:
    """The negative log-likelihood of the better answers, as a term beside a preference loss.

        sum          mean over answers of -sum_t log pi
        answer_mean  mean over answers of -mean_t log pi
        token_mean   -sum of log pi over their tokens / number of tokens

    It keeps the better answers from losing probability. RPO adds it as a sum with coefficient eta * beta (eta 0.005),
    or as answer_mean with coefficient 0.2 to 1; CPO as token_mean with coefficient 1. Coefficients of the forms are not
    interchangeable.

    Args:
      logprobs: log-probability of each token under the current policy.
      preferred: 1 for a better answer; other rows do not count.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      reduction: as above.

    Returns:
      The loss; its count is the (weighted) number of answers, or of tokens.

    Raises:
      ValueError: for an unknown reduction.

    Reference: RPO (2405.16436); CPO (2401.08417); VPO with the better answers (2405.19320).
    Certainty: verified
    """
    chex.assert_rank([logprobs, preferred, mask], [2, 1, 2])
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(get_args(Reduction))}")
    mask = jnp.where((preferred == 1)[:, None], mask.astype(jnp.float32), 0.0)
    tokens = -(mask * on_mask(logprobs, mask))
    if reduction == "token_mean":
        return Loss(tokens.sum(), mask.sum())
    rows = tokens.sum(-1)
    if reduction == "answer_mean":
        rows = rows / jnp.maximum((mask > 0).sum(-1), 1)
    return Loss(rows.sum(), row_weight(mask).sum())


def sample_log_ratio(
    logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    calibration: Float[Array, "B"],
    mask: Float[Array, "B T"],
    *,
    sign: Literal["optimism", "pessimism"] = "optimism",
) -> Loss:
    """The mean log-ratio of calibration samples, minimised (optimism) or maximised (pessimism).

        loss = s * mean over calibration rows of sum_t(log pi - log pi_reference),   s = 1 or, for pessimism, -1

    Beside `dpo`: VPO has the coefficient alpha * beta, with optimism on samples of the reference (online: the policy
    explores) and pessimism on better answers (offline); XPO alpha, with optimism on the sample of the reference of each
    pair.

    Args:
      logprobs: log-probability of each token under the current policy.
      reference_logprobs: under the reference; a constant that shifts only the value.
      calibration: 1 on calibration rows.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      sign: as above.

    Returns:
      The loss; its count is the (weighted) number of those rows.

    Raises:
      ValueError: for an unknown sign.

    Reference: VPO (2405.19320); XPO (2405.21046).
    Certainty: recalled
    """
    chex.assert_rank([logprobs, reference_logprobs, calibration, mask], [2, 2, 1, 2])
    if sign not in ("optimism", "pessimism"):
        raise ValueError(f"sign is {sign!r}; it must be one of optimism, pessimism")
    mask = jnp.where((calibration > 0)[:, None], mask.astype(jnp.float32), 0.0)
    ratio = on_mask(logprobs, mask) - jax.lax.stop_gradient(on_mask(reference_logprobs, mask))
    total = (mask * ratio).sum()
    return Loss(total if sign == "optimism" else -total, row_weight(mask).sum())


def off_policy_weight(
    old_logprobs: Float[Array, "B T"], log_collision: Float[Array, "B T"], mask: Float[Array, "B T"]
) -> Float[Array, "B"]:
    """WPO: weight of an answer by its likelihood under the policy.

        w = exp( mean_t [ log p(y_t) - log sum_v p(v)^2 ] )

    Greedy text has w >= 1; for samples of the policy E[log w] <= 0.

    Args:
      old_logprobs: log-probability of each token under the policy before the update.
      log_collision: log sum_v p(v)^2 at each token (`log_collision_probability`).
      mask: non-zero on tokens that count.

    Returns:
      One weight per row, for the field `pair_weight`; 1 in rows without tokens.

    Reference: WPO (2406.11827).
    Certainty: verified
    """
    chex.assert_rank([old_logprobs, log_collision, mask], 2)
    counted = mask > 0
    gap = jnp.where(counted, old_logprobs.astype(jnp.float32) - log_collision.astype(jnp.float32), 0.0)
    return jnp.exp(gap.sum(-1) / jnp.maximum(counted.sum(-1), 1))


def log_collision_probability(
    log_probabilities: Float[Array, "B C V"], tokens: Int[Array, "B C"]
) -> Float[Array, "B C"]:
    """log sum_v p(v)^2 at each token: the log-probability that two samples are equal.

    Args:
      log_probabilities: of the policy before the update, for one chunk.
      tokens: of the same positions; not used.

    Reference: WPO (2406.11827).
    Certainty: verified
    """
    chex.assert_rank([log_probabilities, tokens], [3, 2])
    return jax.nn.logsumexp(2 * log_probabilities.astype(jnp.float32), axis=-1)
