"""Completions that go on from a position of earlier ones: branches, retries, re-concatenation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.experience import Experience, Prompts, Source
from jaxrl_llm.fields import provided_by
from jaxrl_llm.ranges import Count, Natural, ShareBelowOne, ranged
from jaxrl_llm.rollout.plans.plan import (
    Plan,
    Request,
    concatenated,
    finished,
    first_requests,
    numbers_before,
    require_inside,
)
from jaxrl_llm.rollout.prefixes import Prefixes
from jaxrl_llm.signatures import call, names


@ranged
def resume(
    inner: Plan,
    *,
    choose: Callable[..., Int[Array, "B"]],
    samples_per_prompt: Count,
    max_completion_tokens: Count,
    pad_id: Natural,
    branches: Count,
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
    _check(inner, samples_per_prompt, branches, hint, encode)
    behind = tuple(encode(hint)) if hint and encode is not None else ()
    own = Source.SAMPLED if trained_prefix else Source.HINT

    class Progress(NamedTuple):
        key: Array
        rows: Experience | None = None
        branched: Experience | None = None

    def requests(memory: Any, carry: Progress | None, prompts: Prompts) -> tuple[Request, ...]:
        if carry is None or carry.rows is None:
            before = numbers_before(prompts, branches)
            asked = first_requests(inner, memory, prompts)
            return tuple(request._replace(first_sample=request.first_sample + before) for request in asked)
        kept = carry.rows
        provided = kept.known() | {"key": carry.key}
        position = jnp.clip(call(choose, provided), 0, max_completion_tokens - 2 - len(behind))
        groups = kept.tokens.shape[0] // drawn
        origin = jnp.arange(branches) % drawn
        first = lambda x: x.reshape(groups, drawn, *x.shape[1:])[:, origin].reshape(-1, *x.shape[1:])  # noqa: E731
        tokens, length = first(kept.tokens), jnp.minimum(first(position), first(kept.length))
        source = jnp.where(first(kept.source) == Source.SAMPLED, own, first(kept.source))
        prefixes = _with_hint(tokens, length, source, behind, pad_id)
        number = numbers_before(prompts, samples_per_prompt) + drawn
        return (Request(prompts, branches, first_sample=number, prefixes=prefixes),)

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
        order = _group_order(count // branches, drawn, branches)
        rows = jax.tree.map(lambda x: x[order], both)
        return rows, {"resumed_tokens": _share(rows)}

    return inner._replace(
        init=lambda memory, key, prompts, rows: Progress(key),
        requests=requests,
        merge=merge,
        result=result,
        samples=samples_per_prompt,
        most_rounds=2,
        unrolled=True,
        reads_rewards=inner.reads_rewards or bool(names(choose) & provided_by("rewards")),
        provides=inner.provides | {"branch"},
        reports=frozenset({"resumed_tokens"}),
        needs=inner.needs | {"prefixes", "numbered_samples"},
        lacks=inner.lacks | {"one_round"} | (frozenset() if trained_prefix else frozenset({"drawn_by_policy"})),
    )


def _check(
    inner: Plan, samples_per_prompt: int, branches: int, hint: str, encode: Callable[[str], Sequence[int]] | None
) -> None:
    drawn = samples_per_prompt - branches
    require_inside("resume", inner, "one_round", "equal_groups", "one_group_a_prompt")
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
    if inner.provides:
        raise ValueError(
            f"resume is made around a plan whose rows know {sorted(inner.provides)[0]!r}, which branches do not; leave "
            "one of the two out"
        )
    if hint and encode is None:
        raise ValueError(f"resume.hint is {hint!r}, but there is no encode= (text -> token ids) to make tokens of it")


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


def _group_order(groups: int, drawn: int, branches: int) -> Int[Array, "B"]:
    """Rows of both rounds, those of a group one after the other: its first samples, then its branches."""
    number = jnp.arange(groups * (drawn + branches))
    place, group = number % (drawn + branches), number // (drawn + branches)
    return jnp.where(place < drawn, group * drawn + place, groups * drawn + group * branches + place - drawn)


def _share(rows: Experience) -> Float[Array, ""]:
    """Tokens of branches that were kept from earlier completions, a branch."""
    branch = rows["branch"]
    inside = jnp.arange(rows.tokens.shape[1]) < rows.length[:, None]
    kept = ((rows.source == Source.HINT) & inside).sum(1)
    return (kept * branch).sum() / jnp.maximum(branch.sum(), 1.0)


@ranged
def highest_entropy(
    behaviour_entropy: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    tokens: Int[Array, "B T"],
    prompt_id: Int[Array, "B"],
    sample: Int[Array, "B"],
    key: Array,
    *,
    candidates: Count = 20,
    excluded_ids: tuple[Natural, ...] | None = None,
) -> Int[Array, "B"]:
    """A position drawn evenly from those of highest entropy of each row: what comes before it is kept.

    The token at that position is drawn anew. The first token is no candidate: nothing would be kept.

    Args:
      behaviour_entropy: entropy that each token was drawn with.
      mask: 1 on tokens that may be chosen.
      tokens: completion tokens.
      prompt_id: id of each row's prompt.
      sample: number of the row within its group.
      key: random key of the step's plan; with prompt and sample it addresses the draw of a row.
      candidates: how many positions of a row are drawn from; all of them where it has fewer.
      excluded_ids: ids of tokens that are no candidates, such as control tokens.

    Returns:
      Tokens kept of each row; 0 where there is no candidate.

    Raises:
      ValueError: for fewer than one candidate.

    Reference: CURE (2508.11016).
    Certainty: verified
    """
    allowed = (mask > 0) & (jnp.arange(tokens.shape[1]) > 0)
    if excluded_ids:
        allowed &= ~jnp.isin(tokens, jnp.asarray(excluded_ids, tokens.dtype))
    drawn = jax.vmap(lambda row, number: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row), number)))
    return one_of_highest(behaviour_entropy, allowed, drawn(prompt_id, sample), candidates=candidates)


@ranged
def one_of_highest(
    scores: Float[Array, "B T"], allowed: Bool[Array, "B T"], uniform: Float[Array, "B"], *, candidates: Count
) -> Int[Array, "B"]:
    """The place of one of the highest scores of each row: number floor(u k) of the k best; 0 where none is allowed.

    >>> entropy, every = jnp.array([[2.0, 0.1, 1.5, 0.2, 0.9, 1.2]]), jnp.arange(6)[None] > 0
    >>> one_of_highest(entropy, every, jnp.array([0.4]), candidates=3).tolist()
    [5]
    """
    value, place = jax.lax.top_k(jnp.where(allowed, scores, -jnp.inf), min(candidates, scores.shape[1]))
    count = jnp.isfinite(value).sum(1)
    chosen = jnp.clip((uniform * count).astype(jnp.int32), 0, jnp.maximum(count - 1, 0))
    found = jnp.take_along_axis(place, chosen[:, None], axis=1)[:, 0]
    return jnp.where(count > 0, found, 0).astype(jnp.int32)


@ranged
def last_share(length: Int[Array, "B"], *, kept: ShareBelowOne = 0.5) -> Int[Array, "B"]:
    """The same share of each completion is kept.

    Raises:
      ValueError: for a share outside of [0, 1).
    """
    return jnp.floor(length * kept).astype(jnp.int32)


def from_the_start(length: Int[Array, "B"]) -> Int[Array, "B"]:
    """Nothing is kept: a retry, with a hint where there is one."""
    return jnp.zeros_like(length)
