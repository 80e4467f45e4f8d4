"""A language model that is the geometric mixture of two others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.models.heads import hidden_width
from jaxrl_llm.models.model import Model


def geometric_mixture(first: Model, second: Model, *, share: float) -> Model:
    """The model whose next token is drawn from the normalised product of two distributions.

        log q = (1 - share) * log p_first + share * log p_second - log Z

    Its parameters are the pair (those of `first`, those of `second`); hidden states of both stand side by side, and the
    cache is a pair. It is for sampling: it has no description that could be saved.

    Args:
      first, second: of one vocabulary.
      share: of the second, in [0, 1]; 0 is the first.

    Raises:
      ValueError: for a share outside [0, 1], or two vocabularies.

    Reference: Nash-MD (2312.00886).
    Certainty: verified
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it must lie in [0, 1]")
    if first.vocabulary_size != second.vocabulary_size:
        raise ValueError(
            f"a mixture of models needs one vocabulary, but they have {first.vocabulary_size} and "
            f"{second.vocabulary_size} tokens"
        )
    both, width = (first, second), hidden_width(first)

    def apply(params: Any, tokens: Any, positions: Any, cache: Any = None) -> tuple[Any, Any]:
        caches = (None, None) if cache is None else cache
        said = [m.apply(p, tokens, positions, c) for m, p, c in zip(both, params, caches, strict=True)]
        after = None if cache is None else tuple(c for _, c in said)
        return jnp.concatenate([hidden for hidden, _ in said], axis=-1), after

    def logits(params: Any, hidden: Any) -> Any:
        one, other = (
            jax.nn.log_softmax(m.logits(p, part), axis=-1)
            for m, p, part in zip(both, params, (hidden[..., :width], hidden[..., width:]), strict=True)
        )
        return (1 - share) * one + share * other

    def for_decoding(params: Any) -> Any:
        return tuple(p if m.for_decoding is None else m.for_decoding(p) for m, p in zip(both, params, strict=True))

    whole = all(m.take_rows is not None for m in both)
    return Model(
        init=lambda key: tuple(m.init(k) for m, k in zip(both, jax.random.split(key), strict=True)),
        apply=apply,
        logits=logits,
        init_cache=lambda rows, slots: tuple(m.init_cache(rows, slots) for m in both),
        expand_cache=lambda cache, samples, extra: tuple(
            m.expand_cache(c, samples, extra) for m, c in zip(both, cache, strict=True)
        ),
        specs=(first.specs, second.specs),
        vocabulary_size=first.vocabulary_size,
        config=None,
        for_decoding=for_decoding,
        take_rows=(
            (lambda cache, rows, extra: tuple(m.take_rows(c, rows, extra) for m, c in zip(both, cache, strict=True)))  # type: ignore[misc]
            if whole
            else None
        ),
    )
