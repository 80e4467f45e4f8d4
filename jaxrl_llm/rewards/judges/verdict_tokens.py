"""Scores of a generative judge: the probability of yes, or of one answer being better than another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

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
    """A judge's score of an answer, from the probabilities of yes and no after a question about it.

        probability  r = P(yes)
        two_way      r = sigmoid(log P(yes) - log P(no))
        logit        r = log P(yes) - log P(no)

    The probability is the two-way score times P(yes) + P(no). Views `yes` and `no` append the verdict to the question;
    no text is sampled.

    Args:
      yes_logprobs, no_logprobs: log-probability of each token of the verdict.
      yes_mask, no_mask: 1 on tokens of the verdict.
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
    """The reward of an answer against an anchor, without the judge's position bias.

        r = (first_share + 1 - swapped_share) / 2 - 1/2

    A constant bias cancels; swapping the two gives -r; an answer equal to its anchor gets 0.

    Args:
      first_share: probability that the first of (answer, anchor) is the better one.
      swapped_share: the same for (anchor, answer).

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
    """A question about each completion and the verifier's verdict on it: training data of a judge.

    A view of (question, verdict); `negative_log_likelihood` of a network on it makes that network a judge, which is
    then asked with the same template (`judge_rating`, `lowest: 0`, `highest: 1`).

    Args:
      prompts, completions: texts.
      correct: 1 where the verifier accepts the completion.
      answers: reference answers.
      template: question, with {prompt}, {completion}.
      right, wrong: the verdicts; with {answer} the judge states the reference answer first (`judge_rating` reads a
        rating after such a reason with `after`).

    Returns:
      One (question, verdict) pair per row.

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


def filled_text(
    prompts: Sequence[str],
    completions: Sequence[str],
    answers: Sequence[str] | None = None,
    *,
    template: str = "{prompt}{completion}?",
    says: str = "1",
    after: str | None = None,
    **columns: Sequence[Any],
) -> list[tuple[str, str]]:
    """A view of a fixed text about each row: what stands before, and what is scored.

    For a judge, `says` is a verdict, whose probability is read (`verdict_score`, `verdict_ranking`); with the reference
    answer in `template` it compares the two. For a reward model that scores a candidate behind a reference (POLAR),
    `says` is "{completion}".

    Args:
      prompts, completions: texts.
      answers: reference answers.
      template: what stands before, with {prompt}, {completion}, {answer} and columns of the data by name, such as
        {think}, the worked solution of a built-in task.
      says: what is scored, with the same places.
      after: only the part of a completion after the last occurrence of this text, such as the end of a thought; None
        takes all of it.
      columns: of the data.

    Returns:
      One (text before, text that is scored) pair per row.

    Raises:
      ValueError: for a place that is none of these.

    >>> filled_text(["2+2="], ["so</t>4"], ["5"], template="{prompt}{answer}|", says="{completion}", after="</t>")
    [('2+2=5|', '4')]
    >>> filled_text(["2+2="], ["5"], ["4"], template="{prompt}{hint}{answer}?", hint=["1+3="])
    [('2+2=1+3=4?', '1')]

    Reference: RewardDance (2509.08826); POLAR (2507.05197); Pairwise RL (2504.04950).
    Certainty: verified
    """
    known = [""] * len(prompts) if answers is None else answers
    found = []
    for row, (prompt, completion, answer) in enumerate(zip(prompts, completions, known, strict=True)):
        said = completion if after is None else completion.rsplit(after, 1)[-1]
        values = {name: column[row] for name, column in columns.items()}
        values |= {"prompt": prompt, "completion": said, "answer": answer}
        try:
            found.append((template.format(**values), says.format(**values)))
        except KeyError as error:
            raise ValueError(
                f"filled_text: template {template!r} and says {says!r} name {{{error.args[0]}}}, which is neither a "
                f"text nor a column of the data; there are {', '.join(sorted(values))}"
            ) from None
    return found
