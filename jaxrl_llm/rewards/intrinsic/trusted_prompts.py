"""Selection of unlabelled prompts whose pass-rate history resembles that of labelled ones."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.experience import Method, uniforms_at
from jaxrl_llm.ranges import Count, Natural, PositiveShare, ranged
from jaxrl_llm.statistics import group_leader, group_sum


@ranged
def known_share(prompt_id: Int[Array, "B"], *, share: PositiveShare = 0.1, seed: int = 0) -> Float[Array, "B"]:
    """1 in rows of prompts that count as labelled: a share of all, chosen by the prompt's number and the seed.

    Args:
      prompt_id: of each row.
      share: of the prompts.
      seed: of the choice.

    Returns:
      One number per row, 0 or 1.

    Reference: TraPO, trajectory matching (2512.13106).
    Certainty: verified
    """
    return (uniforms_at(jax.random.key(seed), prompt_id) < share).astype(jnp.float32)


@ranged
def trusted_trajectories(
    *,
    prompt_ids: Count,
    epochs: Count = 64,
    warm_up_epochs: Natural = 8,
    threshold: float = 0.4,
    least_share: PositiveShare = 0.1,
) -> Method:
    """Selection of unlabelled prompts whose pass-rate history resembles that of labelled prompts.

    The history of a prompt is its mean reward at each visit so far: by the label where it has one, else by its own
    majority vote (`labelled_or_voted`). Histories are standardised over time (unbiased deviation + 1e-8); the score of
    an unlabelled prompt is its mean cosine with the trusted ones, over the visits that all of them have had. Chosen are
    the prompts of the batch with the highest scores (`least_share` of the candidates, at least one) and all with a
    score of at least `threshold`; a prompt that was chosen is trusted from then on. Before the warm-up ends, and with
    fewer than two visits, only labelled prompts are trained on.

    Args:
      prompt_ids: number of prompts in the data.
      epochs: visits of a prompt in memory; later visits overwrite the last.
      warm_up_epochs: visits of a prompt before it can be chosen.
      threshold: tau.
      least_share: share of a batch's candidates that is always chosen.

    Returns:
      A method: (rewards, labelled, prompt_id, group, weight) -> weight, 0 in rows of prompts that are not chosen.
      `labelled` is 1 in rows of prompts with a label; without any labelled prompt no other is chosen.

    Reference: TraPO, trajectory matching (2512.13106).
    Certainty: verified
    """

    def init() -> dict[str, Array]:
        return {
            "history": jnp.zeros((prompt_ids, epochs), jnp.float32),
            "visits": jnp.zeros(prompt_ids, jnp.int32),
            "trusted": jnp.zeros(prompt_ids, bool),
        }

    def update(
        memory: dict[str, Array],
        rewards: Float[Array, "B"],
        labelled: Float[Array, "B"],
        prompt_id: Int[Array, "B"],
        group: Int[Array, "B"],
        weight: Float[Array, "B"],
    ) -> tuple[Float[Array, "B"], dict[str, Array]]:
        chex.assert_rank([rewards, labelled, prompt_id, group, weight], 1)
        leader = group_leader(group, weight) > 0
        there = jnp.where(weight > 0, 1.0, 0.0)
        rate = group_sum(rewards, group, there) / jnp.maximum(group_sum(there, group, there), 1.0)
        place = jnp.where(leader, prompt_id, prompt_ids)  # out of range: dropped
        visit = jnp.minimum(memory["visits"][prompt_id], epochs - 1)
        history = memory["history"].at[place, visit].set(rate, mode="drop")
        visits = memory["visits"].at[place].add(1, mode="drop")
        truth = labelled > 0
        trusted = memory["trusted"].at[jnp.where(leader & truth, prompt_id, prompt_ids)].set(True, mode="drop")
        candidate = leader & ~truth & (visits[prompt_id] > warm_up_epochs) & (visits[prompt_id] >= 2)
        scores = trajectory_scores(history, visits, trusted, prompt_id, candidate)
        scores = jnp.where(candidate, scores, -jnp.inf)
        count = jnp.maximum(1, jnp.floor(least_share * candidate.sum() + 1e-6)).astype(jnp.int32)
        rank = jnp.argsort(jnp.argsort(-scores))
        chosen = candidate & ((rank < count) | (scores >= threshold)) & trusted.any()
        trusted = trusted.at[jnp.where(chosen, prompt_id, prompt_ids)].set(True, mode="drop")
        learned = group_sum(chosen.astype(jnp.float32), group, leader.astype(jnp.float32)) > 0
        return jnp.where(truth | learned, weight, 0.0), {"history": history, "visits": visits, "trusted": trusted}

    return Method(init, update)


def trajectory_scores(
    history: Float[Array, "N E"],
    visits: Int[Array, "N"],
    trusted: Bool[Array, "N"],
    prompt_id: Int[Array, "B"],
    candidate: Bool[Array, "B"],
) -> Float[Array, "B"]:
    """Mean cosine of candidates' standardised pass-rate histories with those of trusted prompts.

    Histories are cut to the visits that all trusted prompts and all candidates have had.

    Args:
      history: pass rate of each prompt at each of its visits.
      visits: number of visits of each prompt.
      trusted: prompts to compare with, if they have had two visits.
      prompt_id: of each row.
      candidate: rows that are scored.

    Returns:
      One score per row in [-1, 1]; 0 for a constant history.
    """
    reference = trusted & (visits >= 2)
    epochs = history.shape[1]
    common = jnp.minimum(
        jnp.min(jnp.where(reference, visits, epochs)), jnp.min(jnp.where(candidate, visits[prompt_id], epochs))
    )
    inside = jnp.arange(epochs) < common
    count = jnp.maximum(common, 2)
    centred = jnp.where(inside, history - jnp.where(inside, history, 0.0).sum(1, keepdims=True) / count, 0.0)
    scaled = centred / (jnp.sqrt(jnp.square(centred).sum(1, keepdims=True) / (count - 1)) + 1e-8)
    norm = jnp.linalg.norm(scaled, axis=1, keepdims=True)
    unit = scaled / jnp.where(norm > 1e-6, norm, jnp.inf)
    cosines = unit[prompt_id] @ unit.T
    return jnp.where(reference[None], cosines, 0.0).sum(1) / jnp.maximum(reference.sum(), 1)
