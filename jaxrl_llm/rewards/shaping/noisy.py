"""Deliberately wrong rewards for studies of noise, and a calibration of reward-model scores."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import uniforms_at
from jaxrl_llm.ranges import Natural, NonNegative, Share, ranged
from jaxrl_llm.token_codes import mixed_bits

SpuriousForm = Literal["format", "random", "incorrect"]


@ranged
def flipped_rewards(
    rewards: Float[Array, "B"], prompt_id: Int[Array, "B"], *, share: Share, seed: Natural
) -> Float[Array, "B"]:
    """Rewards in [0, 1], flipped for a share of the prompts, to study robustness to noise.

        r <- 1 - r where u(prompt, seed) < share

    A prompt is flipped for all of its samples and in every epoch, or not at all.

    Args:
      rewards: rewards before; NaN does not apply and stays.
      prompt_id: id of the prompt.
      share: expected share of flipped prompts; training still works at 0.4, 0.5 is no signal.
      seed: of the choice; the run's seed by default.

    Returns:
      One reward per row, float32.

    Reference: noisy rewards (2505.22653).
    Certainty: verified
    """
    chex.assert_rank([rewards, prompt_id], 1)
    chex.assert_equal_shape([rewards, prompt_id])
    bits = prompt_id.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) ^ jnp.uint32((seed * 0x85EBCA6B + 1) % 2**32)
    uniform = (mixed_bits(bits) >> 8).astype(jnp.float32) / 2**24
    r = rewards.astype(jnp.float32)
    return jnp.where(uniform < share, 1 - r, r)


@ranged
def pattern_calibrated(
    rewards: Float[Array, "B"],
    patterns: Float[Array, "B"],
    *,
    threshold: float = 0.5,
    coefficient: NonNegative = 0.1,
) -> Float[Array, "B"]:
    """A reward model's score, raised where it is low and the completion shows reasoning patterns.

        r <- min(1, r + coefficient * p) where r < threshold

    Args:
      rewards: r, scores in [0, 1]; NaN does not apply and stays.
      patterns: p in [0, 1], as of `reasoning_patterns`; NaN counts as 0.
      threshold: scores below it are raised.
      coefficient: largest increase.

    Returns:
      One reward per row, float32.

    Reference: reasoning-pattern reward (2505.22653).
    Certainty: verified
    """
    chex.assert_rank([rewards, patterns], 1)
    chex.assert_equal_shape([rewards, patterns])
    r, p = rewards.astype(jnp.float32), patterns.astype(jnp.float32)
    raised = jnp.minimum(1.0, r + coefficient * jnp.where(jnp.isnan(p), 0.0, p))
    return jnp.where(r < threshold, jnp.maximum(r, raised), r)


@ranged
def spurious_rewards(
    correct: Float[Array, "B"],
    well_formed: Float[Array, "B"],
    prompt_id: Int[Array, "B"],
    sample: Int[Array, "B"],
    step: Int[Array, ""] | int,
    *,
    form: SpuriousForm = "random",
    seed: Natural,
) -> Float[Array, "B"]:
    """Spurious rewards; where they help as much as true ones, the model could already solve the task.

        format     f
        random     f 1[u >= 1/2]     u fresh for each sample
        incorrect  f (1 - c)

    Args:
      correct: c, 1 for a right answer.
      well_formed: f, 1 for a completion in the required format.
      prompt_id, sample, step: address of the random number.
      form: as above.
      seed: of the random numbers; the run's seed by default.

    Returns:
      One reward per row, 0 or 1.

    Raises:
      ValueError: for an unknown form.

    Reference: model-task alignment (2508.21188).
    Certainty: verified
    """
    chex.assert_rank([correct, well_formed, prompt_id, sample], 1)
    if form not in get_args(SpuriousForm):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(SpuriousForm))}")
    uniform = uniforms_at(jax.random.key(seed), step, prompt_id, sample)
    said = {"format": jnp.ones_like(uniform), "random": uniform >= 0.5, "incorrect": correct < 1}[form]
    return jnp.where(well_formed > 0, said, 0.0).astype(jnp.float32)
