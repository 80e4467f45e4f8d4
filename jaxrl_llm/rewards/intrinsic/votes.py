"""Pseudo-labels by majority vote: over one prompt, over two wordings, over several policies."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ranges import NonNegative, ranged
from jaxrl_llm.statistics import group_leader, group_max, group_sum, subgroup_ids


def majority_match(
    answer_id: Int[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"], *, break_ties: bool = True
) -> Float[Array, "B"]:
    """1 where the row has the majority answer of its group, else 0: a reward without labels.

    Ties go to the lowest id, which from `rewards.answer_ids` is the answer sampled first; without break_ties a tie has
    no majority (TraPO). A row without an answer neither votes nor matches.

    Args:
      answer_id: the same number for the same extracted answer of a prompt; negative for none.
      group: id of the group each row belongs to.
      weight: weight of each row, and of its vote; 0 is absent.
      break_ties: as above.

    Returns:
      One reward per row, 0 or 1; 0 in absent rows and in groups without an answer.

    >>> majority_match(jnp.array([0, 1, 1, -1, -1]), jnp.zeros(5, jnp.int32), jnp.ones(5)).tolist()
    [0.0, 1.0, 1.0, 0.0, 0.0]

    Reference: TTRL (2504.16084), SPINE (2511.17938).
    Certainty: verified
    """
    chex.assert_rank([answer_id, group, weight], 1)
    chex.assert_equal_shape([answer_id, group, weight])
    match = _agrees(answer_id, weight, _majorities(answer_id, group, weight)[group])
    if break_ties:
        return match
    votes, most = _votes(answer_id, group, weight)
    led = group_sum((votes == most).astype(jnp.float32), group, jnp.where(answer_id >= 0, weight, 0.0))
    return jnp.where(led <= most, match, 0.0)


def paired_majority_match(
    answer_id: Int[Array, "B"], group: Int[Array, "B"], paired_group: Int[Array, "B"], weight: Float[Array, "B"]
) -> Float[Array, "B"]:
    """1 where the row has the majority answer of the paired group, else 0.

    The groups of a pair hold two wordings of one problem, and each group is labelled by the other: a degenerate answer
    must win both votes to be rewarded. Votes are counted as in `majority_match`.

    Args:
      answer_id: the same number for the same extracted answer, in both groups of a pair; negative for none. From
        `rewards.paired_answer_ids`; ids of other readings are comparable only within a group.
      group: id of the group each row belongs to.
      paired_group: id of the group of the same problem in other words; negative for none.
      weight: weight of each row, and of its vote; 0 is absent.

    Returns:
      One reward per row, 0 or 1; 0 in absent rows, and where the paired group has no answer.

    Reference: Co-Reward (2508.00410).
    Certainty: verified
    """
    chex.assert_rank([answer_id, group, paired_group, weight], 1)
    chex.assert_equal_shape([answer_id, group, paired_group, weight])
    pair = paired_group.astype(jnp.int32)
    label = _majorities(answer_id, group, weight)[jnp.maximum(pair, 0)]
    return jnp.where(pair >= 0, _agrees(answer_id, weight, label), 0.0)


def _majorities(answer_id: Int[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"]) -> Int[Array, "B"]:
    """The majority answer of each group id, the lowest id on ties; the largest integer without answers."""
    votes, most = _votes(answer_id, group, weight)
    leads = (weight > 0) & (answer_id >= 0) & (votes == most)
    # Ids are compared as integers: float32 would merge large ones.
    largest = jnp.iinfo(answer_id.dtype).max
    return jax.ops.segment_min(jnp.where(leads, answer_id, largest), group, num_segments=len(group))


def _votes(answer_id: Int[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"]) -> tuple[Array, Array]:
    """(votes for the row's answer, those for the leading answer of its group)."""
    voting = jnp.where((weight > 0) & (answer_id >= 0), weight.astype(jnp.float32), 0.0)
    votes = group_sum(jnp.ones(len(group), jnp.float32), subgroup_ids(group, answer_id), voting)
    return votes, group_max(votes, group, voting)


def _agrees(answer_id: Int[Array, "B"], weight: Float[Array, "B"], label: Int[Array, "B"]) -> Float[Array, "B"]:
    return jnp.where((weight > 0) & (answer_id >= 0) & (answer_id == label), 1.0, 0.0)


def collective_match(
    answer_id: Int[Array, "B"], voter: Int[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"]
) -> Float[Array, "B"]:
    """1 where the row has the majority answer of several policies, with votes weighted by self-consistency.

        SC_n = share of policy n's samples that have its own majority answer
        label = argmax_a sum_n SC_n * (samples of policy n with answer a);   r = 1[a = label]

    Ties go to the answer that comes first in the order of rows. Rows without an answer count in the denominator of SC
    and do not vote.

    Args:
      answer_id: the same number for the same extracted answer of a problem, over all policies; negative for none.
      voter: number of the policy that sampled the row, in [0, B).
      group: id of the problem; the samples of all policies for it.
      weight: weight of each row; 0 is absent.

    Returns:
      One reward per row, 0 or 1; with one policy `majority_match`.

    Reference: RLCCF (2508.12338).
    Certainty: recalled
    """
    chex.assert_rank([answer_id, voter, group, weight], 1)
    there = jnp.where(weight > 0, 1.0, 0.0)
    votes = jnp.where(answer_id >= 0, there, 0.0)
    ones = jnp.ones(len(group), jnp.float32)
    own = subgroup_ids(group, voter)
    alike = group_sum(ones, subgroup_ids(own, answer_id), votes)
    consistency = group_max(jnp.where(votes > 0, alike, 0.0), own, there) / jnp.maximum(group_sum(ones, own, there), 1)
    support = group_sum(consistency, subgroup_ids(group, answer_id), votes)
    leads = jnp.where((votes > 0) & (support > 0), support, -1.0)
    best = group_max(leads, group, there)
    candidate = jnp.where((leads >= best * (1 - 1e-6)) & (leads > 0), there, 0.0)
    first = group_leader(group, candidate)
    label = group_sum(jnp.arange(len(group), dtype=jnp.float32), group, first).astype(jnp.int32)
    chosen = group_sum(ones, group, first) > 0
    return jnp.where((votes > 0) & chosen & (answer_id == answer_id[label]), 1.0, 0.0)


def labelled_or_voted(
    correct: Float[Array, "B"],
    answer_id: Int[Array, "B"],
    labelled: Float[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
) -> Float[Array, "B"]:
    """The verifier's verdict on labelled prompts, `majority_match` on the others.

    A tied vote has no label: reward 0.

    Args:
      correct: 1 where the verifier finds the row right.
      answer_id: the same number for the same extracted answer of a prompt; negative for none.
      labelled: 1 in rows of prompts with a label.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.

    Returns:
      One reward per row; 0 in absent rows.

    Reference: TraPO, trajectory matching (2512.13106).
    Certainty: verified
    """
    voted = majority_match(answer_id, group, weight, break_ties=False)
    return jnp.where(weight > 0, jnp.where(labelled > 0, correct, voted), 0.0)


@ranged
def answer_frequency(
    answer_id: Int[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    unanswered_votes: bool = False,
    entropy_weight: NonNegative = 0.0,
) -> Float[Array, "B"]:
    """The share of the group's samples with the row's answer: a soft vote, without labels.

        r_i = n(a_i) / G - entropy_weight * H,   H = -sum_a f_a log f_a / log(number of distinct answers)

    H is 0 for a single answer. It is constant within a group, so a group baseline removes it; it matters only with a
    baseline across prompts.

    Args:
      answer_id: the same number for the same extracted answer of a prompt; negative for none.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      unanswered_votes: "no answer" is an answer like others (TTRV); else it gets 0 (EMPO).
      entropy_weight: coefficient of H; 0.75 in TTRV, 0 in EMPO.

    Returns:
      One reward per row, 0 in absent rows.

    Reference: EMPO (2504.05812); TTRV (2510.06783).
    Certainty: verified
    """
    share, entropy = _shares(answer_id, group, weight, unanswered_votes)
    distinct = _distinct(answer_id, group, weight, unanswered_votes)
    scaled = jnp.where(distinct > 1, entropy / jnp.log(jnp.maximum(distinct, 2.0)), 0.0)
    return jnp.where(weight > 0, share - entropy_weight * scaled, 0.0)


def semantic_entropy(
    answer_id: Int[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"]
) -> Float[Array, "B"]:
    """Entropy in nats of the answers of the row's group, among the rows that have one.

        H = -sum_a p_a log p_a,   p_a the share of answer a among the group's rows with an answer

    Args:
      answer_id: the same number for the same extracted answer of a prompt; negative for none.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.

    Returns:
      One number per row, equal within a group; 0 in absent rows and in groups without an answer.

    Reference: EMPO (2504.05812).
    Certainty: recalled
    """
    answered = jnp.where(answer_id >= 0, weight, 0.0)
    _, entropy = _shares(answer_id, group, answered, True)
    return jnp.where(weight > 0, entropy, 0.0)


def _shares(answer_id: Array, group: Array, weight: Array, unanswered_votes: bool) -> tuple[Array, Array]:
    """(share of the group with the row's answer, entropy of the shares of the group in nats)."""
    chex.assert_rank([answer_id, group, weight], 1)
    chex.assert_equal_shape([answer_id, group, weight])
    ones = jnp.ones(len(group), jnp.float32)
    there = jnp.where(weight > 0, 1.0, 0.0)
    alike = group_sum(ones, subgroup_ids(group, jnp.maximum(answer_id, -1)), there)
    size = jnp.maximum(group_sum(ones, group, there), 1.0)
    share = alike / size
    entropy = group_sum(-jnp.log(jnp.where(share > 0, share, 1.0)), group, there) / size
    counted = unanswered_votes | (answer_id >= 0)
    return jnp.where(counted, share, 0.0), entropy


def _distinct(answer_id: Array, group: Array, weight: Array, unanswered_votes: bool) -> Array:
    """Number of different answers of the row's group."""
    there = jnp.where((weight > 0) & (unanswered_votes | (answer_id >= 0)), 1.0, 0.0)
    alike = group_sum(jnp.ones(len(group), jnp.float32), subgroup_ids(group, jnp.maximum(answer_id, -1)), there)
    return group_sum(1.0 / jnp.maximum(alike, 1.0), group, there)
