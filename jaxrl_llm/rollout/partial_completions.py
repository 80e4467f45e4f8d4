"""Unfinished completions: their tokens so far and the values of each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.experience import Source


@struct.dataclass
class Written:
    """R completions so far, each array as in `Experience`.

    Attributes:
      tokens, logprobs, entropy: one column a token; columns that are not yet written hold fill values.
      source: a `Source` for each token.
      length: tokens so far.
      routes: experts of prompt and completion tokens; None where they are not recorded.
      support: tokens that each one was drawn from; None where that is not kept.
    """

    tokens: Int[Array, "R T"]
    logprobs: Float[Array, "R T"]
    entropy: Float[Array, "R T"]
    source: Int[Array, "R T"]
    length: Int[Array, "R"]
    routes: Int[Array, "R P+T L k"] | None
    support: Int[Array, "R T S"] | None = None

    def appended(self, row: Int[Array, "D"], counts: Bool[Array, "D"], values: Sequence[Array]) -> Written:
        """One sampled token more on those of `row` that count; `values` are the token and what is known of it."""
        to = jnp.where(counts, row, self.length.shape[0])
        at = self.length[row]
        token, logprob, entropy, *support = values
        put = lambda into, value: into.at[to, at].set(value, mode="drop")  # noqa: E731
        return replace(
            self,
            tokens=put(self.tokens, token),
            logprobs=put(self.logprobs, logprob),
            entropy=put(self.entropy, entropy),
            source=put(self.source, jnp.full(row.shape, Source.SAMPLED, self.source.dtype)),
            length=self.length.at[to].add(1, mode="drop"),
            support=None if self.support is None else put(self.support, support[0]),
        )

    def routed(self, row: Int[Array, "D"], at: Int[Array, "D F"], routes: Array | None) -> Written:
        """With the experts of tokens at places `at` of the completions, those below -P left out."""
        if self.routes is None or routes is None:
            return self
        prompt_width = self.routes.shape[1] - self.tokens.shape[1]
        column = jnp.where(at < -prompt_width, self.routes.shape[1], at + prompt_width)
        return replace(self, routes=self.routes.at[row[:, None], column].set(routes, mode="drop"))
