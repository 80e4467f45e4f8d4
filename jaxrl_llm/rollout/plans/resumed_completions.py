"""Completions that continue earlier ones from a position: branches, retries, re-concatenation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.experience import Experience, Source, uniforms_at
from jaxrl_llm.fields import provided_by
from jaxrl_llm.ranges import Count, Natural, ShareBelowOne, ranged
from jaxrl_llm.rollout.plans.further_rows import Beginning, Given, further, origins
from jaxrl_llm.rollout.plans.plan import Plan
from jaxrl_llm.rollout.rewriting import as_learned, asked_in_form, beginnings, compacted, form_named
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
    view: str | None = None,
    trained_prefix: bool = False,
    trained_origin: bool = True,
    hint_is_learned: bool = True,
) -> Plan:
    """Two rounds: completions as `inner` draws them, then `branches` of each prompt that go on from some of them.

    Branch j of a prompt goes on from its j-th completion (counted round and round, where there are more branches than
    completions), cut at the position that `choose` gives; at position 0 it starts afresh. All are rows of one group. A
    branch continues the randomness of its own sample number, so it differs from the completion that it was cut from.

    With `trained_origin: false` the tokens that a branch kept are trained on in neither of the two: both have them, so
    they made no difference (pivotal credit). With `hint_is_learned: false` the branch is learned without the help that
    it was drawn with (context distillation): its hint is taken out, and it stands behind the plain prompt.

    Args:
      inner: how the first completions are drawn; it draws `samples_per_prompt - branches` of them.
      choose: names of rows (rewards, behaviour_entropy, mask, length, key, ...) -> tokens that are kept of each row.
      samples_per_prompt: rows of a group in the end.
      max_completion_tokens: width of completions.
      pad_id: fills what is shorter.
      branches: how many of them are branches.
      encode: text -> token ids, for a hint; may be None without one.
      hint: text that is placed behind what is kept; never trained on.
      view: column of the data with the form in which branches are asked, such as `privileged`; None asks as before.
      trained_prefix: the policy's own tokens before the position are trained on in the branch too.
      trained_origin: they are trained on in the completion that the branch was cut from.
      hint_is_learned: the hint and the view stay in the row that is learned.

    Raises:
      ValueError: for no branches, nothing that they could go on from, a hint that cannot be encoded, or help that is
        taken out where there is none.

    Reference: CURE (2508.11016), R3L.
    """
    drawn = samples_per_prompt - branches
    if hint and encode is None:
        raise ValueError(f"resume.hint is {hint!r}, but there is no encode= (text -> token ids) to make tokens of it")
    if not hint_is_learned and not hint and view is None:
        raise ValueError("resume.hint_is_learned is false, but there is no hint and no view to learn without; give one")
    if view is not None and hint_is_learned:
        raise ValueError(f"resume.view is {view!r}, which rows are never learned behind; set hint_is_learned to false")
    behind = tuple(encode(hint)) if hint and encode is not None else ()
    own = Source.SAMPLED if trained_prefix else Source.HINT

    def position(given: Given) -> Int[Array, "B"]:
        chosen = call(choose, given.rows.known() | {"key": given.key})
        return jnp.clip(chosen, 0, max_completion_tokens - 2 - len(behind))

    def begin(given: Given) -> Beginning:
        first = partial(origins, drawn=drawn, branches=branches)
        tokens, length = first(given.rows.tokens), jnp.minimum(first(position(given)), first(given.rows.length))
        source = first(given.rows.source)
        source = jnp.where(source == Source.SAMPLED, own, source)
        said = jnp.tile(jnp.asarray(behind, jnp.int32), (tokens.shape[0], 1))
        prefixes = beginnings(tokens, length, source, said, jnp.full_like(length, len(behind)), pad_id)
        asked = given.prompts
        if not hint_is_learned:
            form = (asked.tokens, asked.length) if view is None else form_named(asked, view)
            asked = asked_in_form(asked, *form)
        return Beginning(asked, prefixes)

    def finish(given: Given, more: Experience) -> tuple[Experience, Experience]:
        rows, place = given.rows, jnp.arange(given.rows.tokens.shape[1])
        cut = position(given)
        if not hint_is_learned:
            kept = origins(jnp.minimum(cut, rows.length), drawn, branches)[:, None]
            helped = (place >= kept) & (place < kept + len(behind))
            more = as_learned(compacted(more, ~helped, pad_id))
        if not trained_origin:
            # Origins that have no branch keep all of their tokens.
            number = jnp.arange(rows.tokens.shape[0]) % drawn
            shared = jnp.where(number < branches, cut, 0)
            rows = replace(rows, mask=jnp.where(place < shared[:, None], 0.0, rows.mask))
        return rows, more

    lacks = frozenset() if trained_prefix else frozenset({"drawn_by_policy"})
    return further(
        inner,
        name="resume",
        branches=branches,
        samples_per_prompt=samples_per_prompt,
        begin=begin,
        finish=finish,
        report=lambda rows: {"resumed_tokens": _share(rows)},
        reads_rewards=bool(names(choose) & provided_by("rewards")),
        reads=(names(choose) & provided_by("data")) | ({f"{view}_tokens", f"{view}_length"} if view else set()),
        reports=frozenset({"resumed_tokens"}),
        needs={"prefixes"} | ({"demonstrations"} if "demonstration_tokens" in names(choose) else set()),
        lacks=lacks if hint_is_learned else lacks | {"own_prompt", "drawn_by_policy"},
    )


def _share(rows: Experience) -> Float[Array, ""]:
    """Mean number of tokens that a branch keeps from an earlier completion."""
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
    drawn = uniforms_at(key, prompt_id, sample)
    return one_of_highest(behaviour_entropy, allowed, drawn, candidates=candidates)


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


def first_departure(
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    demonstration_tokens: Int[Array, "B D"],
    demonstration_length: Int[Array, "B"],
    correct: Float[Array, "B"],
) -> Int[Array, "B"]:
    """The tokens before a wrong completion first leaves the reference completion; a right one is started anew.

    It replaces a reflection that chooses the position of the retry.
    """
    width = min(tokens.shape[1], demonstration_tokens.shape[1])
    place = jnp.arange(width)
    same = (tokens[:, :width] == demonstration_tokens[:, :width]) & (place < length[:, None])
    common = jnp.cumprod(same & (place < demonstration_length[:, None]), axis=1).sum(1)
    return jnp.where(correct >= 1, 0, common).astype(jnp.int32)


def from_the_start(length: Int[Array, "B"]) -> Int[Array, "B"]:
    """No token is kept: a retry, with the hint if there is one."""
    return jnp.zeros_like(length)
