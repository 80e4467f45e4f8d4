"""Views for teachers: the completion after a prompt that contains the answer, and the plain prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Sequences
from jaxrl_llm.ranges import Natural, ranged


@ranged
def answer_in_prompt(
    prompt_tokens: Int[Array, "B P"],
    prompt_length: Int[Array, "B"],
    answer_tokens: Int[Array, "B A"],
    answer_length: Int[Array, "B"],
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    mask: Float[Array, "B T"],
    *,
    encode: Callable[[str], Sequence[int]],
    before: str = " ",
    behind_tokens: Natural = 1,
) -> Sequences:
    """The same completion after a prompt that contains the reference answer, for a privileged teacher.

    The new prompt is the old one without its last `behind_tokens` tokens, then `before`, the answer, and those last
    tokens.

    `<network>_<view>_logprobs` then score the tokens that the policy sampled without the answer.

    Args:
      prompt_tokens, prompt_length: left-padded prompts.
      answer_tokens, answer_length: reference answers, right-padded.
      tokens, length: completions.
      mask: 1 on tokens that are trained on.
      encode: text -> token ids.
      before: text between the prompt and the answer.
      behind_tokens: last tokens of a prompt that follow the answer, such as the final newline or the end of a turn in a
        chat template.

    Returns:
      `Sequences`, whose mask is that of the row.

    Reference: self-distillation with privileged information (2601.18734).
    Certainty: reconstructed
    """
    chex.assert_rank([prompt_tokens, prompt_length, answer_tokens, answer_length, tokens], [2, 1, 2, 1, 2])
    text = jnp.asarray(tuple(encode(before)), prompt_tokens.dtype)
    count, width = prompt_tokens.shape
    parts = [prompt_tokens, jnp.broadcast_to(text, (count, len(text))), answer_tokens.astype(prompt_tokens.dtype)]
    both = jnp.concatenate(parts, axis=1)
    kept = jnp.maximum(prompt_length - behind_tokens, 0)
    whole = prompt_length + len(text) + answer_length
    # Gather by the position of each token in its new prompt, which is left-padded as well.
    place = jnp.arange(both.shape[1])[None] - (both.shape[1] - whole)[:, None]
    first, told = (width - prompt_length)[:, None], (kept + len(text) + answer_length)[:, None]
    at = jnp.where(place < kept[:, None], first + place, width + place - kept[:, None])
    at = jnp.where(place >= told, first + kept[:, None] + place - told, at)
    context = jnp.take_along_axis(both, jnp.clip(at, 0, both.shape[1] - 1), axis=1)
    context = jnp.where(place >= 0, context, 0)
    return Sequences(context, whole.astype(jnp.int32), tokens, length, mask)


def own_prompt(
    prompt_tokens: Int[Array, "B P"],
    prompt_length: Int[Array, "B"],
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    mask: Float[Array, "B T"],
) -> Sequences:
    """The unchanged row: a view that a teacher completes (`written_by: teacher`), for distillation of its text.

    Reference: sequence-level knowledge distillation (1606.07947).
    Certainty: recalled
    """
    return Sequences(prompt_tokens, prompt_length, tokens, length, mask)
