"""Latent attention: keys and values of all heads are projections of one narrow vector per token, which is cached.

The projections up are moved to the other side of both products, so that attention works on the latents themselves, as
if all query heads shared one key/value head whose keys hold the values:

    score = q_h . (K_h c) = (K_h^T q_h) . c,    sum_s w_s V_h c_s = V_h (sum_s w_s c_s)

Reference: DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3 (arXiv 2412.19437).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.models.cache import KeysAndValues, Rounded
from jaxrl_llm.models.layer_kinds import LatentConfig
from jaxrl_llm.models.projection import project
from jaxrl_llm.parallel.rules import constrain

# The norms of latents have their own epsilon.
NORM_EPSILON = 1e-6


def latent_queries_and_keys(
    params: Mapping[str, Any],
    x: Float[Array, "B T D"],
    latent: LatentConfig,
    norm: Callable[[Array, Array], Array],
    rotated: Callable[[Float[Array, "B T K G H"]], Float[Array, "B T K G H"]],
) -> tuple[Float[Array, "B T 1 N C"], Float[Array, "B T 1 C"]]:
    """Queries of all N heads and the one key of a token, in the space of latents, C = rank + rope_width.

    Args:
      params: of the block.
      x: normed input.
      latent: sizes.
      norm: (x, gain) -> normed.
      rotated: rotates queries or keys by the angles of their positions.
    """
    rank = latent.rank
    narrow = x if latent.query_rank is None else norm(project(x, params["query_down"]), params["query_norm"])
    queries = project(narrow, params["query_up"])
    plain, turning = jnp.split(queries, [latent.plain_width], axis=-1)
    up = params["latent_up"][..., : latent.plain_width].astype(x.dtype)
    plain = jnp.einsum("btnp,rnp->btnr", plain, up)
    queries = jnp.concatenate([plain, rotated(turning[:, :, None])[:, :, 0]], axis=-1)[:, :, None]
    queries = constrain(queries, "rows", "positions", None, "kv_heads")
    token = project(x, params["latent_down"])
    keys = jnp.concatenate(
        [norm(token[..., :rank], params["latent_norm"]), rotated(token[:, :, None, None, rank:])[:, :, 0, 0]], axis=-1
    )
    return queries, keys[:, :, None]


def latent_values(pair: KeysAndValues, rank: int) -> KeysAndValues:
    """Cached keys [B, 1, C, S] and the values that they contain."""
    keys = pair.keys
    if isinstance(keys, Rounded):
        return KeysAndValues(keys, Rounded(keys.values[..., :rank, :].swapaxes(-1, -2), keys.scale.swapaxes(-1, -2)))
    return KeysAndValues(keys, keys[..., :rank, :].swapaxes(-1, -2))


def latent_mixed(
    params: Mapping[str, Any], attended: Float[Array, "B T 1 N R"], latent: LatentConfig
) -> Float[Array, "B T N 1 H"]:
    """The mean latents of all heads as values of the heads."""
    up = params["latent_up"][..., latent.plain_width :].astype(attended.dtype)
    return jnp.einsum("btknr,rnh->btnkh", attended, up)
