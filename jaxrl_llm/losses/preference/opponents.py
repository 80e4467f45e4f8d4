"""Pairs of a policy's answer and an opponent's: online losses, and models that score two answers together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss, Sequences
from jaxrl_llm.losses.aggregation import row_weight
from jaxrl_llm.losses.preference.pairs import pairs_of
from jaxrl_llm.losses.ratio import on_mask
from jaxrl_llm.losses.siblings import compact_ids
from jaxrl_llm.ranges import NonNegative, Positive, ranged


@ranged
def exploratory_preference(
    logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    opponent_logprobs: Float[Array, "B T"],
    reference_opponent_logprobs: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    opponent_mask: Float[Array, "B T"],
    win_share: Float[Array, "B"] | None = None,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 1e-5,
) -> Loss:
    """XPO: DPO between a sample of the policy and one of the reference, minus the latter's likelihood as exploration.

        z = beta * (rho - rho_opponent),   rho = sum_t(log pi - log pi_reference)
        x = -P log sigmoid(z) - (1 - P) log sigmoid(-z) + alpha * sum_t log pi(opponent)

    averaged over answers. The last term makes the policy optimistic about answers that are rare under the reference;
    online VPO is the same with alpha * beta in place of alpha. The view `opponent` is the answer of the network
    `reference` to the same prompt: `views: {opponent: {same_prompt: {written_by: reference}}}`.

    Args:
      logprobs, reference_logprobs: log-probability of each token of the policy's sample.
      opponent_logprobs, reference_opponent_logprobs: of the reference's sample.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      opponent_mask: 1 on tokens of the opponent.
      win_share: P, probability that a judge prefers the row to its opponent; 1 or 0 are hard labels. None is 1: with
        demonstrations as rows, the last policy as opponent and alpha 0, it is SPIN.
      beta: units of reward per nat.
      alpha: strength of exploration.

    Returns:
      The loss; its count is the (weighted) number of answers. Metrics: `win_share` and `margin` (z where the sample
      wins, else -z).

    Raises:
      ValueError: for a beta that is not positive, or a negative alpha.

    Reference: XPO (2405.21046); online VPO (2405.19320); SPIN (2401.01335).
    Certainty: verified
    """
    chex.assert_rank([logprobs, reference_logprobs, mask], 2)
    chex.assert_equal_shape([opponent_logprobs, reference_opponent_logprobs, opponent_mask])
    weights = jnp.where((opponent_mask > 0).any(-1), row_weight(mask.astype(jnp.float32)), 0.0)
    rho = (on_mask(logprobs, mask) - jax.lax.stop_gradient(on_mask(reference_logprobs, mask))).sum(-1)
    left = on_mask(opponent_logprobs, opponent_mask)
    fixed = jax.lax.stop_gradient(on_mask(reference_opponent_logprobs, opponent_mask))
    z = beta * (rho - (left - fixed).sum(-1))
    share = jnp.ones_like(weights) if win_share is None else win_share.astype(jnp.float32)
    won = jnp.where(weights > 0, share, 0.5)
    loss = -won * jax.nn.log_sigmoid(z) - (1 - won) * jax.nn.log_sigmoid(-z) + alpha * left.sum(-1)
    count, margin = weights.sum(), jnp.where(won > 0.5, z, -z)
    metrics = {"win_share": ((weights * won).sum(), count), "margin": ((weights * margin).sum(), count)}
    return Loss(jnp.where(weights > 0, weights * loss, 0.0).sum(), count, metrics)


def same_prompt(prompt_tokens: Int[Array, "B P"], prompt_length: Int[Array, "B"]) -> Sequences:
    """A view with the row's own prompt, to be answered by another network.

    Args:
      prompt_tokens, prompt_length: prompt of each row.

    Returns:
      Sequences with the prompts; their completions are empty.
    """
    nothing = jnp.zeros((prompt_tokens.shape[0], 1), jnp.int32)
    return Sequences(prompt_tokens, prompt_length, nothing, nothing[:, 0], nothing.astype(jnp.float32))


def beside_partner(
    prompt_tokens: Int[Array, "B P"],
    prompt_length: Int[Array, "B"],
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    group: Int[Array, "B"],
    preferred: Float[Array, "B"],
    weight: Float[Array, "B"],
) -> Sequences:
    """A view of paired rows whose prompt ends with the partner's answer, for a model that scores the difference.

    Args:
      prompt_tokens, prompt_length: prompt of each row, left-padded.
      tokens, length: completion of each row.
      group, preferred, weight: as in `pairs_of`; they define the pairs.

    Returns:
      The sequences prompt, partner's answer | answer; in rows without a partner the mask is 0 and the prompt empty,
      which keeps networks from generating there.
    """
    ids = compact_ids(group)
    both = (weight > 0) & ((preferred == 1) | (preferred == 0))
    partner = (ids[:, None] == ids[None]) & (preferred[:, None] != preferred[None]) & both[:, None] & both[None]
    other = jnp.argmax(partner, axis=1)
    return _behind(prompt_tokens, prompt_length, tokens[other], length[other], tokens, length, partner.any(1))


def beside_itself(
    prompt_tokens: Int[Array, "B P"],
    prompt_length: Int[Array, "B"],
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
) -> Sequences:
    """A view of rows whose prompt ends with the row's own answer, which scores a difference of 0.

    Args:
      prompt_tokens, prompt_length: prompt of each row, left-padded.
      tokens, length: completion of each row.

    Returns:
      The sequences prompt, answer | answer.
    """
    there = jnp.ones(length.shape, bool)
    return _behind(prompt_tokens, prompt_length, tokens, length, tokens, length, there)


def demonstrated(
    prompt_tokens: Int[Array, "B P"],
    prompt_length: Int[Array, "B"],
    demonstration_tokens: Int[Array, "B D"],
    demonstration_length: Int[Array, "B"],
) -> Sequences:
    """A view of samples: the row's prompt with the reference completion of the data.

    Args:
      prompt_tokens, prompt_length: prompt of each row.
      demonstration_tokens, demonstration_length: its reference completion.

    Reference: SPIN (2401.01335).
    Certainty: recalled
    """
    inside = jnp.arange(demonstration_tokens.shape[1]) < demonstration_length[:, None]
    return Sequences(
        prompt_tokens, prompt_length, demonstration_tokens, demonstration_length, inside.astype(jnp.float32)
    )


def followed_by(
    prompt_tokens: Int[Array, "B P"],
    prompt_length: Int[Array, "B"],
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    *,
    says: str,
    encode: Callable[[str], Sequence[int]],
    question: str = "",
) -> Sequences:
    """A view of each row's prompt, completion and a question, with a fixed answer that is scored, such as a verdict.

    Args:
      prompt_tokens, prompt_length: prompt of each row, left-padded.
      tokens, length: completion of each row.
      says: the answer.
      encode: text -> token ids, of the run.
      question: text between completion and answer.

    Raises:
      ValueError: for an answer without tokens.

    Reference: RewardDance (2509.08826).
    Certainty: verified
    """
    if not (answer := list(encode(says))):
        raise ValueError(f"says is {says!r}, which has no tokens; give the text that is scored")

    def fixed(ids: list[int]) -> tuple[Array, Array]:
        return jnp.tile(jnp.array(ids, jnp.int32)[None], (len(length), 1)), jnp.full(len(length), len(ids), jnp.int32)

    there = jnp.ones(length.shape, bool)
    first = prompt_tokens, prompt_length, tokens, length
    if asked := list(encode(question)) if question else []:
        before = _behind(*first, *fixed(asked), there)
        first = before.prompt_tokens, before.prompt_length, before.tokens, before.length
    return _behind(*first, *fixed(answer), there)


def _behind(
    prompt: Array, start: Array, first: Array, middle: Array, tokens: Array, length: Array, there: Array
) -> Sequences:
    """Prompt and a first answer, right-aligned, in front of an answer."""
    both = jnp.concatenate([prompt, first], axis=1)
    # Padding of the first answer moves to the front.
    place = (jnp.arange(both.shape[1])[None] - (first.shape[1] - middle)[:, None]) % both.shape[1]
    inside = (jnp.arange(tokens.shape[1]) < length[:, None]) & there[:, None]
    return Sequences(
        jnp.take_along_axis(both, place, axis=1),
        jnp.where(there, start + middle, 0),
        tokens,
        length,
        inside.astype(jnp.float32),
    )


def gap_relations(
    reward_partner_scores: Float[Array, "B"],
    reward_itself_scores: Float[Array, "B"],
    group: Int[Array, "B"],
    preferred: Float[Array, "B"],
    weight: Float[Array, "B"],
) -> Loss:
    """PIT: trains a model of the quality difference of two answers on the order of all four comparisons.

        g(w, l) > g(w, w), g(l, l) > g(l, w)
        x = -log sigmoid(g(w, l) - g(w, w)) - log sigmoid(g(w, l) - g(l, l))
            - log sigmoid(g(w, w) - g(l, w)) - log sigmoid(g(l, l) - g(l, w))

    averaged over pairs, with g(a, b) the score of answer a after answer b.

    Args:
      reward_partner_scores: scores of the view `partner: beside_partner`, of the network that is trained.
      reward_itself_scores: of the view `itself: beside_itself`.
      group: id of the group each row belongs to; a microbatch then holds whole groups.
      preferred: 1 for the better answer of a group, 0 for the worse one.
      weight: of each row.

    Returns:
      The loss; its count is the (weighted) number of pairs. Metrics: `preferred_share` (pairs with g(w, l) > g(l, w))
      and `score_gap`.

    Reference: PIT (2310.00898).
    Certainty: recalled
    """
    chex.assert_equal_shape([reward_partner_scores, reward_itself_scores, group, preferred, weight])
    pairs = pairs_of(preferred, weight, group)
    there = weight > 0
    crossed, same = (
        jnp.where(there, scores.astype(jnp.float32), 0.0) for scores in (reward_partner_scores, reward_itself_scores)
    )
    better, worse = crossed[:, None], crossed[None]
    one, other = same[:, None], same[None]
    order = ((better, one), (better, other), (one, worse), (other, worse))
    loss = -jnp.stack([jax.nn.log_sigmoid(high - low + jnp.zeros_like(pairs.share)) for high, low in order]).sum(0)
    gap = pairs.gap(crossed)
    metrics = {"preferred_share": (pairs.total(gap > 0), pairs.count), "score_gap": (pairs.total(gap), pairs.count)}
    return Loss(pairs.total(loss), pairs.count, metrics)


def regret_preference(
    reward_values: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    group: Int[Array, "B"],
    preferred: Float[Array, "B"],
    values: Float[Array, "B T"] | None = None,
    end_values: Float[Array, "B"] | None = None,
) -> Loss:
    """Preferences by regret: the better segment is the one of smaller regret.

        regret = V(start) - (sum_t r_t + V(end))
        x = -log sigmoid(regret_worse - regret_better)

    averaged over pairs. By the sum of rewards alone (`bradley_terry` on sums), a segment with a low reward that ends in
    a better state loses. For whole answers to one prompt both orders agree: V(start) cancels and V(end) is 0.

    Args:
      reward_values: r of each token, of the network `reward` that is trained, with one output per token.
      mask: 0 on tokens that do not count, the row's weight on those that do.
      group: id of the group each row belongs to; a microbatch then holds whole groups.
      preferred: 1 for the better segment of a group, 0 for the worse one.
      values: V before each token, of the best policy; no gradient. None is 0, which is equivalent for whole answers to
        one prompt.
      end_values: V after the last token of unfinished segments; None is 0.

    Returns:
      The loss; its count is the (weighted) number of pairs. Metrics: `preferred_share` and `regret_gap`.

    Reference: Models of human preference for learning reward functions (2206.02231).
    Certainty: verified
    """
    values = jnp.zeros_like(mask) if values is None else values
    chex.assert_equal_shape([reward_values, values, mask])
    weights = row_weight(mask.astype(jnp.float32))
    pairs = pairs_of(preferred, weights, group)
    first = jnp.argmax(mask > 0, axis=1)[:, None]
    start = jnp.take_along_axis(values.astype(jnp.float32), first, axis=1)[:, 0]
    end = jnp.zeros_like(start) if end_values is None else end_values.astype(jnp.float32)
    expected = jax.lax.stop_gradient(jnp.where(weights > 0, start - end, 0.0))
    gap = pairs.gap(on_mask(reward_values, mask).sum(-1) - expected)
    metrics = {"preferred_share": (pairs.total(gap > 0), pairs.count), "regret_gap": (pairs.total(gap), pairs.count)}
    return Loss(pairs.total(-jax.nn.log_sigmoid(gap)), pairs.count, metrics)
