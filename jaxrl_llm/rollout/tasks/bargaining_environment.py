"""A bargaining partner as JAX functions; `jaxrl_llm.data.tasks.bargaining` is the same in Python."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxrl_llm.data.tasks.bargaining import (
    ACCEPT,
    CONCESSION,
    FIRST_PERCENT,
    LAST_PERCENT,
    MOST_KINDS,
    MOST_UNITS,
    TURNS,
)
from jaxrl_llm.data.tokenizer import CharacterTokenizer
from jaxrl_llm.ranges import Count, NonNegative, ranged
from jaxrl_llm.rewards import answer_span
from jaxrl_llm.rollout.environments import Environment, Start, Step

_TOKENIZER = CharacterTokenizer()
_ID = _TOKENIZER.id
_ZERO = _ID("0")
# All choices of units of each kind, in ascending order of their digits.
_WAYS = np.array(list(product(range(MOST_UNITS + 1), repeat=MOST_KINDS)), np.int32)


class Bargain(NamedTuple):
    """The state of an episode: the units to divide, and the offer. Unused kinds have no units.

    Attributes:
      kinds: number of kinds of units.
      pool: number of units of each kind.
      own: value of a unit of each kind to the policy.
      partner: value of a unit of each kind to the partner.
      offer: number of units of each kind that the partner offers to the policy.
      taken: number of turns taken.
      agreed: whether there is a deal, which is then the offer.
    """

    kinds: Int[Array, ""]
    pool: Int[Array, "K"]
    own: Int[Array, "K"]
    partner: Int[Array, "K"]
    offer: Int[Array, "K"]
    taken: Int[Array, ""]
    agreed: Bool[Array, ""]


@ranged
def bargaining_partner(
    *,
    progress: bool = False,
    counter_duration: NonNegative = 0.0,
    max_turns: Count = TURNS,
    max_turn_tokens: Count = MOST_KINDS + 4,
) -> Environment:
    """A partner who accepts requests that leave it enough, and else makes the acceptable offer closest to the request.

        r = share of the deal                                              at the deal, else 0
        r = share of the offer after the turn - share of that before it    with `progress`; the sum is the same

    where a share is the value of units to the policy, divided by that of the whole pool. In turn s (from 0) the partner
    wants max(80 - 10 s, 50) % of the pool's value to it. A turn requests units, one digit per kind between answer tags,
    or accepts the offer with `y`. The observation is the offer, which has no units at the start. An invalid turn leaves
    it unchanged. Without a deal after `max_turns` turns, or after a turn that ends the sequence, rewards sum to 0.

    Args:
      progress: whether each turn is rewarded for the improvement of the offer.
      counter_duration: additional duration of a turn that the partner answers with its own offer, in units of a turn.
        It is only reported as `durations`; there is no waiting.
      max_turns: largest number of turns of an episode.
      max_turn_tokens: largest number of tokens of a turn.

    Returns:
      The environment. A deal with at least half of the pool's value to the policy is solved. The metrics are the share
      of episodes with a deal, and the shares of the value that both sides get in deals.
    """
    ways = jnp.asarray(_WAYS)

    def reset(start: Start, key: Array) -> Bargain:
        del key
        kinds = ((start.answer_length - 2) // 3).astype(jnp.int32)
        place = jnp.arange(MOST_KINDS)

        def part(number: int) -> Array:
            digits = jnp.take(start.answer_tokens, number * (kinds + 1) + place, mode="clip") - _ZERO
            return jnp.where(place < kinds, digits, 0).astype(jnp.int32)

        nothing = jnp.zeros(MOST_KINDS, jnp.int32)
        return Bargain(kinds, part(0), part(1), part(2), nothing, jnp.int32(0), jnp.bool_(False))

    def step(state: Bargain, turn_tokens: Array, turn_length: Array, key: Array) -> Step:
        del key
        first, count, _ = answer_span(turn_tokens[None], turn_length[None])
        place = jnp.arange(MOST_KINDS)
        said = jnp.take(turn_tokens, first[0] + place, mode="clip")
        digits = jnp.where(place < state.kinds, said - _ZERO, 0).astype(jnp.int32)
        asks = (count[0] == state.kinds) & jnp.all((digits >= 0) & (digits <= state.pool))
        accepts = (count[0] == 1) & (said[0] == _ID(ACCEPT))

        percent = jnp.maximum(FIRST_PERCENT - CONCESSION * state.taken, LAST_PERCENT)
        wants = percent * jnp.dot(state.pool, state.partner)
        left = state.pool - digits
        agrees = asks & (100 * jnp.dot(left, state.partner) >= wants)
        possible = jnp.all(ways <= state.pool, axis=1) & (100 * (ways @ state.partner) >= wants)
        far = jnp.where(possible, jnp.abs(ways - left).sum(axis=1), MOST_KINDS * MOST_UNITS + 1)
        counter = state.pool - ways[jnp.argmin(far)]  # the first of the nearest
        offer = jnp.where(agrees, digits, jnp.where(asks, counter, state.offer)).astype(jnp.int32)

        ended = turn_tokens[jnp.maximum(turn_length - 1, 0)] == _TOKENIZER.eos_id
        agreed = accepts | agrees
        over = agreed | ended | (state.taken + 1 >= max_turns)
        before, after = _share(state.offer, state.own, state.pool), _share(offer, state.own, state.pool)
        got = jnp.where(agreed, after, 0.0)
        reward = jnp.where(over, got, after) - before if progress else got
        state = state._replace(offer=offer, taken=state.taken + 1, agreed=agreed)
        seen = jnp.arange(MOST_KINDS + 2)
        inner = jnp.take(offer, seen - 1, mode="clip") + _ZERO
        closing = jnp.where(seen == state.kinds + 1, _ID("</o>"), _TOKENIZER.pad_id)
        tokens = jnp.where(seen == 0, _ID("<o>"), jnp.where(seen <= state.kinds, inner, closing))
        duration = 1.0 + counter_duration * (asks & ~agrees)
        return Step(state, tokens.astype(jnp.int32), state.kinds + 2, reward.astype(jnp.float32), over, duration)

    def metrics(state: Bargain) -> dict[str, tuple[Array, Array]]:
        deal = state.agreed.astype(jnp.float32)
        own = _share(state.offer, state.own, state.pool)
        partner = _share(state.pool - state.offer, state.partner, state.pool)
        return {
            "deal": (deal, jnp.float32(1.0)),
            "own_share": (own * deal, deal),
            "partner_share": (partner * deal, deal),
        }

    return Environment(
        reset=reset,
        step=step,
        max_turns=max_turns,
        max_turn_tokens=max_turn_tokens,
        max_observation_tokens=MOST_KINDS + 2,
        end_of_turn_ids=(_ID("<n>"), _TOKENIZER.eos_id),
        metrics=metrics,
        solved=lambda state: state.agreed & (_share(state.offer, state.own, state.pool) >= 0.5),
    )


def _share(units: Int[Array, "K"], values: Int[Array, "K"], pool: Int[Array, "K"]) -> Array:
    """The value of units divided by the value of the pool."""
    return jnp.dot(units, values) / jnp.maximum(jnp.dot(pool, values), 1)
