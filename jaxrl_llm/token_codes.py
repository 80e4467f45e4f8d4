"""Hashes of token sequences, for fast comparison."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

# Seeds of two independent hashes of a sequence.
SEEDS = (0x9E3779B9, 0x3C6EF372)


def mixed_bits(bits: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """32 bits, each of which depends on all input bits (the finaliser of MurmurHash3)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def token_codes(
    tokens: Int[Array, "..."], place: Int[Array, "..."] | int, *, seed: int = SEEDS[0]
) -> UInt32[Array, "..."]:
    """32 bits for each token at its position in a sequence; their sum (modulo 2^32) is a hash of the sequence.

    Args:
      tokens: ids.
      place: position of each token in its sequence, broadcast to the shape of `tokens`.
      seed: selects the hash function.
    """
    at = mixed_bits(jnp.asarray(place).astype(jnp.uint32) + jnp.uint32(seed))
    return mixed_bits(at ^ tokens.astype(jnp.uint32))


def ngram_codes(tokens: Int[Array, "B T"], ngram: int, *, seed: int = SEEDS[0]) -> UInt32[Array, "B N"]:
    """A hash of the n-gram that begins at each position, N = T - n + 1; `ngram` is at most T.

    >>> codes = ngram_codes(jnp.array([[4, 5, 4, 5, 6]]), 2)[0]
    >>> bool(codes[0] == codes[2]), bool(codes[0] == codes[1])
    (True, False)
    """
    places = tokens.shape[1] - ngram + 1
    codes = [token_codes(tokens[:, k : k + places], k, seed=seed) for k in range(ngram)]
    return jnp.stack(codes).sum(0, dtype=jnp.uint32)


def turn_codes(
    tokens: Int[Array, "B T"], turn: Int[Array, "B T"], counts: Bool[Array, "B T"], turns: int
) -> tuple[UInt32[Array, "B S"], Bool[Array, "B S"]]:
    """(a hash of the tokens of each turn that count, in their order; whether there are any, else the hash is 0).

    Args:
      tokens: ids.
      turn: index of the turn that each token belongs to, ascending where it counts.
      counts: tokens that are looked at.
      turns: S; later turns are left out.

    >>> codes, there = turn_codes(jnp.array([[4, 5, 4, 5, 5]]), jnp.array([[0, 0, 1, 1, 1]]), jnp.ones((1, 5), bool), 3)
    >>> bool(codes[0, 0] == codes[0, 1]), there[0].tolist()
    (False, [True, True, False])
    """
    rows, width = tokens.shape
    counts = counts & (turn >= 0) & (turn < turns)
    slot, row = jnp.where(counts, turn.astype(jnp.int32), turns), jnp.arange(rows)[:, None]
    place = jnp.cumsum(counts, axis=1, dtype=jnp.int32) - 1
    first = jnp.full((rows, turns + 1), width).at[row, slot].min(place)
    codes = token_codes(tokens, place - first[row, slot])
    total = jnp.zeros((rows, turns + 1), jnp.uint32).at[row, slot].add(codes)
    return total[:, :turns], first[:, :turns] < width
