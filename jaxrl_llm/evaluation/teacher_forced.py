"""Teacher-forced scoring of given token ids: the log-probability of each, under a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxrl_llm.models.logprobs import token_statistics
from jaxrl_llm.models.model import Model
from jaxrl_llm.rollout import predicting_hidden

Texts = Sequence[tuple[Sequence[int], Sequence[int]]]


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
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need one above 0")

    @jax.jit
    def logprobs(params, prompt_tokens, prompt_length, tokens, length):
        hidden = predicting_hidden(model, params, prompt_tokens, prompt_length, tokens, length)
        return token_statistics(model, params, hidden, tokens, temperature=temperature).logprobs

    def score(params: PyTree, texts: Texts) -> list[list[float]]:
        _check(texts, model.vocabulary_size)
        scores: list[list[float]] = [[] for _ in texts]
        waiting = [row for row, (_, completion) in enumerate(texts) if len(completion)]
        waiting.sort(key=lambda row: _widths(texts[row]))
        while waiting:
            widths = _widths(texts[waiting[0]])
            same = [row for row in waiting[:sequences_per_batch] if _widths(texts[row]) == widths]
            waiting = waiting[len(same) :]
            filled = same + same[:1] * (sequences_per_batch - len(same))
            prompts = _padded([texts[row][0] for row in filled], widths[0], left=True)
            completions = _padded([texts[row][1] for row in filled], widths[1], left=False)
            values = jax.device_get(logprobs(params, *prompts, *completions))
            for place, row in enumerate(same):
                scores[row] = values[place, : len(texts[row][1])].tolist()
        return scores

    return score


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
