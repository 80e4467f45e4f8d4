"""Language models for sampling that are made of others: the geometric mixture of two, and one guided by a value."""

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

    def init(key: Any) -> Any:
        return tuple(m.init(k) for m, k in zip(both, jax.random.split(key), strict=True))

    return _of_two(both, init, apply, logits, for_decoding)._replace(specs=(first.specs, second.specs))


def _of_two(both: tuple[Model, Model], init: Any, apply: Any, logits: Any, for_decoding: Any) -> Model:
    """A model for sampling whose cache is the pair of those of two others."""
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
    """Scores of next tokens, raised where what they lead to is worth more than that of the other candidates.

        q_a = V(prefix + a) - mean over the candidates of V,   logits_a + strength * q_a for candidates a

    Sampling is from p * exp(strength * V) / Z where all tokens are candidates.

    Args:
      logits: of the next token.
      candidates: ids of K tokens of each row, without repetition.
      values: V behind the prefix and each of them.
      strength: nats a unit of value, 1 / beta of the KL-regularised problem.

    Reference: Value augmented sampling (2405.06639).
    Certainty: verified
    """
    chex.assert_equal_shape([candidates, values])
    q = values.astype(jnp.float32) - values.astype(jnp.float32).mean(-1, keepdims=True)
    return logits.astype(jnp.float32).at[jnp.arange(len(logits))[:, None], candidates].add(strength * q)


@ranged
def value_guided(base: Model, value: Model, *, strength: NonNegative = 3.0, candidates: Count = 20) -> Model:
    """The model whose next token is drawn by `value_augmented_logits` of the likeliest tokens of another one.

    Its parameters are the pair (those of `base`, those of the value network: `head`, and the `backbone` that it reads);
    the cache is a pair. At each token the value network goes one token further with each candidate, which share its
    cache. It is for sampling: of several tokens at a time, such as a prompt, the last one alone says what follows under
    guidance, and those before it what the base says. It has no description that could be saved.

    Args:
      base: the policy.
      value: the architecture of the value network's backbone, with the base's tokens.
      strength: nats a unit of value; 0 is the base.
      candidates: K, the likeliest tokens; the others keep the score that the base gives them.

    Raises:
      ValueError: for two vocabularies, a negative strength, or no candidate.

    Reference: Value augmented sampling (2405.06639).
    Certainty: verified
    """
    if base.vocabulary_size != value.vocabulary_size:
        raise ValueError(
            f"a value that guides sampling needs the policy's tokens, but the policy has {base.vocabulary_size} and "
            f"the value network {value.vocabulary_size}"
        )
    count = min(candidates, base.vocabulary_size)
    token = jnp.zeros((1, 1), jnp.int32)
    said = jax.eval_shape(lambda key: base.apply(base.init(key), token, token, None)[0], jax.random.key(0))
    width = said.shape[-1]

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
        told = jnp.concatenate([ids.astype(jnp.float32), values], axis=-1)
        last = jnp.arange(tokens.shape[1]) == jnp.argmax(positions, axis=1)[:, None]
        guidance = jnp.where(last[..., None], told[:, None], 0.0)
        return jnp.concatenate([hidden.astype(jnp.float32), guidance], axis=-1), (
            None if cache is None else (after, seen)
        )

    def logits(params: Any, hidden: Any) -> Any:
        ids, values = hidden[..., width : width + count], hidden[..., width + count :]
        scores = base.logits(params[0], hidden[..., :width].astype(said.dtype))
        flat = scores.reshape(-1, scores.shape[-1]), ids.reshape(-1, count).astype(jnp.int32), values.reshape(-1, count)
        return value_augmented_logits(*flat, strength=strength).reshape(scores.shape)

    def for_decoding(params: Any) -> Any:
        own, judge = params
        laid = lambda model, tree: tree if model.for_decoding is None else model.for_decoding(tree)  # noqa: E731
        return laid(base, own), judge | {"backbone": laid(value, judge["backbone"])}

    def init(key: Any) -> Any:
        own, backbone, head = jax.random.split(key, 3)
        return base.init(own), {"head": init_head(value, head), "backbone": value.init(backbone)}

    return _of_two((base, value), init, apply, logits, for_decoding)
