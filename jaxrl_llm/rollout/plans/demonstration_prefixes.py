"""Completions that continue the beginning of a demonstration, whose shown part shrinks over the run."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.experience import Experience, Source, uniforms_at
from jaxrl_llm.ranges import Count, Natural, PositiveShare, Share, ranged
from jaxrl_llm.rollout.plans.demonstrations_in_groups import fitted
from jaxrl_llm.rollout.plans.further_rows import Beginning, Given, further
from jaxrl_llm.rollout.plans.plan import Plan
from jaxrl_llm.rollout.prefixes import Prefixes


@ranged
def demonstration_prefix(
    inner: Plan,
    *,
    samples_per_prompt: Count,
    max_completion_tokens: Count,
    pad_id: Natural,
    total_steps: Count,
    branches: Count,
    first_share: PositiveShare = 0.95,
    last_share: Share = 0.05,
    least_share: Share = 0.0,
    least_tokens: Natural = 0,
    trained_share: Share = 0.2,
) -> Plan:
    """Of each group, `branches` completions start with the first tokens of the prompt's reference completion.

        length = min(max(least_tokens, floor(u L)), L - 1),   u uniform in [least_share, high],
        high = last_share + (1 + cos(pi step / total_steps)) / 2 (first_share - last_share)

    Prefix and continuation are one response with one reward, in the group of the others. Of all prefix tokens of the
    batch the `trained_share` of highest entropy are trained on, the others not: where the policy is sure, a
    demonstration teaches little. Nor are the continuations that were cut off at the limit. What the policy gives a
    prefix token before the update stands for the probability that it was drawn with.

    Args:
      inner: how the other completions are drawn.
      samples_per_prompt: rows of a group in the end.
      max_completion_tokens: width of completions.
      pad_id: fills what is shorter.
      total_steps: of the run, over which the prefixes get shorter.
      branches: completions of a group that start from the demonstration.
      first_share, last_share: longest prefix at the first and at the last step, as a share of the demonstration.
      least_share: shortest prefix.
      least_tokens: tokens that a prefix has at least.
      trained_share: of prefix tokens that are trained on.

    Raises:
      ValueError: for shares outside of [0, 1], or as for every plan of two rounds.

    Reference: Prefix-RFT (2507.01679).
    Certainty: verified
    """

    def begin(given: Given) -> Beginning:
        prompts = given.prompts
        tokens = jnp.repeat(fitted(prompts.fields["demonstration_tokens"], max_completion_tokens, pad_id), branches, 0)
        whole = jnp.repeat(prompts.fields["demonstration_length"], branches)
        number = jnp.tile(jnp.arange(branches), prompts.prompt_id.shape[0])
        high = cosine_share(given.step, first=first_share, last=last_share, steps=total_steps)
        uniform = uniforms_at(given.key, jnp.repeat(prompts.prompt_id, branches), number)
        length = prefix_length(uniform, whole, least_share, high, least_tokens=least_tokens)
        inside = jnp.arange(tokens.shape[1]) < length[:, None]
        source = jnp.where(inside, Source.DEMONSTRATION, Source.PAD).astype(jnp.int8)
        return Beginning(prompts, Prefixes(jnp.where(inside, tokens, pad_id), length, source))

    def finish(given: Given, more: Experience) -> tuple[Experience, Experience]:
        shown = more.source == Source.DEMONSTRATION
        taught = most_uncertain(more.behaviour_entropy, shown, share=trained_share)
        drawn = (more.source == Source.SAMPLED) & ~more.truncated[:, None]
        return given.rows, replace(more, mask=(taught | drawn).astype(jnp.float32))

    return further(
        inner,
        name="demonstration_prefix",
        branches=branches,
        samples_per_prompt=samples_per_prompt,
        begin=begin,
        finish=finish,
        report=lambda rows: {"prefix_tokens": _per_branch(rows)},
        counts_steps=True,
        reads=frozenset({"demonstration_tokens", "demonstration_length"}),
        reports=frozenset({"prefix_tokens"}),
        needs={"prefixes", "demonstrations"},
        lacks={"drawn_by_policy"},
    )


def _per_branch(rows: Experience) -> Float[Array, ""]:
    shown = (rows.source == Source.DEMONSTRATION).sum(1) * rows["branch"]
    return shown.sum() / jnp.maximum(rows["branch"].sum(), 1.0)


def cosine_share(step: Array | int, *, first: float, last: float, steps: int) -> Float[Array, ""]:
    """last + (1 + cos(pi step / steps)) / 2 (first - last), and `last` after these steps.

    >>> round(float(cosine_share(50, first=0.95, last=0.05, steps=100)), 6)
    0.5
    """
    done = jnp.clip(jnp.asarray(step, jnp.float32) / steps, 0.0, 1.0)
    return last + 0.5 * (1.0 + jnp.cos(jnp.pi * done)) * (first - last)


def prefix_length(
    uniform: Float[Array, "B"],
    length: Int[Array, "B"],
    low: float | Array,
    high: float | Array,
    *,
    least_tokens: int = 0,
) -> Int[Array, "B"]:
    """min(max(least_tokens, floor((low + u (high - low)) L)), L - 1): never the whole demonstration.

    >>> prefix_length(jnp.array([0.5, 0.9]), jnp.array([20, 1]), 0.2, 0.8).tolist()
    [10, 0]
    """
    share = low + uniform * (jnp.maximum(high, low) - low)
    found = jnp.floor(share * length + 1e-4).astype(jnp.int32)
    return jnp.clip(jnp.maximum(found, least_tokens), 0, jnp.maximum(length - 1, 0))


def most_uncertain(entropy: Float[Array, "B T"], inside: Bool[Array, "B T"], *, share: float) -> Bool[Array, "B T"]:
    """Of the tokens inside, all but the floor(n (1 - share)) of lowest entropy.

    >>> most_uncertain(jnp.array([[0.1, 0.9, 0.3, 0.7, 0.2]]), jnp.ones((1, 5), bool), share=0.2)[0].tolist()
    [False, True, False, False, False]
    """
    flat = jnp.where(inside, entropy, jnp.inf).reshape(-1)
    rank = jnp.zeros(flat.shape, jnp.int32).at[jnp.argsort(flat, stable=True)].set(jnp.arange(flat.shape[0]))
    left_out = jnp.floor(inside.sum() * (1.0 - share) + 1e-4)
    return inside & (rank.reshape(inside.shape) >= left_out)
