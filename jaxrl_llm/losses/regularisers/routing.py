"""Load balance of a mixture of experts."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Loss


def router_balance(
    router_probabilities: Float[Array, "B S L E"],
    router_choices: Int[Array, "B S L k"],
    prompt_length: Int[Array, "B"],
    length: Int[Array, "B"],
    mask: Float[Array, "B T"],
    weight: Float[Array, "B"],
) -> Loss:
    """Load-balance loss of the router: equal use of all experts of a layer within each sequence.

        loss_b = mean_l  E * sum_e f_ble * P_ble,   f the share of e in all assignments, P its mean probability

    It is 1 where all experts are used equally, and E / k where the same k experts serve every token. As a sum over
    sequences it does not depend on the split of a batch, unlike the statistic over a whole batch
    (`jaxrl_llm.models.load_balancing_loss`).

    Args:
      router_probabilities: softmax of the router over all experts, for each token of prompt and completion, S = P + T.
      router_choices: the experts that served each token.
      prompt_length: real tokens of the prompt, which ends where the completion begins.
      length: real tokens of the completion.
      mask: read for its width T alone.
      weight: weight of each row.

    Returns:
      The loss as a sum over rows and their total weight.

    Reference: DeepSeek-V3 (2412.19437)
    Certainty: recalled
    """
    chex.assert_rank([router_probabilities, router_choices], 4)
    probabilities = router_probabilities.astype(jnp.float32)
    count, per_token = probabilities.shape[-1], router_choices.shape[-1]
    place = jnp.arange(probabilities.shape[1]) - (probabilities.shape[1] - mask.shape[1])
    real = (place >= -prompt_length[:, None]) & (place < length[:, None])
    share = real / jnp.maximum(real.sum(1, keepdims=True), 1)
    chosen = jax.nn.one_hot(router_choices, count, dtype=jnp.float32).sum(axis=-2)
    served = jnp.einsum("bs,bsle->ble", share, chosen) / per_token
    likely = jnp.einsum("bs,bsle->ble", share, probabilities)
    per_row = count * jnp.einsum("ble,ble->b", jax.lax.stop_gradient(served), likely) / probabilities.shape[2]
    weight = weight.astype(jnp.float32)
    return Loss(jnp.sum(weight * per_row), jnp.sum(weight))
