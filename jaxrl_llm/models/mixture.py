"""Language models for sampling that combine two networks: a geometric mixture, and value-guided decoding."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.models.heads import at_last, head_outputs, hidden_width, init_head
from jaxrl_llm.models.model import Model
from jaxrl_llm.ranges import Count, NonNegative, ranged


def geometric_mixture(first: Model, second: Model, *, share: float) -> Model:
    """The model whose next token is drawn from the normalised product of two distributions.

        log q = (1 - share) * log p_first + share * log p_second - log Z

    Its parameters are the pair (those of `first`, those of `second`); the hidden states of both are concatenated, and
    the cache is a pair. It is for sampling only: it has no config and cannot be saved.

    Args:
      first, second: models with the same vocabulary.
      share: weight of the second, in [0, 1]; 0 is the first.

    Raises:
      ValueError: for a share outside [0, 1], or different vocabularies.

    Reference: Nash-MD (2312.00886).
    Certainty: verified
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it must lie in [0, 1]")
    if first.vocabulary_size != second.vocabulary_size:
        raise ValueError(
            f"models of a mixture must have the same vocabulary, but they have {first.vocabulary_size} and "
            f"{second.vocabulary_size} tokens; use models of one tokenizer"
        )
    both, width = (first, second), hidden_width(first)

    def apply(params: Any, tokens: Any, positions: Any, cache: Any = None) -> tuple[Any, Any]:
        caches = (None, None) if cache is None else cache
        results = [m.apply(p, tokens, positions, c) for m, p, c in zip(both, params, caches, strict=True)]
        after = None if cache is None else tuple(c for _, c in results)
        return jnp.concatenate([hidden for hidden, _ in results], axis=-1), after

    def logits(params: Any, hidden: Any) -> Any:
        one, other = (
            jax.nn.log_softmax(m.logits(p, part), axis=-1)
            for m, p, part in zip(both, params, (hidden[..., :width], hidden[..., width:]), strict=True)
        )
        return (1 - share) * one + share * other

    def for_decoding(params: Any) -> Any:
        return tuple(p if m.for_decoding is None else m.for_decoding(p) for m, p in zip(both, params, strict=True))

    def init(key: Any) -> Any:
        return tuple(m.init(k) for m, k in zip(both, jax.random.split(key), strict=True))

    return _of_two(both, init, apply, logits, for_decoding)._replace(specs=(first.specs, second.specs))


def _of_two(both: tuple[Model, Model], init: Any, apply: Any, logits: Any, for_decoding: Any) -> Model:
    """A model for sampling whose cache is the pair of the caches of two models."""
    whole = all(m.take_rows is not None for m in both)
    return Model(
        init=init,
        apply=apply,
        logits=logits,
        init_cache=lambda rows, slots: tuple(m.init_cache(rows, slots) for m in both),
        expand_cache=lambda cache, samples, extra: tuple(
            m.expand_cache(c, samples, extra) for m, c in zip(both, cache, strict=True)
        ),
        specs=None,
        vocabulary_size=both[0].vocabulary_size,
        config=None,
        for_decoding=for_decoding,
        take_rows=(
            (lambda cache, rows, extra: tuple(m.take_rows(c, rows, extra) for m, c in zip(both, cache, strict=True)))  # type: ignore[misc]
            if whole
            else None
        ),
    )


def value_augmented_logits(
    logits: Float[Array, "B V"], candidates: Int[Array, "B K"], values: Float[Array, "B K"], *, strength: float = 3.0
) -> Float[Array, "B V"]:
    """Logits of next tokens, changed by how far the value of each candidate is above the mean of the candidates.

        q_a = V(prefix + a) - mean over the candidates of V,   logits_a + strength * q_a for candidates a

    If all tokens are candidates, samples follow p * exp(strength * V) / Z.

    Args:
      logits: of the next token.
      candidates: ids of K tokens of each row, without repetition.
      values: V of the prefix followed by each candidate.
      strength: nats per unit of value, 1 / beta of the KL-regularised problem.

    Reference: Value augmented sampling (2405.06639).
    Certainty: verified
    """
    chex.assert_equal_shape([candidates, values])
    q = values.astype(jnp.float32) - values.astype(jnp.float32).mean(-1, keepdims=True)
    return logits.astype(jnp.float32).at[jnp.arange(len(logits))[:, None], candidates].add(strength * q)


@ranged
def value_guided(base: Model, value: Model, *, strength: NonNegative = 3.0, candidates: Count = 20) -> Model:
    """A model that samples from `value_augmented_logits`, with the most likely tokens of a base model as candidates.

    Its parameters are the pair (those of `base`, those of the value network: `head` and `backbone`); the cache is a
    pair. At each token the value network evaluates each candidate as a continuation, from a shared cache. It is for
    sampling only: for several tokens at a time, such as a prompt, guidance applies to the last position, and the other
    positions have the logits of the base. It has no config and cannot be saved.

    Args:
      base: the policy.
      value: the architecture of the value network's backbone, with the vocabulary of the base.
      strength: nats per unit of value; 0 is the base.
      candidates: K, the number of most likely tokens; the other tokens keep the logits of the base.

    Raises:
      ValueError: for different vocabularies, a negative strength, or no candidate.

    Reference: Value augmented sampling (2405.06639).
    Certainty: verified
    """
    if base.vocabulary_size != value.vocabulary_size:
        raise ValueError(
            f"a value network that guides sampling must have the policy's vocabulary, but the policy has "
            f"{base.vocabulary_size} tokens and the value network {value.vocabulary_size}; use one tokenizer for both"
        )
    count = min(candidates, base.vocabulary_size)
    token = jnp.zeros((1, 1), jnp.int32)
    state = jax.eval_shape(lambda key: base.apply(base.init(key), token, token, None)[0], jax.random.key(0))
    width = state.shape[-1]

    def apply(params: Any, tokens: Any, positions: Any, cache: Any = None) -> tuple[Any, Any]:
        own, judge = params
        rows = len(tokens)
        before = (None, value.init_cache(*tokens.shape)) if cache is None else cache
        hidden, after = base.apply(own, tokens, positions, before[0])
        _, seen = value.apply(judge["backbone"], tokens, positions, before[1])
        ids = jax.lax.top_k(base.logits(own, at_last(hidden, positions)), count)[1]
        end = positions.max(1)
        following = jnp.where(end < 0, -1, end + 1)
        branches, one = value.expand_cache(seen, count, 1), (rows * count, 1)
        states, _ = value.apply(
            judge["backbone"], ids.reshape(one), jnp.repeat(following, count).reshape(one), branches
        )
        values = head_outputs(judge["head"], states[:, 0])[..., 0].reshape(rows, count)
        ids_and_values = jnp.concatenate([ids.astype(jnp.float32), values], axis=-1)
        last = jnp.arange(tokens.shape[1]) == jnp.argmax(positions, axis=1)[:, None]
        guidance = jnp.where(last[..., None], ids_and_values[:, None], 0.0)
        return jnp.concatenate([hidden.astype(jnp.float32), guidance], axis=-1), (
            None if cache is None else (after, seen)
        )

    def logits(params: Any, hidden: Any) -> Any:
        ids, values = hidden[..., width : width + count], hidden[..., width + count :]
        scores = base.logits(params[0], hidden[..., :width].astype(state.dtype))
        flat = scores.reshape(-1, scores.shape[-1]), ids.reshape(-1, count).astype(jnp.int32), values.reshape(-1, count)
        return value_augmented_logits(*flat, strength=strength).reshape(scores.shape)

    def for_decoding(params: Any) -> Any:
        own, judge = params
        prepared = lambda model, tree: tree if model.for_decoding is None else model.for_decoding(tree)  # noqa: E731
        return prepared(base, own), judge | {"backbone": prepared(value, judge["backbone"])}

    def init(key: Any) -> Any:
        own, backbone, head = jax.random.split(key, 3)
        return base.init(own), {"head": init_head(value, head), "backbone": value.init(backbone)}

    return _of_two((base, value), init, apply, logits, for_decoding)
