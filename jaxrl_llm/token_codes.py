"""Hashes of token sequences, for fast comparison."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

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
