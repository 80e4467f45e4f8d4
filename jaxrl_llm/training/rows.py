"""Rows beyond plain samples: demonstrations within groups, greedy baselines, groups at another temperature."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxrl_llm.experience import Experience, Method, Prompts, Source
from jaxrl_llm.models.model import Model
from jaxrl_llm.training.provide import policy_view
from jaxrl_llm.training.wiring import call, fields_of, filled, signature


@dataclass(frozen=True)
class Extra:
    """Groups sampled on top, at a temperature of their own; the row field `extra` is True on them.

    Attributes:
      prompt_share: share of the prompts of a step, the first of them, that get such a group.
      temperature: a number above 0, or a `Method` that gives the temperature of the next step.
    """

    prompt_share: float
    temperature: float | Method

    def __post_init__(self):
        if not 0 < self.prompt_share <= 1:
            raise ValueError(
                f"rollout.extra.prompt_share is {self.prompt_share}; it is a share of the prompts, in (0, 1]"
            )
        if not isinstance(self.temperature, Method) and self.temperature <= 0:
            raise ValueError(f"rollout.extra.temperature is {self.temperature}; it must be above 0")

    def groups(self, prompts: int) -> int:
        """How many groups that makes."""
        return max(1, round(self.prompt_share * prompts))


def initial_temperature(method: Method) -> dict[str, Any]:
    """Memory of a temperature method and the first temperature, which is that after an empty batch."""
    memory = method.init()
    shapes = {"mask": (1, 1), "weight": (1,)}
    empty = {name: jnp.zeros(shapes.get(name, (1, 1)), jnp.float32) for name in signature(method).required}
    return {"memory": memory, "temperature": jnp.asarray(call(method, empty, memory)[0], jnp.float32)}


def next_temperature(method: Method, held: dict[str, Any], experience: Experience) -> dict[str, Any]:
    """Memory and temperature of the next step, from this step's rows."""
    temperature, memory = call(method, fields_of(experience), held["memory"])
    return {"memory": memory, "temperature": jnp.asarray(temperature, jnp.float32)}


def concatenated(*parts: Experience) -> Experience:
    """Rows one after the other; the parts know the same."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def with_demonstrations(
    model: Model, params: PyTree, rows: Experience, prompts: Prompts, *, temperature: float, pad_id: int
) -> Experience:
    """Each group with the reference completion of its prompt as one more sample, the last.

    Nobody knows the distribution that wrote it, so its log-probabilities and entropies are the policy's own.
    """
    if prompts.demonstration_tokens is None or prompts.demonstration_length is None:
        raise ValueError("prompts.demonstration_tokens is None; make the prompts with their reference completions")
    groups, width = prompts.tokens.shape[0], rows.tokens.shape[1]
    samples = rows.tokens.shape[0] // groups
    tokens = fitted(prompts.demonstration_tokens, width, pad_id)
    inside = jnp.arange(width) < prompts.demonstration_length[:, None]
    first = jax.tree.map(lambda x: x.reshape(groups, samples, *x.shape[1:])[:, 0], rows)
    written = replace(
        first,
        sample=jnp.full(groups, samples, jnp.int32),
        tokens=tokens,
        length=prompts.demonstration_length,
        source=jnp.where(inside, Source.DEMONSTRATION, Source.PAD).astype(jnp.int8),
        mask=inside.astype(jnp.float32),
        truncated=jnp.zeros(groups, bool),
    )
    known = policy_view(
        model, params, written, {"old_logprobs", "old_entropy"}, temperature=temperature, own_samples=False
    )
    written = replace(written, behaviour_logprobs=known.old_logprobs, behaviour_entropy=known.old_entropy)
    together = jax.tree.map(
        lambda x, y: jnp.concatenate([x.reshape(groups, samples, *x.shape[1:]), y[:, None].astype(x.dtype)], axis=1),
        rows,
        written,
    )
    return jax.tree.map(lambda x: x.reshape(groups * (samples + 1), *x.shape[2:]), together)


def fitted(tokens: Array, width: int, pad_id: int) -> Array:
    """Right-padded tokens in a given width, which the pipeline guarantees to hold them."""
    tokens = tokens[:, :width]
    return jnp.pad(tokens, ((0, 0), (0, width - tokens.shape[1])), constant_values=pad_id)


def greedy_last(rows: Experience, samples: int) -> Experience:
    """Rows of groups of samples + 1, of which the last is greedy: all samples first, then the greedy ones."""
    split = jax.tree.map(lambda x: x.reshape(-1, samples + 1, *x.shape[1:]), rows)
    sampled = jax.tree.map(lambda x: x[:, :samples].reshape(-1, *x.shape[2:]), split)
    return concatenated(sampled, jax.tree.map(lambda x: x[:, samples], split))


def with_baseline(rows: Experience, samples: int) -> Experience:
    """The samples alone, each with the reward of its prompt's greedy completion as `baseline_rewards`."""
    groups = rows.tokens.shape[0] // (samples + 1)
    sampled = jax.tree.map(lambda x: x[: groups * samples], rows)
    baseline = fields_of(rows)["rewards"][groups * samples :]
    return filled(sampled, baseline_rewards=jnp.repeat(baseline, samples))
