"""Each problem twice, in two wordings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_llm.experience import Experience, Prompts
from jaxrl_llm.rollout.plans.plan import Plan, Request, concatenated, require_inside


def paraphrased(inner: Plan) -> Plan:
    """A group of each prompt and one of its paraphrase, which know each other as `paired_group`.

    The data gives the paraphrases (column `paraphrase`). Both groups learn; rows of a paraphrase have its prompt.

    Args:
      inner: how the samples of each of the two are drawn.

    Raises:
      ValueError: where the plan inside has several rounds, or groups that are not one a prompt and of one size.

    Reference: Co-Reward (2508.00410).
    """
    require_inside("paraphrased", inner, "one_round", "one_group_a_prompt", "equal_groups")

    def wordings(prompts: Prompts) -> tuple[Prompts, Prompts]:
        # The two have one id. Copies of a prompt have random numbers of their own, and so have its wordings.
        repeat = jnp.asarray(prompts.fields.get("repeat", jnp.zeros_like(prompts.prompt_id)))
        first = replace(prompts, fields={**prompts.fields, "repeat": 2 * repeat})
        other = {"tokens": prompts.fields["paraphrase_tokens"], "length": prompts.fields["paraphrase_length"]}
        return first, replace(prompts, **other, fields={**prompts.fields, "repeat": 2 * repeat + 1})

    def requests(memory: Any, carry: Any, prompts: Prompts) -> tuple[Request, ...]:
        count = prompts.tokens.shape[0]
        first, second = (inner.requests(memory, carry, wording) for wording in wordings(prompts))
        return (*first, *(one._replace(first_group=one.first_group + count) for one in second))

    def merge(carry: Any, rows: Experience) -> tuple[Any, Any]:
        half = rows.tokens.shape[0] // 2
        first, second = (jax.tree.map(lambda x: x[part], rows) for part in (slice(half), slice(half, None)))  # noqa: B023
        return inner.merge(carry, first), inner.merge(carry, second)

    def result(carry: tuple[Any, Any]) -> tuple[Experience, dict[str, Array]]:
        (first, report), (second, _) = inner.result(carry[0]), inner.result(carry[1])
        groups = first.tokens.shape[0] // inner.samples
        rows = concatenated(first, second)
        return rows.filled(
            paired_group=jnp.where(rows.group < groups, rows.group + groups, rows.group - groups)
        ), report

    return inner._replace(
        requests=requests,
        merge=merge,
        result=result,
        reads=inner.reads | {"paraphrase_tokens", "paraphrase_length"},
        provides=inner.provides | {"paired_group"},
        needs=inner.needs | {"numbered_samples"},
        lacks=inner.lacks | {"one_group_a_prompt"},
        extra_groups=lambda prompts: prompts,
    )
