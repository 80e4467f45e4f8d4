"""The thought of a completion, and views with the reference answer after a thought."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.experience import Sequences
from jaxrl_llm.ranges import Natural, ranged


@ranged
def thought_length(tokens: Int[Array, "B T"], length: Int[Array, "B"], *, mark_id: Natural) -> Int[Array, "B"]:
    """Tokens of a completion up to and including its first mark; 0 without a mark (truncated thought).

    Args:
      tokens: completion tokens, right-padded.
      length: completion tokens including end of sequence; later tokens are ignored.
      mark_id: id of the token that ends a thought: that of the tag that closes it, or of the one that opens an answer.

    Returns:
      One count per row.

    >>> thought_length(jnp.array([[3, 9, 4, 5], [3, 9, 9, 4]]), jnp.array([4, 3]), mark_id=4).tolist()
    [3, 0]
    """
    chex.assert_rank([tokens, length], [2, 1])
    chex.assert_equal_shape_prefix([tokens, length], 1)
    position = jnp.arange(tokens.shape[1])[None, :]
    marked = (position < length[:, None]) & (tokens == mark_id)
    return jnp.where(marked.any(axis=1), jnp.argmax(marked, axis=1) + 1, 0).astype(jnp.int32)


@ranged
def thought_mask(
    tokens: Int[Array, "B T"], length: Int[Array, "B"], mask: Float[Array, "B T"], *, mark_id: Natural
) -> Float[Array, "B T"]:
    """The mask on the tokens of the thought alone: as an entry of credit for `mask` it trains only the thought.

        mask_t = mask_t if t < thought_length else 0

    Args:
      tokens: completion tokens, right-padded.
      length: completion tokens including end of sequence.
      mask: 1 on tokens that are trained on.
      mark_id: id of the token that ends a thought, which belongs to it.

    Returns:
      One mask per token; all 0 in rows without the mark.

    Reference: VeriFree (2505.21493).
    Certainty: verified
    """
    chex.assert_equal_shape([tokens, mask])
    inside = jnp.arange(tokens.shape[1])[None, :] < thought_length(tokens, length, mark_id=mark_id)[:, None]
    return jnp.where(inside, mask.astype(jnp.float32), 0.0)


@ranged
def answer_after_thought(
    prompt_tokens: Int[Array, "B P"],
    prompt_length: Int[Array, "B"],
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    answer_tokens: Int[Array, "B A"],
    answer_length: Int[Array, "B"],
    *,
    mark_id: Natural,
    opening_ids: tuple[Natural, ...] | None = None,
    closing_ids: tuple[Natural, ...] | None = None,
) -> Sequences:
    """A view with the reference answer in place of the sampled one, after the sampled thought.

    Prompt and thought are the prompt of the view; opening, reference answer and closing are scored. The thought ends
    with its mark, a single token, so that no sampled token is cut or merged with an answer token.

    Args:
      prompt_tokens: prompt tokens, left-padded.
      prompt_length: real tokens of each prompt.
      tokens: completion tokens, right-padded.
      length: completion tokens including end of sequence.
      answer_tokens: reference answer, right-padded.
      answer_length: tokens in each reference answer.
      mark_id: id of the token that ends a thought: that of the tag that closes it, or of the one that opens an answer.
      opening_ids: tokens before the answer, such as its opening tag; None for none.
      closing_ids: tokens after it, such as its closing tag and end of sequence; without them the likelihood of 1
        includes all answers that begin with 1. None for none.

    Returns:
      `Sequences`. In rows without the mark the mask is 0.

    Reference: VeriFree (2505.21493), NOVER (2505.16022).
    Certainty: verified
    """
    given = [prompt_tokens, prompt_length, tokens, length, answer_tokens, answer_length]
    chex.assert_rank(given, [2, 1, 2, 1, 2, 1])
    chex.assert_equal_shape_prefix(given, 1)
    thought = thought_length(tokens, length, mark_id=mark_id)
    ids = opening_ids or (), closing_ids or ()
    return _answer_behind(prompt_tokens, prompt_length, tokens, thought, answer_tokens, answer_length, *ids)


@ranged
def answer_without_thought(
    prompt_tokens: Int[Array, "B P"],
    prompt_length: Int[Array, "B"],
    answer_tokens: Int[Array, "B A"],
    answer_length: Int[Array, "B"],
    *,
    thought_ids: tuple[Natural, ...],
    closing_ids: tuple[Natural, ...] | None = None,
) -> Sequences:
    """A view with the reference answer after an empty thought, the baseline of a sampled thought.

    Args:
      prompt_tokens: prompt tokens, left-padded.
      prompt_length: real tokens of each prompt.
      answer_tokens: reference answer, right-padded.
      answer_length: tokens in each reference answer.
      thought_ids: tokens between prompt and answer, such as the mark that ends a thought; not scored.
      closing_ids: tokens after the answer, as in `answer_after_thought`; None for none.

    Returns:
      `Sequences`.

    Raises:
      ValueError: for empty `thought_ids`.

    Reference: RLPR (2506.18254).
    Certainty: verified
    """
    chex.assert_rank([prompt_tokens, prompt_length, answer_tokens, answer_length], [2, 1, 2, 1])
    if not thought_ids:
        raise ValueError("thought_ids is empty; give at least the mark that ends a thought")
    count = prompt_tokens.shape[0]
    tokens = jnp.broadcast_to(jnp.asarray(thought_ids, prompt_tokens.dtype), (count, len(thought_ids)))
    thought = jnp.full((count,), len(thought_ids), jnp.int32)
    closing = closing_ids or ()
    return _answer_behind(prompt_tokens, prompt_length, tokens, thought, answer_tokens, answer_length, (), closing)


def _answer_behind(prompt_tokens, prompt_length, tokens, thought, answer_tokens, answer_length, opening, closing):
    # Prompts are left-padded and thoughts are not, so each row is gathered at its own positions.
    behind, width = prompt_tokens.shape[1], prompt_tokens.shape[1] + tokens.shape[1]
    place = jnp.arange(width)[None, :] - (width - prompt_length - thought)[:, None]
    of_prompt = behind - prompt_length[:, None] + place
    of_thought = behind + place - prompt_length[:, None]
    both = jnp.concatenate([prompt_tokens, tokens.astype(prompt_tokens.dtype)], axis=1)
    at = jnp.where(place < prompt_length[:, None], of_prompt, of_thought)
    context = jnp.where(place >= 0, jnp.take_along_axis(both, jnp.clip(at, 0, width - 1), axis=1), 0)

    scored, size, inside = framed_answers(answer_tokens, answer_length, opening, closing)
    mask = (inside & (thought > 0)[:, None]).astype(jnp.float32)
    return Sequences(context, (prompt_length + thought).astype(jnp.int32), scored, size, mask)


def framed_answers(
    answer_tokens: Int[Array, "B A"], answer_length: Int[Array, "B"], opening: tuple[int, ...], closing: tuple[int, ...]
) -> tuple[Int[Array, "B F"], Int[Array, "B"], Bool[Array, "B F"]]:
    """(tokens, lengths, mask) of answers between an opening and a closing."""
    count = answer_tokens.shape[0]
    before = jnp.broadcast_to(jnp.asarray(opening, answer_tokens.dtype), (count, len(opening)))
    after = jnp.broadcast_to(jnp.asarray(closing, answer_tokens.dtype), (count, len(closing)))
    size = answer_length + len(opening) + len(closing)
    parts = jnp.concatenate([before, answer_tokens, after], axis=1)
    place = jnp.arange(parts.shape[1])[None, :]
    # The closing follows the answer directly, before its padding.
    shift = jnp.where(
        place >= (len(opening) + answer_length)[:, None], answer_tokens.shape[1] - answer_length[:, None], 0
    )
    inside = place < size[:, None]
    at = jnp.where(inside, place + shift, place)
    scored = jnp.where(inside, jnp.take_along_axis(parts, jnp.clip(at, 0, parts.shape[1] - 1), axis=1), 0)
    return scored, size.astype(jnp.int32), inside
