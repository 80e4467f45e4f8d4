"""Teacher-forced scoring of given token ids: the log-probability of each, or of the most likely tokens in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxrl_llm.models.logprobs import token_statistics
from jaxrl_llm.models.model import Model
from jaxrl_llm.rollout import predicting_hidden

Texts = Sequence[tuple[Sequence[int], Sequence[int]]]

# Positions whose distributions over the vocabulary are in memory at a time.
_POSITIONS = 32


class MostLikely(NamedTuple):
    """The most likely tokens at each position of a text, from the most likely one on.

    Attributes:
      tokens: ids at each position, k of them.
      logprobs: their log-probabilities.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]


def make_score(
    model: Model, *, temperature: float = 1.0, sequences_per_batch: int = 8
) -> Callable[[PyTree, Texts], list[list[float]]]:
    """Build score(params, [(prompt ids, completion ids), ...]) -> log-probabilities of the completions' tokens.

        log p(y_t | x, y_<t), natural logarithm

    Rows are padded to powers of two and scored in batches of similar length, so that few programs are compiled. Padding
    does not change results.

    Args:
      model: the scoring model.
      temperature: of the softmax.
      sequences_per_batch: rows scored together.

    Returns:
      One list per row, in the given order, with one number per completion token.

    Raises:
      ValueError: for a prompt without tokens, or an id outside of the vocabulary, naming the row.
    """
    _require_temperature(temperature)

    @jax.jit
    def logprobs(params, prompt_tokens, prompt_length, tokens, length):
        hidden = predicting_hidden(model, params, prompt_tokens, prompt_length, tokens, length)
        return token_statistics(model, params, hidden, tokens, temperature=temperature).logprobs

    def score(params: PyTree, texts: Texts) -> list[list[float]]:
        _check(texts, model.vocabulary_size)
        scores: list[list[float]] = [[] for _ in texts]
        for row, values in _by_row(logprobs, params, texts, sequences_per_batch):
            scores[row] = values.tolist()
        return scores

    return score


def make_most_likely(
    model: Model, k: int, *, temperature: float = 1.0, sequences_per_batch: int = 8
) -> Callable[[PyTree, Texts], list[MostLikely]]:
    """Build most_likely(params, [(prompt ids, completion ids), ...]) -> the k most likely tokens at each token.

    These are the distributions of a teacher, as the source `distributions` reads them. Rows are padded as in
    `make_score`.

    Args:
      model: the scoring model.
      k: tokens at each position, at most the vocabulary.
      temperature: of the softmax.
      sequences_per_batch: rows scored together.

    Returns:
      One `MostLikely` per row, in the given order.

    Raises:
      ValueError: for a k out of range; else as `make_score`.
    """
    _require_temperature(temperature)
    if not 1 <= k <= model.vocabulary_size:
        raise ValueError(f"{k} tokens are asked for at each position; the vocabulary has 1 to {model.vocabulary_size}")

    @jax.jit
    def likely(params, prompt_tokens, prompt_length, tokens, length):
        hidden = predicting_hidden(model, params, prompt_tokens, prompt_length, tokens, length)

        def at_position(states):
            logits = model.logits(params, states).astype(jnp.float32) / temperature
            return jax.lax.top_k(jax.nn.log_softmax(logits, axis=-1), k)

        values, ids = jax.lax.map(at_position, hidden.swapaxes(0, 1), batch_size=_POSITIONS)
        return ids.swapaxes(0, 1), values.swapaxes(0, 1)

    def most_likely(params: PyTree, texts: Texts) -> list[MostLikely]:
        _check(texts, model.vocabulary_size)
        found = [MostLikely([], []) for _ in texts]
        for row, (ids, values) in _by_row(likely, params, texts, sequences_per_batch):
            found[row] = MostLikely(ids.tolist(), values.tolist())
        return found

    return most_likely


def _require_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need one above 0")


def _by_row(
    program: Callable[..., Any], params: PyTree, texts: Texts, sequences_per_batch: int
) -> Iterator[tuple[int, Any]]:
    """(row, values at its tokens) of every row with a completion; program(params, batch) returns arrays [B, T, ...]."""
    waiting = [row for row, (_, completion) in enumerate(texts) if len(completion)]
    waiting.sort(key=lambda row: _widths(texts[row]))
    while waiting:
        widths = _widths(texts[waiting[0]])
        same = [row for row in waiting[:sequences_per_batch] if _widths(texts[row]) == widths]
        waiting = waiting[len(same) :]
        filled = same + same[:1] * (sequences_per_batch - len(same))
        prompts = _padded([texts[row][0] for row in filled], widths[0], left=True)
        completions = _padded([texts[row][1] for row in filled], widths[1], left=False)
        values = jax.device_get(program(params, *prompts, *completions))
        for place, row in enumerate(same):
            where = place, slice(len(texts[row][1]))
            yield row, jax.tree.map(lambda array, where=where: array[where], values)


def _widths(text: tuple[Sequence[int], Sequence[int]]) -> tuple[int, int]:
    """Padded widths of prompt and completion."""
    prompt, completion = (1 << max(3, (len(part) - 1).bit_length()) for part in text)
    return prompt, completion


def _padded(rows: Sequence[Sequence[int]], width: int, *, left: bool) -> tuple[jax.Array, jax.Array]:
    tokens = np.zeros((len(rows), width), np.int32)
    for number, ids in enumerate(rows):
        first = width - len(ids) if left else 0
        tokens[number, first : first + len(ids)] = ids
    return jnp.asarray(tokens), jnp.asarray([len(ids) for ids in rows], jnp.int32)


def _check(texts: Texts, vocabulary_size: int) -> None:
    for row, (prompt, completion) in enumerate(texts):
        if not len(prompt):
            raise ValueError(
                f"row {row} has a prompt without tokens; the first token of a text has no log-probability, so give at "
                "least one token before those that are scored"
            )
        for token in (*prompt, *completion):
            if not 0 <= token < vocabulary_size:
                raise ValueError(
                    f"row {row} holds the token id {token}, but the model's ids are 0 to {vocabulary_size - 1}; "
                    "encode the text with the model's own tokenizer"
                )
