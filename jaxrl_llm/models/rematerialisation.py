"""Blocks that keep less for the backward pass, and compute it again there."""

from __future__ import annotations

from collections.abc import Callable

import jax

from jaxrl_llm.models.transformer_config import Rematerialisation

# Under this name a block's attended values are found by the policy "attention".
ATTENDED = "attended"


def rematerialised(block: Callable, remat: Rematerialisation) -> Callable:
    """`block`, whose backward pass computes again what the policy does not keep. Numbers do not change.

    Args:
      block: any function of arrays.
      remat: "none" keeps everything; "full" its inputs alone; "dots" also the products of matrices, but not attention
        scores; "attention" what attention returned; "offload_dots" is "dots" with the products in the host's memory.
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
