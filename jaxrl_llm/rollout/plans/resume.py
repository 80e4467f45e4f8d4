"""Completions that go on from a position of earlier ones: branches, retries, re-concatenation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Experience, Prompts, Source
from jaxrl_llm.rollout.generate import Prefixes
from jaxrl_llm.rollout.plans.plan import Plan, Request, concatenated, finished, first_requests
from jaxrl_llm.signatures import call, names


def resume(
    inner: Plan,
    *,
    choose: Callable[..., Int[Array, "B"]],
    samples_per_prompt: int,
    max_completion_tokens: int,
    pad_id: int,
    branches: int,
    encode: Callable[[str], Sequence[int]] | None,
    hint: str = "",
    trained_prefix: bool = False,
) -> Plan:
    """Two rounds: completions as `inner` draws them, then `branches` of each prompt that go on from some of them.

    Branch j of a prompt goes on from its j-th completion (counted round and round, where there are more branches than
    completions), cut at the position that `choose` gives; at position 0 it starts afresh. All are rows of one group. A
    branch continues the randomness of its own sample number, so it differs from the completion that it was cut from.

    Args:
      inner: how the first completions are drawn; it draws `samples_per_prompt - branches` of them.
      choose: names of rows (rewards, behaviour_entropy, mask, length, key, ...) -> tokens that are kept of each row.
      samples_per_prompt: rows of a group in the end.
      max_completion_tokens: width of completions.
      pad_id: fills what is shorter.
      branches: how many of them are branches.
      encode: text -> token ids, for a hint; may be None without one.
      hint: text that is placed behind what is kept; never trained on.
      trained_prefix: the policy's own tokens before the position are trained on in the branch too.

    Raises:
      ValueError: for no branches, nothing that they could go on from, or a hint that cannot be encoded.
    """
    drawn = samples_per_prompt - branches
    if not 0 < branches < samples_per_prompt:
        raise ValueError(
            f"resume.branches is {branches} of rollout.samples_per_prompt {samples_per_prompt}; there must be a branch "
            "and a completion that it goes on from"
        )
    if inner.samples != drawn:
        raise ValueError(
            f"resume.branches is {branches}, but the plan inside of it draws {inner.samples} completions of a prompt, "
            f"not {drawn}"
        )
    if hint and encode is None:
        raise ValueError(f"resume.hint is {hint!r}, but there is no encode= (text -> token ids) to make tokens of it")
    behind = tuple(encode(hint)) if hint and encode is not None else ()
    own = Source.SAMPLED if trained_prefix else Source.HINT

    class Progress(NamedTuple):
        key: Array
        rows: Experience | None = None
        branched: Experience | None = None

    def requests(memory: Any, carry: Progress | None, prompts: Prompts) -> tuple[Request, ...]:
        if carry is None or carry.rows is None:
            return first_requests(inner, memory, prompts)
        kept = carry.rows
        provided = kept.known() | {"key": carry.key}
        position = jnp.clip(call(choose, provided), 0, max_completion_tokens - 2 - len(behind))
        groups = kept.tokens.shape[0] // drawn
        origin = jnp.arange(branches) % drawn
        first = lambda x: x.reshape(groups, drawn, *x.shape[1:])[:, origin].reshape(-1, *x.shape[1:])  # noqa: E731
        tokens, length = first(kept.tokens), jnp.minimum(first(position), first(kept.length))
        source = jnp.where(first(kept.source) == Source.SAMPLED, own, first(kept.source))
        return (
            Request(
                prompts,
                branches,
                first_sample=drawn,
                prefixes=_with_hint(tokens, length, source, behind, pad_id),
            ),
        )

    def merge(carry: Progress, rows: Experience) -> Progress:
        if carry.rows is None:
            return carry._replace(rows=finished(inner, rows)[0])
        return carry._replace(branched=rows)

    def result(carry: Progress) -> tuple[Experience, dict[str, Array]]:
        assert carry.rows is not None  # both rounds are over
        assert carry.branched is not None
        count = carry.branched.tokens.shape[0]
        first = carry.rows.filled(branch=jnp.zeros(carry.rows.tokens.shape[0], jnp.float32))
        both = concatenated(first, carry.branched.filled(branch=jnp.ones(count, jnp.float32)))
        groups = count // branches
        number = jnp.arange(groups * samples_per_prompt).reshape(groups, samples_per_prompt)
        place, group = number % samples_per_prompt, number // samples_per_prompt
        order = jnp.where(place < drawn, group * drawn + place, groups * drawn + group * branches + place - drawn)
        rows = jax.tree.map(lambda x: x[order.reshape(-1)], both)
        return rows, {"resumed_tokens": _share(rows)}

    return inner._replace(
        init=lambda memory, key, prompts, rows: Progress(key),
        requests=requests,
        merge=merge,
        result=result,
        samples=samples_per_prompt,
        most_rounds=2,
        unrolled=True,
        reads_rewards=inner.reads_rewards or bool(names(choose) & {"rewards", "correct", "reward_components"}),
        provides=inner.provides | {"branch"},
        reports=frozenset({"resumed_tokens"}),
        needs=inner.needs | {"one_round", "equal_groups", "one_group_a_prompt", "prefixes", "numbered_samples"},
        lacks=inner.lacks | {"one_round"} | (frozenset() if trained_prefix else frozenset({"drawn_by_policy"})),
    )


def _with_hint(
    tokens: Int[Array, "B T"], length: Int[Array, "B"], source: Int[Array, "B T"], hint: tuple[int, ...], pad_id: int
) -> Prefixes:
    """What is kept of each row, with the hint behind it."""
    width = tokens.shape[1] - 1
    place = jnp.arange(width)
    inside = place < length[:, None]
    kept = jnp.where(inside, tokens[:, :width], pad_id)
    origin = jnp.where(inside, source[:, :width], Source.PAD)
    if not hint:
        return Prefixes(kept, length, origin.astype(jnp.int8))
    at = place - length[:, None]
    within = (at >= 0) & (at < len(hint))
    said = jnp.asarray(hint, jnp.int32)[jnp.clip(at, 0, len(hint) - 1)]
    origin = jnp.where(within, Source.HINT, origin).astype(jnp.int8)
    return Prefixes(jnp.where(within, said, kept), length + len(hint), origin)


def _share(rows: Experience) -> Float[Array, ""]:
    """Tokens of branches that were kept from earlier completions, a branch."""
    branch = rows["branch"]
    inside = jnp.arange(rows.tokens.shape[1]) < rows.length[:, None]
    kept = ((rows.source == Source.HINT) & inside).sum(1)
    return (kept * branch).sum() / jnp.maximum(branch.sum(), 1.0)


def highest_entropy(
    behaviour_entropy: Float[Array, "B T"], mask: Float[Array, "B T"], key: Array, *, tokens: int = 20
) -> Int[Array, "B"]:
    """A position drawn evenly from the `tokens` of highest entropy of each row: what comes before it is kept.

    Args:
      behaviour_entropy: entropy that each token was drawn with.
      mask: 1 on tokens that may be chosen.
      key: random key of the step's plan.
      tokens: how many candidates a row has.

    Returns:
      Tokens kept of each row.

    Raises:
      ValueError: for fewer than one candidate.

    Reference: CURE (2508.11016).
    """
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; at least one position must be a candidate")
    most = min(tokens, behaviour_entropy.shape[1])
    scored = jnp.where(mask > 0, behaviour_entropy, -jnp.inf)
    value, place = jax.lax.top_k(scored, most)
    count = jnp.maximum(jnp.isfinite(value).sum(1), 1)
    drawn = jax.random.uniform(key, count.shape)
    chosen = jnp.minimum((drawn * count).astype(jnp.int32), count - 1)
    return jnp.take_along_axis(place, chosen[:, None], axis=1)[:, 0].astype(jnp.int32)


def last_share(length: Int[Array, "B"], *, kept: float = 0.5) -> Int[Array, "B"]:
    """The same share of each completion is kept.

    Raises:
      ValueError: for a share outside of [0, 1).
    """
    if not 0 <= kept < 1:
        raise ValueError(f"kept is {kept}; it is a share of the completion and must lie in [0, 1)")
    return jnp.floor(length * kept).astype(jnp.int32)


def from_the_start(length: Int[Array, "B"]) -> Int[Array, "B"]:
    """Nothing is kept: a retry, with a hint where there is one."""
    return jnp.zeros_like(length)
