"""Rewards of steps out of what a network says behind them, out of continuations, spans, durations and milestones."""

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
    """What a network says behind the last token of each step.

        score         r_s = z_s
        probability   r_s = sigmoid(z_s)
        increment     r_s = sigmoid(z_s) - sigmoid(z_{s-1}), with 1/2 in front of the first step

    `reads: {process_values: progress_values, process_scores: progress_scores}` reads another network than `process`.

    Args:
      process_values, process_scores: what the head says before each token, and behind the last one.
      turn: index of the step that each token belongs to.
      mask: non-zero on tokens that count.
      length: completion tokens including end of sequence.
      max_turns: steps that are read, S.
      form: as above.

    Returns:
      One number a step, float32; 0 for steps that were not taken.

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
        # A step that was not taken hands on what the one before it left.
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
    """One score of an answer out of those of its steps.

        min       r = min_s r_s
        product   r = prod_s r_s
        mean      r = mean_s r_s
        last      r = r_s of the last step

    For probabilities product <= min <= mean; the least is the usual choice for best-of-n.

    Args:
      turn_rewards: score of each step.
      turn: index of the step that each token belongs to.
      mask: non-zero on tokens that count; a step without any was not taken.
      form: as above.
      without_steps: score of a row that took no step.

    Returns:
      One score a row, float32.

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
    """Labels of steps, of how many continuations from behind each came out right.

        hard   y_s = 1 where a continuation is right, else 0
        soft   y_s = right continuations / continuations

    Args:
      successes: right continuations from each border.
      continuations: how many were drawn from it.
      form: as above.

    Returns:
      One label a step, float32; NaN where nothing was continued.

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
    """The label of each step on the last token of it that counts, NaN elsewhere: fill `step_labels` with it.

    Args:
      turn_labels: label of each step, NaN for none (`continuation_labels`, `judge_turns`).
      turn: index of the step that each token belongs to.
      mask: non-zero on tokens that count; a step without any was not taken.

    Returns:
      One label a token, float32.

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
    """Rewards of turns: what each is held to contribute to the return, and whether it did anything.

        r_s = alpha * c_s + beta * g_s

    The last turn that was taken counts as grounded. beta alone rewards any action that can be carried out: keep it
    below the outcome's share.

    Args:
      contributions: c, what a network that `return_decomposition` trains says behind each turn (`step_end_scores`).
      turn: index of the turn that each token belongs to.
      mask: non-zero on tokens that count.
      grounded: g, 0 where the answer to a turn says that nothing happened, else 1; None takes the last turn alone.
      alpha, beta: weights.

    Returns:
      One reward a turn, float32; 0 for turns that were not taken.

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
    """Token rewards, and those of spans at the spans' last tokens: models of several densities, one entry for each.

        rho_t <- rho_t + scale * (r_s + offset) where t is the last token of span s

    A model of the whole text is one with a single span. Labels of 0 and 1 with offset -1/2 and scale 0.6 are +-0.3.

    Args:
      turn_rewards: what a model says of each span.
      turn: index of the span that each token belongs to.
      mask: non-zero on tokens that count.
      token_rewards: rewards so far; None is 0.
      offset, scale: bring the model to its share of the reward.

    Returns:
      One reward a token, float32.

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
    """Weights of actions by how long each took, for a batch in which slow ones are too rare.

        w_s = d_s / mean(d)

    over the actions of the batch. Where rows are collected for a fixed time and what still runs is cancelled, the share
    of an action among those that finished is its probability over its duration; the weight undoes that. Where actors
    start anew when they are done, or all wait for the slowest, it must be left out. Fill `token_weight` with it, behind
    `finished_in_window` where that time is simulated.

    Args:
      durations: d of each action, in any unit, as an environment or a reading says; [B] where a row is one action.
      mask: non-zero on tokens that count.
      weight: weight of each row; 0 is absent.
      turn: index of the action that each token belongs to; not read where a row is one action.
      whole_rows: what is cancelled is a row and not an action of it, so that d is the sum over a row's actions, and the
        mean is over rows.

    Returns:
      One weight a token, 0 outside the mask and in absent rows; 1 everywhere where all durations are 0.

    Reference: RL for machine-learning engineering agents (2509.01684).
    Certainty: recalled
    """
    chex.assert_rank([durations, mask, weight], [{1, 2}, 2, 1])
    if durations.ndim == 1:
        durations, turn = durations[:, None], jnp.zeros(mask.shape, jnp.int32)
    if turn is None:
        raise ValueError(f"durations are of {durations.shape[1]} turns a row, so turn is needed; fill it in credit")
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
    """The score of a program's result, or a failure that is the milder the further the program came.

        r = q + each * m where there is a result and something was trained, failure + each * m where there is none
        r = failure where nothing was trained

    The messages that are counted must be put in by a model that does not learn, or the policy prints them itself.

    Args:
      quality: q, the grader's score; NaN where there is no valid result.
      milestones: m, messages found in the output, each once.
      trained: 1 where the program trained anything.
      each: reward of a milestone.
      failure: reward without a result.
      add_to_valid: whether milestones count beside a valid result.

    Returns:
      One reward a row, float32.

    Reference: RL for machine-learning engineering agents (2509.01684).
    Certainty: recalled
    """
    chex.assert_rank([quality, milestones, trained], 1)
    score, valid = quality.astype(jnp.float32), ~jnp.isnan(quality)
    credit = each * milestones.astype(jnp.float32)
    found = jnp.where(valid, jnp.nan_to_num(score) + (credit if add_to_valid else 0.0), failure + credit)
    return jnp.where(trained > 0, found, failure)
