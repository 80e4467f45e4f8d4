"""The calculator as JAX functions, exact in 32 bits; `jaxrl_llm.data.tasks.calculator` is the same in Python."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxrl_llm.data.tasks.calculator import ERROR, LARGEST_RESULT, MOST_DIGITS, MOST_FAULTS, SPARE_CALLS
from jaxrl_llm.data.tokenizer import CharacterTokenizer
from jaxrl_llm.ranges import Count, NonNegative, Share, ranged
from jaxrl_llm.rewards import exact_answer
from jaxrl_llm.rollout.environments import Environment, Start, Step
from jaxrl_llm.token_codes import mixed_bits

_TOKENIZER = CharacterTokenizer()
_ID = _TOKENIZER.id
_ZERO, _PLUS, _MINUS, _TIMES = (_ID(c) for c in "0+-*")
# Two signs, two integers and the operator: longer calls are invalid.
CALL_TOKENS = 2 * (MOST_DIGITS + 1) + 1
# A sign and ten digits between the observation's tags.
RESULT_TOKENS = 2 + 1 + len(str(LARGEST_RESULT))


class ToolState(NamedTuple):
    """The state of an episode.

    Attributes:
      item: id of the item, which determines the injected faults.
      answer_tokens: the reference answer, right-padded.
      answer_length: number of its tokens.
      most_calls: largest number of calls of the item.
      calls: number of calls so far.
      errors: number of calls that returned ERR.
      faults: number of these that were injected.
      failed: tokens of the previous call if a fault was injected into it, else -1.
      right: whether the answer was right.
    """

    item: Int[Array, ""]
    answer_tokens: Int[Array, "A"]
    answer_length: Int[Array, ""]
    most_calls: Int[Array, ""]
    calls: Int[Array, ""]
    errors: Int[Array, ""]
    faults: Int[Array, ""]
    failed: Int[Array, "C"]
    right: Bool[Array, ""]


@ranged
def calculator_tool(
    *,
    most_operations: Count = 3,
    fault_probability: Share = 0.0,
    error_penalty: NonNegative = 0.0,
    spare_calls: Count = SPARE_CALLS,
    max_turn_tokens: Count = 32,
) -> Environment:
    """Calls of a tool that computes one operation on two integers, and then an answer.

    A turn with an answer between tags ends the episode. Any other turn is a call: the text between its last opening
    call tag and the next closing one must be +, - or * between two integers of at most seven digits, each with an
    optional minus. An invalid call or a result beyond 10^9 returns `ERR`. An item with k operations allows
    k + `spare_calls` calls. A further call, or a turn that ends the sequence without an answer, ends the episode
    without a reward for an answer.

    Args:
      most_operations: largest k, for the limit on turns.
      fault_probability: probability that a valid call returns ERR. The same call succeeds if it is repeated, and an
        episode has at most two such faults. They depend only on the item and the number of the call.
      error_penalty: subtracted from the reward of each turn that returns ERR (the paper's value is 0.05).
      spare_calls: number of calls beyond the operations of the item.
      max_turn_tokens: largest number of tokens of a turn.

    Returns:
      The environment; a right answer has reward 1. The metrics are calls, errors and faults per episode, and the share
      of right answers.
    """
    threshold = round(fault_probability * 2**24)

    def reset(start: Start, key: Array) -> ToolState:
        del key
        width = start.prompt_tokens.shape[0]
        inside = jnp.arange(width) >= width - start.prompt_length
        operators = jnp.isin(start.prompt_tokens, jnp.asarray([_PLUS, _MINUS, _TIMES])) & inside
        nothing = jnp.int32(0)
        return ToolState(
            item=start.prompt_id.astype(jnp.int32),
            answer_tokens=start.answer_tokens,
            answer_length=start.answer_length,
            most_calls=operators.sum().astype(jnp.int32) + spare_calls,
            calls=nothing,
            errors=nothing,
            faults=nothing,
            failed=jnp.full(CALL_TOKENS, -1, jnp.int32),
            right=jnp.bool_(False),
        )

    def step(state: ToolState, turn_tokens: Array, turn_length: Array, key: Array) -> Step:
        del key
        rows = (turn_tokens[None], turn_length[None])
        right = exact_answer(*rows, state.answer_tokens[None], state.answer_length[None])[0] > 0
        answered = _span(turn_tokens, turn_length, _ID("<a>"), _ID("</a>"))[2]
        ended = turn_tokens[jnp.maximum(turn_length - 1, 0)] == _TOKENIZER.eos_id

        called = ~answered
        call, size = call_tokens(turn_tokens, turn_length)
        fine, value = result(call, size)
        repeated = jnp.all(call == state.failed)
        drawn = (fault_bits(state.item, state.calls) >> 8) < jnp.uint32(threshold)
        fault = called & fine & ~repeated & (state.faults < MOST_FAULTS) & drawn
        served = fine & ~fault
        error = called & ~served
        observation, length = observation_tokens(served, value)
        state = state._replace(
            calls=state.calls + called,
            errors=state.errors + error,
            faults=state.faults + fault,
            failed=jnp.where(fault, call, jnp.where(called, -1, state.failed)),
            right=state.right | (answered & right),
        )
        reward = jnp.where(answered & right, 1.0, 0.0) - error_penalty * error
        over = answered | ended | (state.calls > state.most_calls)
        return Step(state, observation, length, reward.astype(jnp.float32), over)

    def metrics(state: ToolState) -> dict[str, tuple[Array, Array]]:
        once = jnp.float32(1.0)
        return {
            "tool_calls_per_episode": (state.calls.astype(jnp.float32), once),
            "tool_errors_per_episode": (state.errors.astype(jnp.float32), once),
            "tool_faults_per_episode": (state.faults.astype(jnp.float32), once),
            "right": (state.right.astype(jnp.float32), once),
        }

    return Environment(
        reset=reset,
        step=step,
        max_turns=most_operations + spare_calls + 1,
        max_turn_tokens=max_turn_tokens,
        max_observation_tokens=RESULT_TOKENS,
        end_of_turn_ids=(_ID("<n>"), _TOKENIZER.eos_id),
        metrics=metrics,
        solved=lambda state: state.right,
    )


def call_tokens(turn_tokens: Int[Array, "U"], turn_length: Int[Array, ""]) -> tuple[Int[Array, "C"], Int[Array, ""]]:
    """(tokens between the last opening call tag and the next closing one, padded with -1; their number)."""
    first, size, found = _span(turn_tokens, turn_length, _ID("<c>"), _ID("</c>"))
    place = jnp.arange(CALL_TOKENS)
    kept = jnp.take(turn_tokens, first + place, mode="clip")
    size = jnp.where(found, size, 0)
    return jnp.where(place < size, kept, -1).astype(jnp.int32), size


def result(call: Int[Array, "C"], size: Int[Array, ""]) -> tuple[Bool[Array, ""], Int[Array, ""]]:
    """(whether the call is valid, its exact value; 0 for an invalid call).

    Args:
      call: tokens of the call, padded with -1.
      size: number of tokens of the call, which may exceed C.
    """
    place = jnp.arange(CALL_TOKENS)
    digit = (call >= _ZERO) & (call < _ZERO + 10)
    operator = (call == _PLUS) | (call == _MINUS) | (call == _TIMES)
    left_start = (call[0] == _MINUS).astype(jnp.int32)
    # The first integer has at least one digit, so the operator comes after it.
    at = jnp.min(jnp.where(operator & (place > left_start), place, CALL_TOKENS))
    symbol = jnp.take(call, at, mode="clip")
    negative_right = jnp.take(call, at + 1, mode="clip") == _MINUS
    right_start = at + 1 + negative_right

    def integer(start: Array, end: Array) -> tuple[Array, Array]:
        inside = (place >= start) & (place < end)
        count = end - start
        valid = (count >= 1) & (count <= MOST_DIGITS) & jnp.all(digit | ~inside)
        power = jnp.clip(end - 1 - place, 0, MOST_DIGITS - 1)
        digits = jnp.where(inside & digit, call - _ZERO, 0)
        return valid, jnp.where(valid, jnp.sum(digits * jnp.int32(10) ** power), 0)

    left_valid, left = integer(left_start, at)
    right_valid, right = integer(right_start, size)
    # |a b| > limit if and only if |a| > floor(limit / |b|); this check does not overflow.
    fits = (symbol != _TIMES) | (right == 0) | (left <= LARGEST_RESULT // jnp.maximum(right, 1))
    fine = left_valid & right_valid & fits & (size <= CALL_TOKENS)
    left, right = jnp.where(fine, left, 0), jnp.where(fine, right, 0)
    left = jnp.where(left_start > 0, -left, left)
    right = jnp.where(negative_right, -right, right)
    value = jnp.where(symbol == _PLUS, left + right, jnp.where(symbol == _MINUS, left - right, left * right))
    return fine, value.astype(jnp.int32)


def observation_tokens(served: Bool[Array, ""], value: Int[Array, ""]) -> tuple[Int[Array, "O"], Int[Array, ""]]:
    """The value, or ERR, between observation tags, and the number of tokens."""
    place = jnp.arange(RESULT_TOKENS)
    size = jnp.abs(value)
    powers = 10 ** jnp.arange(len(str(LARGEST_RESULT)), dtype=jnp.int32)
    count = jnp.maximum(jnp.sum(size >= powers), 1)
    negative = (value < 0).astype(jnp.int32)
    # Digit j from the left is at index 1 + negative + j.
    exponent = count - 1 - (place - 1 - negative)
    digits = size // jnp.take(powers, jnp.clip(exponent, 0, len(powers) - 1)) % 10 + _ZERO
    number = jnp.where((place == 1) & (negative > 0), _MINUS, digits)
    error = jnp.asarray(_TOKENIZER.encode(ERROR))
    length = jnp.where(served, count + negative, len(error)) + 2
    inner = jnp.where(served, number, jnp.take(error, place - 1, mode="clip"))
    tokens = jnp.where(place == 0, _ID("<o>"), jnp.where(place == length - 1, _ID("</o>"), inner))
    return jnp.where(place < length, tokens, _TOKENIZER.pad_id).astype(jnp.int32), length.astype(jnp.int32)


def fault_bits(item: Int[Array, ""], call: Int[Array, ""]) -> Array:
    """32 pseudo-random bits, which depend on the item and the number of the call."""
    return mixed_bits(mixed_bits(item.astype(jnp.uint32) + 1) + call.astype(jnp.uint32))


def _span(tokens: Array, length: Array, opening: int, closing: int) -> tuple[Array, Array, Array]:
    """(start, number of tokens, whether it exists) of the span from the last opening tag to the next closing one."""
    place = jnp.arange(tokens.shape[0])
    inside = place < length
    begin = jnp.max(jnp.where(inside & (tokens == opening), place, -1))
    end = jnp.min(jnp.where(inside & (tokens == closing) & (place > begin), place, tokens.shape[0]))
    return begin + 1, end - begin - 1, (begin >= 0) & (end < tokens.shape[0])
