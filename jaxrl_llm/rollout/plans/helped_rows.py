"""Rows sampled with one form of the prompt and trained with another: explanations, guidance, handbooks, hints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_llm.experience import Experience, Prompts
from jaxrl_llm.ranges import Count, ranged
from jaxrl_llm.rollout.plans.further_rows import Beginning, Given, further
from jaxrl_llm.rollout.plans.plan import Plan, Request, require_inside
from jaxrl_llm.rollout.rewriting import as_learned, asked_in_form, form_named


@ranged
def helped(
    inner: Plan,
    *,
    samples_per_prompt: Count,
    branches: Count,
    view: str = "privileged",
    prompts: Literal["all", "failed"] = "all",
    keep: Literal["all", "right"] = "right",
    learned: Literal["group", "written"] = "group",
) -> Plan:
    """In each group, `branches` completions are sampled from a more informative form of the prompt, and trained without
    it.

    The form is a column of the data (`data.privileged`): the answer to be explained, a hint, guidance. The rows stand
    behind the plain prompt in the end, so the policy learns to do without (context distillation), and what it gives
    their tokens there before the update is their old log-probability.

    Self-explanation (ExPO) is `{branches: 1, learned: written}`, whose rows are outside of all groups and learn by
    `stored_likelihood`; guidance after failure (Agent-RLVR) is `{prompts: failed, keep: all}`, whose rows share the
    group and its statistics.

    Args:
      inner: how the plain completions are drawn.
      samples_per_prompt: rows of a group in the end.
      branches: of them, drawn with help.
      view: the column.
      prompts: "failed" helps only where no plain completion is right.
      keep: "right" leaves out helped rows that are not right.
      learned: "group" puts helped rows among the others; "written" makes them groups of their own, with `written_mask`
        in the place of `mask`.

    Raises:
      ValueError: as for every plan of two rounds.

    Reference: ExPO (2507.02834), Agent-RLVR (2506.11425).
    Certainty: verified
    """
    drawn = samples_per_prompt - branches

    def begin(given: Given) -> Beginning:
        asked = asked_in_form(given.prompts, *form_named(given.prompts, view))
        if prompts == "all":
            return Beginning(asked)
        right = given.rows["correct"] * (given.rows.weight > 0)
        return Beginning(asked, active=right.reshape(-1, drawn).max(1) < 1)

    def finish(given: Given, more: Experience) -> tuple[Experience, Experience]:
        rows = given.rows
        more = as_learned(more)
        if keep == "right":
            more = replace(more, weight=more.weight * (more["correct"] >= 1))
        if learned == "group":
            return rows, more
        count = more.tokens.shape[0]
        groups = count // branches
        own = groups + jnp.arange(count, dtype=rows.group.dtype)
        first = rows.filled(written_mask=jnp.zeros_like(rows.mask))
        return first, replace(more, group=own, mask=jnp.zeros_like(more.mask)).filled(written_mask=more.mask)

    return further(
        inner,
        name="helped",
        branches=branches,
        samples_per_prompt=samples_per_prompt,
        begin=begin,
        finish=finish,
        report=lambda rows: {"helped_share": _kept(rows)},
        reads_rewards=prompts == "failed" or keep == "right",
        reads=frozenset({f"{view}_tokens", f"{view}_length"}),
        provides=frozenset({"written_mask"} if learned == "written" else ()),
        reports=frozenset({"helped_share"}),
        needs={"active_prompts"} if prompts == "failed" else set(),
        lacks={"drawn_by_policy", "own_prompt"},
    )


def _kept(rows: Experience) -> Array:
    """Share of the helped rows with nonzero weight."""
    helped_rows = rows["branch"] > 0
    return (helped_rows & (rows.weight > 0)).sum() / jnp.maximum(helped_rows.sum(), 1)


def under_view(inner: Plan, *, view: str = "privileged") -> Plan:
    """All completions are sampled from another form of the prompt and trained with the plain one.

    The view that samples and the view that is scored: a hint, a handbook of behaviours or solved examples are there
    while the policy writes, and not while it learns.

    Args:
      inner: how the completions are drawn.
      view: column of the data with the form that samples, such as `privileged`.

    Raises:
      ValueError: where the plan inside has several rounds.

    Reference: metacognitive reuse (2509.13237).
    Certainty: recalled
    """
    require_inside("under_view", inner, "one_round")

    def requests(memory: Any, carry: Any, prompts: Prompts) -> tuple[Request, ...]:
        return inner.requests(memory, carry, asked_in_form(prompts, *form_named(prompts, view)))

    def result(carry: Any) -> tuple[Experience, dict[str, Array]]:
        rows, report = inner.result(carry)
        return as_learned(rows), report

    return inner._replace(
        requests=requests,
        result=result,
        reads=inner.reads | {f"{view}_tokens", f"{view}_length"},
        lacks=inner.lacks | {"drawn_by_policy", "own_prompt"},
    )
