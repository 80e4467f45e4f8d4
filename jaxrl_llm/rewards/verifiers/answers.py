"""Jittable verifiers: from completion tokens to rewards and to ids of answers.

The token ids are hyper-parameters; they default to the ids of the built-in character tokenizer.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.ranges import Natural, ranged
from jaxrl_llm.token_codes import SEEDS, token_codes

# Ids of `jaxrl_llm.data.CharacterTokenizer`, repeated because this module imports no other room; a test checks that
# both agree.
EOS_ID = 2
THINK_ID, THINK_END_ID = 3, 4
ANSWER_ID, ANSWER_END_ID = 5, 6
OTHER_CONTROL_IDS = (0, 1, 7, 8, 9, 10, 11, 12)
SPACE_IDS = (98, 99)

# Value of `answer_ids` for a completion without a closed answer; ids of answers are row numbers.
NO_ANSWER = -1


def _among(tokens: Int[Array, "B T"], ids: tuple[int, ...]) -> Bool[Array, "B T"]:
    return jnp.isin(tokens, jnp.asarray(ids, tokens.dtype)) if ids else jnp.zeros(tokens.shape, bool)


@ranged
def answer_span(
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    *,
    open_id: Natural = ANSWER_ID,
    close_id: Natural = ANSWER_END_ID,
    space_ids: tuple[Natural, ...] = SPACE_IDS,
) -> tuple[Int[Array, "B"], Int[Array, "B"], Bool[Array, "B"]]:
    """Position of the answer: between the last opening tag and the next closing tag, white space stripped.

    Args:
      tokens: completion tokens, right-padded.
      length: completion tokens including end of sequence; later tokens are ignored.
      open_id: id of the opening tag.
      close_id: id of the closing tag.
      space_ids: ids that are stripped at both ends.

    Returns:
      Position of the answer's first token, its number of tokens, and whether there is an answer (false where the last
      opening tag is not closed). An empty answer has size 0.
    """
    chex.assert_rank([tokens, length], [2, 1])
    position = jnp.arange(tokens.shape[1])[None, :]
    inside = position < length[:, None]
    opening = jnp.max(jnp.where(inside & (tokens == open_id), position, -1), axis=1, initial=-1)
    after = inside & (position > opening[:, None])
    end = tokens.shape[1]
    closing = jnp.min(jnp.where(after & (tokens == close_id), position, end), axis=1, initial=end)
    found = (opening >= 0) & (closing < end)
    text = after & (position < closing[:, None]) & ~_among(tokens, space_ids) & found[:, None]
    first = jnp.min(jnp.where(text, position, end), axis=1, initial=end)
    last = jnp.max(jnp.where(text, position, -1), axis=1, initial=-1)
    size = jnp.maximum(last - first + 1, 0)
    return jnp.where(size > 0, first, 0), size, found


@ranged
def answer_present(
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    *,
    open_id: Natural = ANSWER_ID,
    close_id: Natural = ANSWER_END_ID,
) -> Float[Array, "B"]:
    """1 where the completion holds a closed answer, right or wrong, else 0.

    Args:
      tokens: completion tokens, right-padded.
      length: completion tokens including end of sequence.
      open_id: id of the tag that opens an answer.
      close_id: id of the tag that closes it.

    Returns:
      One flag per row, 0 or 1.
    """
    return answer_span(tokens, length, open_id=open_id, close_id=close_id)[2].astype(jnp.float32)


@ranged
def answer_ids(
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    group: Int[Array, "B"],
    *,
    open_id: Natural = ANSWER_ID,
    close_id: Natural = ANSWER_END_ID,
    space_ids: tuple[Natural, ...] = SPACE_IDS,
) -> Int[Array, "B"]:
    """Integer ids of answers, equal for equal answers to a prompt, for votes and the entropy of answers.

        id_b = min { c : group_c = group_b and answer_c = answer_b },   NO_ANSWER = -1 without a closed answer

    Answers are compared token by token, as `exact_answer` does, by two 32-bit hashes: arrays are of [B, T] and [B, B],
    and two of a million different answers of one prompt would share an id with probability 3e-8.

    Args:
      tokens: completion tokens, right-padded.
      length: completion tokens including end of sequence.
      group: id of the group each row belongs to; answers of different groups have different ids.
      open_id: id of the tag that opens an answer.
      close_id: id of the tag that closes it.
      space_ids: ids that are stripped at both ends of an answer.

    Returns:
      One id per row: the lowest row of the group with this answer, or -1 in rows without an answer. An empty answer
      counts as an answer.

    >>> tokens = jnp.array([[5, 20, 6], [5, 21, 6], [5, 20, 6], [5, 20, 0]])
    >>> answer_ids(tokens, jnp.full(4, 3), jnp.zeros(4, jnp.int32)).tolist()
    [0, 1, 0, -1]
    """
    chex.assert_rank([tokens, length, group], [2, 1, 1])
    chex.assert_equal_shape_prefix([tokens, length, group], 1)
    first, size, found = answer_span(tokens, length, open_id=open_id, close_id=close_id, space_ids=space_ids)
    offset = jnp.arange(tokens.shape[1])[None, :] - first[:, None]
    inside = (offset >= 0) & (offset < size[:, None])

    def same_hash(seed: int) -> Bool[Array, "B B"]:
        codes = jnp.where(inside, token_codes(tokens, offset, seed=seed), jnp.uint32(0))
        total = codes.sum(axis=1, dtype=jnp.uint32)
        return total[:, None] == total

    same = same_hash(SEEDS[0]) & same_hash(SEEDS[1]) & (size[:, None] == size) & (group[:, None] == group) & found
    return jnp.where(found, jnp.argmax(same, axis=1), NO_ANSWER).astype(jnp.int32)


@ranged
def paired_answer_ids(
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    group: Int[Array, "B"],
    paired_group: Int[Array, "B"],
    *,
    open_id: Natural = ANSWER_ID,
    close_id: Natural = ANSWER_END_ID,
    space_ids: tuple[Natural, ...] = SPACE_IDS,
) -> Int[Array, "B"]:
    """`answer_ids` that are equal across the two groups of a pair, for votes of one group about the other.

    Args:
      tokens: completion tokens, right-padded.
      length: completion tokens including end of sequence.
      group: id of the group each row belongs to.
      paired_group: id of the group of the same problem in other words; negative for none.
      open_id: id of the tag that opens an answer.
      close_id: id of the tag that closes it.
      space_ids: ids that are stripped at both ends of an answer.

    Returns:
      One id per row, or -1 in rows without a closed answer.

    Reference: Co-Reward (2508.00410).
    Certainty: verified
    """
    pair = jnp.where(paired_group >= 0, jnp.minimum(group, paired_group), group)
    return answer_ids(tokens, length, pair, open_id=open_id, close_id=close_id, space_ids=space_ids)


@ranged
def exact_answer(
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    answer_tokens: Int[Array, "B A"],
    answer_length: Int[Array, "B"],
    *,
    open_id: Natural = ANSWER_ID,
    close_id: Natural = ANSWER_END_ID,
    space_ids: tuple[Natural, ...] = SPACE_IDS,
) -> Float[Array, "B"]:
    """1 where the completion's answer equals the reference answer token by token, else 0.

        r = [ tokens between the last <a> and the next </a>, white space stripped == answer_tokens ]

    Args:
      tokens: completion tokens, right-padded.
      length: completion tokens including end of sequence.
      answer_tokens: reference answer, right-padded.
      answer_length: tokens in each reference answer.
      open_id: id of the tag that opens an answer.
      close_id: id of the tag that closes it.
      space_ids: ids that are stripped at both ends of the completion's answer.

    Returns:
      One reward per row, 0 or 1. A completion without a closed answer gets 0.
    """
    chex.assert_rank([tokens, length, answer_tokens, answer_length], [2, 1, 2, 1])
    chex.assert_equal_shape_prefix([tokens, length, answer_tokens, answer_length], 1)
    if 0 in (tokens.shape[1], answer_tokens.shape[1]):
        return jnp.zeros(tokens.shape[0], jnp.float32)
    tests = answer_token_tests(
        tokens, length, answer_tokens, answer_length, open_id=open_id, close_id=close_id, space_ids=space_ids
    )
    _, size, found = answer_span(tokens, length, open_id=open_id, close_id=close_id, space_ids=space_ids)
    return (found & (size == answer_length) & (tests != 0).all(axis=1)).astype(jnp.float32)


@ranged
def answer_token_tests(
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    answer_tokens: Int[Array, "B A"],
    answer_length: Int[Array, "B"],
    *,
    open_id: Natural = ANSWER_ID,
    close_id: Natural = ANSWER_END_ID,
    space_ids: tuple[Natural, ...] = SPACE_IDS,
) -> Float[Array, "B A"]:
    """Each token of the reference answer as a separate test, for `weighted_tests`.

        p_j = [ token j of the answer == answer_tokens_j ]

    Args:
      tokens: completion tokens, right-padded.
      length: completion tokens including end of sequence.
      answer_tokens: reference answer, right-padded.
      answer_length: tokens in each reference answer.
      open_id: id of the tag that opens an answer.
      close_id: id of the tag that closes it.
      space_ids: ids that are stripped at both ends of the completion's answer.

    Returns:
      0 or 1 for each token, NaN after the reference answer. A completion without a closed answer passes no test.
    """
    first, size, found = answer_span(tokens, length, open_id=open_id, close_id=close_id, space_ids=space_ids)
    offset = jnp.arange(answer_tokens.shape[1])[None, :]
    position = jnp.minimum(first[:, None] + offset, tokens.shape[1] - 1)
    same = jnp.take_along_axis(tokens, position, axis=1) == answer_tokens
    passed = same & (offset < size[:, None]) & found[:, None]
    return jnp.where(offset < answer_length[:, None], passed.astype(jnp.float32), jnp.nan)


@ranged
def answer_format(
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    *,
    require_think: bool = True,
    think_open_id: Natural = THINK_ID,
    think_close_id: Natural = THINK_END_ID,
    open_id: Natural = ANSWER_ID,
    close_id: Natural = ANSWER_END_ID,
    eos_id: Natural = EOS_ID,
    forbidden_ids: tuple[Natural, ...] = OTHER_CONTROL_IDS,
) -> Float[Array, "B"]:
    """1 where the completion is one think pair, then one answer pair, then end of sequence, and nothing else.

    Args:
      tokens: completion tokens, right-padded.
      length: completion tokens including end of sequence.
      require_think: true requires exactly one think pair before the answer; false requires an answer pair only, and a
        think pair gets 0.
      think_open_id: id of the tag that opens the think part.
      think_close_id: id of the tag that closes it.
      open_id: id of the tag that opens the answer.
      close_id: id of the tag that closes it.
      eos_id: id of end of sequence.
      forbidden_ids: control tokens that must not occur in the completion.

    Returns:
      One flag per row, 0 or 1.
    """
    chex.assert_rank([tokens, length], [2, 1])
    chex.assert_equal_shape_prefix([tokens, length], 1)
    position = jnp.arange(tokens.shape[1])[None, :]
    inside = position < length[:, None]

    def once(token_id: int) -> tuple[Bool[Array, "B"], Int[Array, "B"]]:
        here = inside & (tokens == token_id)
        return here.sum(axis=1) == 1, jnp.max(jnp.where(here, position, -1), axis=1, initial=-1)

    one_open, opening = once(open_id)
    one_close, closing = once(close_id)
    one_end, end = once(eos_id)
    good = one_open & one_close & one_end & (opening < closing) & (end == closing + 1) & (end == length - 1)
    good &= ~jnp.any(inside & _among(tokens, forbidden_ids), axis=1)
    if require_think:
        one_think, think = once(think_open_id)
        one_think_end, think_end = once(think_close_id)
        good &= one_think & one_think_end & (think == 0) & (think_end > 0) & (opening == think_end + 1)
    else:
        good &= (opening == 0) & ~jnp.any(inside & _among(tokens, (think_open_id, think_close_id)), axis=1)
    return good.astype(jnp.float32)
