"""The reference completion of a prompt as one of its samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_llm.experience import Experience, Prompts, Source
from jaxrl_llm.ranges import Count, Natural, ranged
from jaxrl_llm.rollout.plans.plan import Plan, Request, numbers_before, require_inside
from jaxrl_llm.rollout.prefixes import Prefixes


@ranged
def demonstration_in_group(inner: Plan, *, max_completion_tokens: Count, pad_id: Natural) -> Plan:
    """The last sample of each group is the prompt's reference completion, which is trained on like the others.

    It is a completion that consists of its prefix. The distribution that wrote it is unknown, so its log-probabilities
    and entropies are the policy's own.

    Args:
      inner: how the other samples are drawn.
      max_completion_tokens: width of completions.
      pad_id: fills what is shorter.

    Raises:
      ValueError: for groups of one.
    """
    require_inside("demonstration_in_group", inner, "one_round", "equal_groups", "one_group_a_prompt", "any_number")
    if inner.samples < 2:
        raise ValueError(
            f"rollout.samples_per_prompt is {inner.samples}; the demonstration is one of them, so use at least 2"
        )
    samples, drawn = inner.samples, inner.samples - 1

    def requests(memory: Any, carry: Any, prompts: Prompts) -> tuple[Request, ...]:
        (one,) = inner.requests(memory, carry, prompts)
        tokens = fitted(prompts.fields["demonstration_tokens"], max_completion_tokens, pad_id)
        source = jnp.full(tokens.shape, Source.DEMONSTRATION, jnp.int8)
        written = Prefixes(tokens, prompts.fields["demonstration_length"], source)
        number = numbers_before(prompts, samples) + drawn
        return one._replace(samples_per_prompt=drawn), Request(prompts, 1, first_sample=number, prefixes=written)

    def merge(carry: Any, rows: Experience) -> Experience:
        groups = rows.tokens.shape[0] // samples
        split = groups * drawn
        sampled, written = (jax.tree.map(lambda x: x[part], rows) for part in (slice(split), slice(split, None)))  # noqa: B023
        inside = (written.source == Source.DEMONSTRATION).astype(jnp.float32)
        written = replace(written, mask=inside, truncated=jnp.zeros(groups, bool))

        def together(x, y):
            x = x.reshape(groups, drawn, *x.shape[1:])
            return jnp.concatenate([x, y[:, None].astype(x.dtype)], axis=1).reshape(-1, *x.shape[2:])

        return inner.merge(carry, jax.tree.map(together, sampled, written))

    return inner._replace(
        requests=requests,
        merge=merge,
        drawn=drawn,
        reads=inner.reads | {"demonstration_tokens", "demonstration_length"},
        needs=inner.needs | {"prefixes", "demonstrations"},
        lacks=inner.lacks | {"drawn_by_policy", "any_number"},
    )


def fitted(tokens: Array, width: int, pad_id: int) -> Array:
    """Right-padded tokens in a given width, which the pipeline guarantees to hold them."""
    tokens = tokens[:, :width]
    return jnp.pad(tokens, ((0, 0), (0, width - tokens.shape[1])), constant_values=pad_id)
