"""Plans whose second round continues earlier completions from a position: branches and retries."""

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
    """Two rounds: the completions of `inner`, then `branches` of each prompt that continue some of these completions.

    Branch j of a prompt continues its j-th completion (modulo their number, if there are more branches than
    completions) from the position that `choose` returns; from position 0 it is a new completion. Completions and
    branches of a prompt are one group. The random numbers of a branch depend on its own sample number, so it differs
    from the completion that it continues, its origin.

    With `trained_origin: false`, tokens that a branch has in common with its origin are not trained on in the origin:
    they are the same in both, so they did not cause the difference of their rewards (pivotal credit). With
    `hint_is_learned: false` the branch is trained without the hint or view that it was sampled with (context
    distillation): the hint is removed, and the prompt is the plain one.

    Args:
      inner: plan of the first completions; it samples `samples_per_prompt - branches` of them.
      choose: fields of the rows (rewards, behaviour_entropy, mask, length, key, ...) -> number of tokens that are kept
        of each row.
      samples_per_prompt: rows of a group, branches included.
      max_completion_tokens: width of completions.
      pad_id: id of padding.
      branches: number of branches of each prompt.
      encode: text -> token ids of the hint; may be None without a hint.
      hint: text that is inserted after the kept tokens; it is never trained on.
      view: column of the data with the form of the prompt for branches, such as `privileged`; None: the plain prompt.
      trained_prefix: whether the policy's own tokens before the position are trained on in the branch.
      trained_origin: whether they are trained on in the origin.
      hint_is_learned: whether the hint stays in the row that is trained on; must be false with a view.

    Raises:
      ValueError: for sizes without branches or first completions, a hint without `encode`, a view with
        `hint_is_learned`, or `hint_is_learned: false` without a hint or view.

    Reference: CURE (2508.11016), R3L.
    """
    drawn = samples_per_prompt - branches
    if hint and encode is None:
        raise ValueError(f"resume.hint is {hint!r}, which needs encode= (text -> token ids); pass it")
    if not hint_is_learned and not hint and view is None:
        raise ValueError("resume.hint_is_learned is false, but there is no hint and no view to remove; set one of them")
    if view is not None and hint_is_learned:
        raise ValueError(
            f"resume.view is {view!r}, but rows are always trained with the plain prompt; set hint_is_learned to false"
        )
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
            # Completions without a branch keep the mask of all their tokens.
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
    """A position drawn uniformly from those with the highest entropies of each row; the tokens before it are kept.

    The token at this position is sampled again. The first token is excluded, since no token would be kept.

    Args:
      behaviour_entropy: entropy of the sampling distribution at each token.
      mask: 1 on tokens that may be chosen.
      tokens: completion tokens.
      prompt_id: id of each row's prompt.
      sample: number of the row within its group.
      key: random key of the step's plan; together with prompt and sample it determines the position of a row.
      candidates: number of positions of a row to draw from; a row with fewer has all its positions as candidates.
      excluded_ids: ids of tokens that are not candidates, such as control tokens.

    Returns:
      Number of tokens kept of each row; 0 for a row without candidates.

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
    """The index of one of the k highest scores of each row, number floor(u k) in falling order; 0 if none is allowed.

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
    """The number of tokens in the first share `kept` of each completion.

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
    """The number of tokens before a wrong completion first differs from the reference completion; 0 for a right one.

    In R3L the model chooses the position of the retry in a reflection; here the reference determines it.
    """
    width = min(tokens.shape[1], demonstration_tokens.shape[1])
    place = jnp.arange(width)
    same = (tokens[:, :width] == demonstration_tokens[:, :width]) & (place < length[:, None])
    common = jnp.cumprod(same & (place < demonstration_length[:, None]), axis=1).sum(1)
    return jnp.where(correct >= 1, 0, common).astype(jnp.int32)


def from_the_start(length: Int[Array, "B"]) -> Int[Array, "B"]:
    """0 for each row: no token is kept, so the branch is a retry, with the hint if there is one."""
    return jnp.zeros_like(length)
