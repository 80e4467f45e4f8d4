"""Advantages for prompts whose samples agree: a comparison over the batch replaces that within the group."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.advantages.group_relative.group_baselines import group_normalized
from jaxrl_llm.ranges import NonNegative, ranged
from jaxrl_llm.statistics import (
    group_leader,
    group_mean,
    group_size,
    group_std,
    group_sum,
    present,
    subgroup_ids,
)

BlendMode = Literal["soft_with_zero", "forced", "soft", "global"]
BlendPart = Literal["both", "local", "global"]


def answer_entropy(answer_id: Int[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"]) -> Float[Array, "B"]:
    """Entropy in bits of the answers that the samples of the row's group arrive at; 0 where they agree.

        H = -sum_a f_a log2 f_a,   f_a the share of the group's samples with answer a

    Args:
      answer_id: the same number for the same extracted answer of a prompt.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.

    Returns:
      One number per row, equal within a group; 0 in absent rows.

    Reference: COPO, consistency-aware policy optimisation (2508.04138).
    Certainty: verified
    """
    chex.assert_rank([answer_id, group, weight], 1)
    ones = jnp.ones(len(group), jnp.float32)
    together, alike = group_sum(ones, group, weight), group_sum(ones, subgroup_ids(group, answer_id), weight)
    share = jnp.where(weight > 0, alike / jnp.where(together > 0, together, 1.0), 1.0)
    # + 0.0, since the mean of -log2(1) is -0.
    return present(group_mean(-jnp.log2(share), group, weight) + 0.0, weight)


@ranged
def batch_normalized_accuracy(
    rewards: Float[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    answer_id: Int[Array, "B"] | None = None,
    *,
    discount_disagreement: bool = False,
    eps: NonNegative = 1e-6,
) -> Float[Array, "B"]:
    """The mean reward of a prompt, normalised over the prompts of the batch, as the advantage of all its samples.

        z = (accuracy - mean over prompts) / (unbiased deviation over prompts + eps)

    With `discount_disagreement` the accuracy is first multiplied by 1 - lambda * H, lambda = (1 - 1 / G) / log2(G), G
    the samples of the prompt and H the `answer_entropy`.

    Args:
      rewards: total reward of each row.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      answer_id: the same number for the same extracted answer of a prompt; needed for the discount.
      discount_disagreement: whether scattered answers lower the accuracy.
      eps: added to the deviation.

    Returns:
      One advantage per row, 0 in absent rows.

    Raises:
      ValueError: for a discount without answers.

    Reference: COPO, consistency-aware policy optimisation (2508.04138).
    Certainty: verified
    """
    chex.assert_rank([rewards, group, weight], 1)
    accuracy = group_mean(rewards, group, weight)
    if discount_disagreement:
        if answer_id is None:
            raise ValueError(
                "discount_disagreement is True, but there is no answer_id; provide the extracted answers or set it to "
                "False"
            )
        size = jnp.maximum(group_size(group, weight), 2).astype(jnp.float32)
        accuracy = accuracy * (1 - (1 - 1 / size) / jnp.log2(size) * answer_entropy(answer_id, group, weight))
    batch, prompts = jnp.zeros_like(group), group_leader(group, weight)
    centred = accuracy - group_mean(accuracy, batch, prompts)
    return present(centred / (group_std(accuracy, batch, prompts) + eps), weight)


@ranged
def local_share(
    rewards: Float[Array, "B"],
    answer_id: Int[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    mode: BlendMode = "soft_with_zero",
    sharpness: float = 1.0,
    threshold: float = 0.5,
) -> Float[Array, "B"]:
    """Weight in [0, 1] of the advantage within the group; the advantage over the batch has the rest.

        w = sigmoid(sharpness * (H - threshold)),   H the `answer_entropy`

        soft             w
        soft_with_zero   w, and 0 where the reward is 0
        forced           w, and 0 where the advantage within the group is 0
        global           0

    Args:
      rewards: total reward of each row.
      answer_id: the same number for the same extracted answer of a prompt.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      mode: where w is set to 0.
      sharpness: slope of the sigmoid, per bit (5 in the released script).
      threshold: entropy at which both parts have weight 1/2, in bits (1 in the released script).

    Returns:
      One share per row in [0, 1], 0 in absent rows.

    Raises:
      ValueError: for an unknown mode.

    Reference: COPO, consistency-aware policy optimisation (2508.04138).
    Certainty: verified
    """
    chex.assert_rank([rewards, answer_id, group, weight], 1)
    if mode not in get_args(BlendMode):
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(get_args(BlendMode))}")
    share = jax.nn.sigmoid(sharpness * (answer_entropy(answer_id, group, weight) - threshold))
    match mode:
        case "soft_with_zero":
            share = jnp.where(rewards == 0, 0.0, share)
        case "forced":
            share = jnp.where(group_normalized(rewards, group, weight) == 0, 0.0, share)
        case "global":
            share = jnp.zeros_like(share)
    return present(share, weight)


@ranged
def consistency_blended(
    rewards: Float[Array, "B"],
    answer_id: Int[Array, "B"],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    *,
    part: BlendPart = "both",
    mode: BlendMode = "soft_with_zero",
    sharpness: float = 1.0,
    threshold: float = 0.5,
    discount_disagreement: bool = False,
    eps: NonNegative = 1e-6,
) -> Float[Array, "B"]:
    """COPO: advantages within the group and over the batch, blended by the entropy of the group's answers.

        A = w * A_group + (1 - w) * A_batch

    with w = `local_share`, A_group = `group_normalized`, A_batch = `batch_normalized_accuracy`. Part 'both' suits a
    single surrogate. The released loss clips each part separately: `blended_surrogate`, with part 'local' in
    `advantages` and part 'global' in `global_advantages`.

    Args:
      rewards: total reward of each row.
      answer_id: the same number for the same extracted answer of a prompt.
      group: id of the group each row belongs to.
      weight: weight of each row; 0 is absent.
      part: the sum, or one weighted part of it.
      mode, sharpness, threshold: as in `local_share`.
      discount_disagreement: as in `batch_normalized_accuracy`.
      eps: added to the deviations.

    Returns:
      One advantage per row, 0 in absent rows.

    Raises:
      ValueError: for an unknown part or mode.

    Reference: COPO, consistency-aware policy optimisation (2508.04138).
    Certainty: verified
    """
    if part not in get_args(BlendPart):
        raise ValueError(f"part is {part!r}; it must be one of {', '.join(get_args(BlendPart))}")
    share = local_share(rewards, answer_id, group, weight, mode=mode, sharpness=sharpness, threshold=threshold)
    local = share * group_normalized(rewards, group, weight, eps=eps)
    batch_wide = (1 - share) * batch_normalized_accuracy(
        rewards, group, weight, answer_id, discount_disagreement=discount_disagreement, eps=eps
    )
    return present({"local": local, "global": batch_wide, "both": local + batch_wide}[part], weight)
