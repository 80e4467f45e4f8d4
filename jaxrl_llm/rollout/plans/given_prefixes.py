"""Completions that start with given texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jaxrl_llm.experience import Prompts, Source
from jaxrl_llm.ranges import Count, Natural, ranged
from jaxrl_llm.rollout.plans.plan import Plan, Request, require_inside
from jaxrl_llm.rollout.prefixes import Prefixes


@ranged
def prefixes(
    inner: Plan,
    *,
    texts: tuple[str, ...],
    encode: Callable[[str], Sequence[int]],
    max_completion_tokens: Count,
    pad_id: Natural,
) -> Plan:
    """Each equal block of a prompt's samples starts with one of the texts; they are hints, not trained on.

    Args:
      inner: how the samples are drawn.
      texts: one for each block.
      encode: text -> token ids.
      max_completion_tokens: longest completion, its prefix included.
      pad_id: fills what is shorter.

    Raises:
      ValueError: for texts that do not divide the samples of a prompt, or leave nothing of the completion.
    """
    require_inside("prefixes", inner, "drawn_by_policy", "equal_groups")
    ids = tuple(tuple(encode(text)) for text in texts)
    samples, longest = inner.samples, max(map(len, ids), default=0)
    if not ids or samples % len(ids):
        raise ValueError(
            f"prefixes has {len(ids)} texts, which do not divide rollout.samples_per_prompt {samples} into equal "
            "blocks; take a multiple"
        )
    if longest >= max_completion_tokens:
        raise ValueError(
            f"prefixes holds a text of {longest} tokens, which leaves nothing of rollout.max_completion_tokens "
            f"{max_completion_tokens}; shorten it or raise the limit"
        )
    block = samples // len(ids)

    def started(request: Request) -> Request:
        count = request.prompts.tokens.shape[0]
        chosen = [ids[min(number // block, len(ids) - 1)] for number in range(request.samples_per_prompt)]
        width = max(1, max(map(len, chosen)))
        tokens = jnp.asarray([[*one, *[pad_id] * (width - len(one))] for one in chosen], jnp.int32)
        length = jnp.asarray([len(one) for one in chosen], jnp.int32)
        tokens, length = jnp.tile(tokens, (count, 1)), jnp.tile(length, count)
        return request._replace(prefixes=Prefixes(tokens, length, jnp.full(tokens.shape, Source.HINT, jnp.int8)))

    def requests(memory: Any, carry: Any, prompts: Prompts) -> tuple[Request, ...]:
        return tuple(started(request) for request in inner.requests(memory, carry, prompts))

    return inner._replace(
        requests=requests,
        needs=inner.needs | {"prefixes"},
        lacks=inner.lacks | {"any_number"},
    )
