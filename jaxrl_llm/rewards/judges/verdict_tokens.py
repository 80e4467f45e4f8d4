"""Scores of a generative judge: how likely it is to say yes, or that one answer is the better one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

VerdictForm = Literal["probability", "two_way", "logit"]


def verdict_score(
    yes_logprobs: Float[Array, "B T"],
    yes_mask: Float[Array, "B T"],
    no_logprobs: Float[Array, "B T"],
    no_mask: Float[Array, "B T"],
    *,
    form: VerdictForm = "probability",
) -> Float[Array, "B"]:
    """What a judge thinks of an answer, read off the verdicts yes and no at the end of a question about it.

        probability  r = P(yes)
        two_way      r = sigmoid(log P(yes) - log P(no))
        logit        r = log P(yes) - log P(no)

    The probability lies below the two-way score by the factor P(yes) + P(no), what the judge gives other words. Views
    `yes` and `no` put the verdict behind the question; nothing is written.

    Args:
      yes_logprobs, no_logprobs: log-probability of each token of the verdict.
      yes_mask, no_mask: 1 on these.
      form: as above.

    Returns:
      One reward per row, float32.

    Raises:
      ValueError: for an unknown form.

    Reference: RewardDance (2509.08826); generative verifiers (2408.15240).
    Certainty: verified
    """
    chex.assert_equal_shape([yes_logprobs, yes_mask])
    chex.assert_equal_shape([no_logprobs, no_mask])
    if form not in get_args(VerdictForm):
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(VerdictForm))}")
    yes, no = (
        jnp.where(mask > 0, said.astype(jnp.float32), 0.0).sum(-1)
        for said, mask in ((yes_logprobs, yes_mask), (no_logprobs, no_mask))
    )
    if form == "probability":
        return jnp.exp(yes)
    return jax.nn.sigmoid(yes - no) if form == "two_way" else yes - no


def unbiased_comparison(first_share: Float[Array, "B"], swapped_share: Float[Array, "B"]) -> Float[Array, "B"]:
    """The reward of an answer against an anchor, free of the judge's taste for one of the two places.

        r = (first_share + 1 - swapped_share) / 2 - 1/2

    A constant taste cancels; swapping the two gives -r; an answer that is its anchor gets 0.

    Args:
      first_share: probability that the first of (answer, anchor) is the better one.
      swapped_share: the same of (anchor, answer).

    Returns:
      One reward per row in [-1/2, 1/2], float32.

    Reference: Pairwise RL (2504.04950).
    Certainty: reconstructed
    """
    chex.assert_equal_shape([first_share, swapped_share])
    return (first_share.astype(jnp.float32) - swapped_share.astype(jnp.float32)) / 2


def judged_example(
    prompts: Sequence[str],
    completions: Sequence[str],
    correct: Sequence[float],
    answers: Sequence[str] | None = None,
    *,
    template: str = "{prompt}{completion}?",
    right: str = "1",
    wrong: str = "0",
) -> list[tuple[str, str]]:
    """A question about each completion with the verdict of a verifier behind it: what a judge is trained on.

    A view of (question, verdict); `negative_log_likelihood` of a network on it makes that network a judge, which is
    then asked with the same template (`judge_rating`, `lowest: 0`, `highest: 1`).

    Args:
      prompts, completions: texts.
      correct: 1 where the verifier accepts the completion.
      answers: reference answers.
      template: question, with {prompt}, {completion}.
      right, wrong: the verdict; with {answer} in it the judge says first what it should have been (`judge_rating` reads
        a rating behind such a reason with `after`).

    >>> judged_example(["2+2="], ["5"], [0.0])
    [('2+2=5?', '0')]
    >>> judged_example(["2+2="], ["5"], [0.0], ["4"], wrong="{answer}=0")
    [('2+2=5?', '4=0')]

    Reference: generative verifiers (2408.15240).
    Certainty: recalled
    """
    known = [""] * len(prompts) if answers is None else answers
    return [
        (template.format(prompt=prompt, completion=completion), (right if value > 0 else wrong).format(answer=answer))
        for prompt, completion, value, answer in zip(prompts, completions, correct, known, strict=True)
    ]
