"""Stop texts as a token automaton: built on the host once, followed inside the compiled loop.

A stop text may be spread over tokens in many ways. The automaton reads bytes (Aho and Corasick 1975); its step over a
whole token is tabulated for every state and token, so that decoding follows it with one look-up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


class StopAutomaton(NamedTuple):
    """The state after each token.

    Attributes:
      following: [states, V] next state by state and token; the last state says that a stop text has been completed.
    """

    following: Int[Array, "S V"]

    @property
    def stopped(self) -> int:
        """The state that is reached when a stop text is complete."""
        return self.following.shape[0] - 1


def stop_automaton(texts: Sequence[str], token_bytes: Sequence[bytes | None]) -> StopAutomaton:
    """The automaton that finds any of the texts in a sequence of tokens.

    A completion ends with the token that completes a text, whatever else that token holds.

    Args:
      texts: stop texts, none of them empty.
      token_bytes: bytes of each token; None for tokens without text, which interrupt a stop text.

    Raises:
      ValueError: for an empty text, or one that no sequence of tokens spells.
    """
    patterns = [text.encode() for text in texts]
    if not patterns or any(not pattern for pattern in patterns):
        raise ValueError(f"stop is {list(texts)!r}; give texts that are not empty")
    _require_spelling(texts, patterns, {piece for piece in token_bytes if piece})
    step, done = _byte_automaton(patterns)
    states = len(step)
    following = np.zeros((states + 1, len(token_bytes)), np.int32)
    following[states] = states
    table = np.asarray(step, np.int32)
    accepting = np.asarray(done)
    for token, piece in enumerate(token_bytes):
        if not piece:
            continue
        at, found = np.arange(states), np.zeros(states, bool)
        for byte in piece:
            at = table[at, byte]
            found |= accepting[at]
        following[:states, token] = np.where(found, states, at)
    return StopAutomaton(jnp.asarray(following))


def _byte_automaton(patterns: Sequence[bytes]) -> tuple[list[list[int]], list[bool]]:
    """(next state by state and byte, whether a pattern ends in the state)."""
    children: list[dict[int, int]] = [{}]
    done = [False]
    for pattern in patterns:
        state = 0
        for byte in pattern:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
                done.append(False)
            state = children[state][byte]
        done[state] = True
    step = [[0] * 256 for _ in children]
    back = [0] * len(children)
    waiting = deque([0])
    while waiting:
        state = waiting.popleft()
        for byte in range(256):
            child = children[state].get(byte)
            fallback = step[back[state]][byte] if state else 0
            step[state][byte] = fallback if child is None else child
            if child is not None:
                back[child] = fallback
                done[child] = done[child] or done[fallback]
                waiting.append(child)
    return step, done


def _require_spelling(texts: Sequence[str], patterns: Sequence[bytes], pieces: set[bytes]) -> None:
    """Refuse a text that cannot occur. It may begin within one token and end within another."""
    longest = max(map(len, pieces), default=0)
    for text, pattern in zip(texts, patterns, strict=True):
        reached = {len(pattern)} if any(pattern in piece for piece in pieces) else {0}
        reached |= {n for n in range(1, len(pattern) + 1) if any(piece.endswith(pattern[:n]) for piece in pieces)}
        for place in range(len(pattern)):
            if place in reached:
                reached |= {
                    place + n
                    for n in range(1, min(longest, len(pattern) - place) + 1)
                    if pattern[place : place + n] in pieces
                }
                rest = pattern[place:]
                if any(piece.startswith(rest) for piece in pieces):
                    reached.add(len(pattern))
        if len(pattern) not in reached:
            raise ValueError(
                f"the stop text {text!r} cannot occur: no sequence of the tokenizer's tokens spells it; take it out, "
                "or write it as the tokenizer does"
            )
