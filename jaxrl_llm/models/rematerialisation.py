"""Rematerialisation: blocks that store fewer activations and recompute the rest in the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import jax

from jaxrl_llm.models.transformer_config import Rematerialisation

# Checkpoint name of the output of attention, which the policy "attention" stores.
ATTENDED = "attended"


def rematerialised(block: Callable, remat: Rematerialisation) -> Callable:
    """`block` with a backward pass that recomputes the activations that the policy does not store; same numbers.

    Args:
      block: any function of arrays.
      remat: which activations are stored. "none": all; "full": only the inputs; "dots": also the products of matrices,
        but not attention scores; "attention": also the output of attention; "offload_dots": as "dots", with the
        products in the host's memory.
    """
    policies = jax.checkpoint_policies
    if remat == "none":
        return block
    policy = {
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "attention": policies.save_only_these_names(ATTENDED),
        "offload_dots": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    }[remat]
    return jax.checkpoint(block, policy=policy)
