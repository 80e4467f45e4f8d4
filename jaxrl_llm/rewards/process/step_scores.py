"""Step rewards from network outputs, continuations, spans, durations and milestones."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import Count, NonNegative, Share, ranged
from jaxrl_llm.rewards.process.turn_rewards import turn_end_rewards
from jaxrl_llm.statistics import at_turns, behind_tokens

StepForm = Literal["score", "probability", "increment"]
Aggregate = Literal["min", "product", "mean", "last"]
Estimate = Literal["hard", "soft"]


@ranged
def step_end_scores(
    process_values: Float[Array, "B T"],
    process_scores: Float[Array, "B"],
    turn: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    length: Int[Array, "B"],
    *,
    max_turns: Count,
    form: StepForm = "probability",
) -> Float[Array, "B S"]:
    """A network's output after the last token of each step.

        score         r_s = z_s
        probability   r_s = sigmoid(z_s)
        increment     r_s = sigmoid(z_s) - sigmoid(z_{s-1}), with 1/2 before the first step

    `reads: {process_values: progress_values, process_scores: progress_scores}` selects another network than `process`.

    Args:
      process_values, process_scores: output of the head before each token, and after the last one.
      turn: index of the step that each token belongs to.
      mask: non-zero on tokens that count.
      length: completion tokens including end of sequence.
      max_turns: steps that are read, S.
      form: as above.

    Returns:
      One number per step, float32; 0 for steps that were not taken.

    Raises:
      ValueError: for an unknown form.

    Reference: process reward models (2305.20050).
    Certainty: verified
    """
    if form not in get_args(StepForm):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(StepForm))}")
    found, taken = at_turns(behind_tokens(process_values, process_scores, length), turn, mask, max_turns)
    if form == "score":
        return found
    good = jax.nn.sigmoid(found)
    if form == "increment":
        # Skip steps that were not taken: compare with the last taken step before.
        place = jax.lax.cummax(jnp.where(taken, jnp.arange(max_turns)[None, :], -1), axis=1)
        before = jnp.concatenate([jnp.full_like(place[:, :1], -1), place[:, :-1]], axis=1)
        earlier = jnp.where(before < 0, 0.5, jnp.take_along_axis(good, jnp.maximum(before, 0), axis=1))
        good = good - earlier
    return jnp.where(taken, good, 0.0)


@ranged
def aggregated_steps(
    turn_rewards: Float[Array, "B S"],
    turn: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    form: Aggregate = "min",
    without_steps: float = 0.0,
) -> Float[Array, "B"]:
    """One score of an answer, aggregated over its steps.

        min       r = min_s r_s
        product   r = prod_s r_s
        mean      r = mean_s r_s
        last      r = r_s of the last step

    For probabilities product <= min <= mean; min is the usual choice for best-of-n.

    Args:
      turn_rewards: score of each step.
      turn: index of the step that each token belongs to.
      mask: non-zero on tokens that count; a step without such tokens is absent.
      form: as above.
      without_steps: score of rows without a step.

    Returns:
      One score per row, float32.

    Raises:
      ValueError: for an unknown form.

    Reference: process reward models (2305.20050).
    Certainty: recalled
    """
    chex.assert_rank([turn_rewards, turn, mask], 2)
    if form not in get_args(Aggregate):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(Aggregate))}")
    taken = at_turns(mask, turn, mask, turn_rewards.shape[1])[1]
    r = turn_rewards.astype(jnp.float32)
    match form:
        case "min":
            value = jnp.where(taken, r, jnp.inf).min(1)
        case "product":
            value = jnp.where(taken, r, 1.0).prod(1)
        case "mean":
            value = jnp.where(taken, r, 0.0).sum(1) / jnp.maximum(taken.sum(1), 1)
        case "last":
            at = jnp.argmax(jnp.where(taken, jnp.arange(r.shape[1]), -1), axis=1)
            value = jnp.take_along_axis(r, at[:, None], axis=1)[:, 0]
    return jnp.where(taken.any(1), value, without_steps)


@ranged
def continuation_labels(
    successes: Float[Array, "*B S"], continuations: Float[Array, "*B S"], *, form: Estimate = "soft"
) -> Float[Array, "*B S"]:
    """Labels of steps from the success of continuations after each.

        hard   y_s = 1 where a continuation is right, else 0
        soft   y_s = right continuations / continuations

    Args:
      successes: number of right continuations after each step.
      continuations: number of sampled continuations after each step.
      form: as above.

    Returns:
      One label per step, float32; NaN without continuations.

    Raises:
      ValueError: for an unknown form.

    >>> continuation_labels(jnp.array([3.0, 1.0, 0.0]), jnp.array([4.0, 4.0, 4.0])).tolist()
    [0.75, 0.25, 0.0]

    Reference: Math-Shepherd (2312.08935).
    Certainty: verified
    """
    if form not in get_args(Estimate):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(Estimate))}")
    right, drawn = successes.astype(jnp.float32), continuations.astype(jnp.float32)
    value = (right > 0).astype(jnp.float32) if form == "hard" else right / jnp.maximum(drawn, 1.0)
    return jnp.where(drawn > 0, value, jnp.nan)


def labels_at_ends(
    turn_labels: Float[Array, "B S"], turn: Int[Array, "B T"], mask: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """The label of each step on its last token that counts, NaN elsewhere, for the field `step_labels`.

    Args:
      turn_labels: label of each step, NaN for none (`continuation_labels`, `judge_turns`).
      turn: index of the step that each token belongs to.
      mask: non-zero on tokens that count; a step without such tokens is absent.

    Returns:
      One label per token, float32.

    >>> labels_at_ends(jnp.array([[0.5, 1.0]]), jnp.array([[0, 0, 1]]), jnp.ones((1, 3))).tolist()
    [[nan, 0.5, 1.0]]

    Reference: Math-Shepherd (2312.08935).
    Certainty: verified
    """
    chex.assert_rank([turn_labels, turn, mask], 2)
    place = jnp.arange(turn.shape[1], dtype=jnp.float32)
    ends, taken = at_turns(jnp.broadcast_to(place, turn.shape), turn, mask, turn_labels.shape[1])
    at = jnp.where(taken, ends, turn.shape[1]).astype(jnp.int32)
    nothing = jnp.full(turn.shape, jnp.nan, jnp.float32)
    put = jax.vmap(lambda row, where, value: row.at[where].set(value, mode="drop"))
    return put(nothing, at, turn_labels.astype(jnp.float32))


@ranged
def progress_attribution(
    contributions: Float[Array, "B S"],
    turn: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    grounded: Float[Array, "B S"] | None = None,
    *,
    alpha: NonNegative = 1.0,
    beta: NonNegative = 0.5,
) -> Float[Array, "B S"]:
    """Turn rewards from predicted contributions to the return, plus a bonus for actions with an effect.

        r_s = alpha * c_s + beta * g_s

    The last turn that was taken counts as grounded. beta rewards any executable action: keep it below the outcome's
    share.

    Args:
      contributions: c, output of a network trained by `return_decomposition` after each turn (`step_end_scores`).
      turn: index of the turn that each token belongs to.
      mask: non-zero on tokens that count.
      grounded: g, 0 where the observation after a turn reports no effect, else 1; None is 1 for the last turn only.
      alpha, beta: weights.

    Returns:
      One reward per turn, float32; 0 for turns that were not taken.

    Reference: SPA-RL (2505.20732).
    Certainty: verified
    """
    chex.assert_rank([contributions, turn, mask], 2)
    taken = at_turns(mask, turn, mask, contributions.shape[1])[1]
    place = jnp.arange(contributions.shape[1])[None, :]
    last = taken & (place == jnp.where(taken, place, -1).max(axis=1, keepdims=True))
    acted = last if grounded is None else last | (grounded > 0)
    given = alpha * contributions.astype(jnp.float32) + beta * acted.astype(jnp.float32)
    return jnp.where(taken, given, 0.0)


@ranged
def added_span_rewards(
    turn_rewards: Float[Array, "B S"],
    turn: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    token_rewards: Float[Array, "B T"] | None = None,
    *,
    offset: float = 0.0,
    scale: float = 1.0,
) -> Float[Array, "B T"]:
    """Token rewards plus span rewards on the last token of each span; one entry per reward model.

        rho_t <- rho_t + scale * (r_s + offset) where t is the last token of span s

    A model of the whole text has a single span. Labels of 0 and 1 with offset -1/2 and scale 0.6 are +-0.3.

    Args:
      turn_rewards: a model's score of each span.
      turn: index of the span that each token belongs to.
      mask: non-zero on tokens that count.
      token_rewards: rewards so far; None is 0.
      offset, scale: normalise the model's scores.

    Returns:
      One reward per token, float32.

    Reference: fine-grained human feedback (2306.01693).
    Certainty: verified
    """
    added = turn_end_rewards(scale * (turn_rewards.astype(jnp.float32) + offset), turn, mask)
    return added if token_rewards is None else token_rewards.astype(jnp.float32) + added


def duration_weights(
    durations: Float[Array, "B S"] | Float[Array, "B"],
    mask: Float[Array, "B T"],
    weight: Float[Array, "B"],
    turn: Int[Array, "B T"] | None = None,
    *,
    whole_rows: bool = False,
) -> Float[Array, "B T"]:
    """Weights of actions proportional to their duration, for batches in which slow actions are under-represented.

        w_s = d_s / mean(d)

    over the actions of the batch. If rows are collected for a fixed time and unfinished ones are cancelled, the share
    of an action among the finished ones is its probability divided by its duration; the weight corrects this. Do not
    use it if actors restart when done, or if all wait for the slowest. It fills `token_weight`, after
    `finished_in_window` if that time is simulated.

    Args:
      durations: d of each action, in any unit, from an environment or a reading; [B] if a row is one action.
      mask: non-zero on tokens that count.
      weight: weight of each row; 0 is absent.
      turn: index of the action that each token belongs to; not needed if a row is one action.
      whole_rows: cancellation affects whole rows, so d is the sum over a row's actions, and the mean is over rows.

    Returns:
      One weight per token, 0 outside the mask and in absent rows; 1 everywhere where all durations are 0.

    Reference: RL for machine-learning engineering agents (2509.01684).
    Certainty: recalled
    """
    chex.assert_rank([durations, mask, weight], [{1, 2}, 2, 1])
    if durations.ndim == 1:
        durations, turn = durations[:, None], jnp.zeros(mask.shape, jnp.int32)
    if turn is None:
        raise ValueError(f"durations has {durations.shape[1]} turns per row, which needs turn; fill it in credit")
    turns = durations.shape[1]
    counted = (mask > 0) & (weight > 0)[:, None] & (turn >= 0) & (turn < turns)
    taken = at_turns(mask, turn, counted.astype(jnp.float32), turns)[1]
    d = jnp.where(taken, durations.astype(jnp.float32), 0.0)
    if whole_rows:
        d, taken = jnp.broadcast_to(d.sum(axis=1, keepdims=True), d.shape), taken.any(axis=1, keepdims=True)
        mean = (d[:, :1] * taken).sum() / jnp.maximum(taken.sum(), 1)
    else:
        mean = d.sum() / jnp.maximum(taken.sum(), 1)
    each = jnp.where(mean > 0, d / jnp.where(mean > 0, mean, 1.0), 1.0)
    at = jnp.clip(turn, 0, turns - 1).astype(jnp.int32)
    return jnp.where(counted, jnp.take_along_axis(each, at, axis=1), 0.0)


@ranged
def milestone_reward(
    quality: Float[Array, "B"],
    milestones: Float[Array, "B"],
    trained: Float[Array, "B"],
    *,
    each: Share = 0.1,
    failure: float = -10.0,
    add_to_valid: bool = True,
) -> Float[Array, "B"]:
    """The score of a program's result, or a failure reward that increases with the milestones reached.

        r = q + each * m with a valid result, failure + each * m without one, where a model was trained r = failure
        where no model was trained

    The milestone messages must be inserted by a frozen model, or the policy learns to print them.

    Args:
      quality: q, the grader's score; NaN without a valid result.
      milestones: m, messages found in the output, each once.
      trained: 1 where the program trained a model.
      each: reward of a milestone.
      failure: reward without a result.
      add_to_valid: whether milestones count beside a valid result.

    Returns:
      One reward per row, float32.

    Reference: RL for machine-learning engineering agents (2509.01684).
    Certainty: recalled
    """
    chex.assert_rank([quality, milestones, trained], 1)
    score, valid = quality.astype(jnp.float32), ~jnp.isnan(quality)
    credit = each * milestones.astype(jnp.float32)
    found = jnp.where(valid, jnp.nan_to_num(score) + (credit if add_to_valid else 0.0), failure + credit)
    return jnp.where(trained > 0, found, failure)
