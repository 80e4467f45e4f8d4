"""Additional groups at another temperature."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.experience import Experience, Method, Prompts
from jaxrl_llm.ranges import Count, PositiveShare, ranged
from jaxrl_llm.rollout.plans.plan import Plan, Request, numbers_before, require_inside
from jaxrl_llm.signatures import call, signature


@ranged
def mixed_temperature(inner: Plan, *, samples_per_prompt: Count, prompt_share: PositiveShare, temperature: Any) -> Plan:
    """The first prompts of a step get a further group at another temperature; `extra` is True on its rows.

    Args:
      inner: plan of the other groups.
      samples_per_prompt: rows of such a group.
      prompt_share: share of the prompts that get one.
      temperature: a number above 0, or a `Method` that gives the temperature of the next step from the rows of this.

    Raises:
      ValueError: for a share or a temperature out of range.
    """
    require_inside("mixed_temperature", inner, "one_round", "equal_groups", "one_group_a_prompt", "drawn_by_policy")
    fixed: Any = None if isinstance(temperature, Method) else temperature
    method: Any = temperature if fixed is None else None
    if fixed is not None and not fixed > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")

    def groups(prompts: int) -> int:
        return max(1, round(prompt_share * prompts))

    def memory() -> dict[str, Any] | None:
        """Memory of the method and the first temperature, which is that after an empty batch."""
        if method is None:
            return None
        held = method.init()
        shapes = {"mask": (1, 1), "weight": (1,)}
        empty = {name: jnp.zeros(shapes.get(name, (1, 1)), jnp.float32) for name in signature(method).required}
        return {"memory": held, "temperature": jnp.asarray(call(method, empty, held)[0], jnp.float32)}

    def remember(held: Any, rows: Experience) -> Any:
        if method is None:
            return held
        value, after = call(method, rows.known(), held["memory"])
        return {"memory": after, "temperature": jnp.asarray(value, jnp.float32)}

    def requests(held: Any, carry: Any, prompts: Prompts) -> tuple[Request, ...]:
        *others, last = inner.requests(None, carry, prompts)
        count = prompts.tokens.shape[0]
        most = groups(count)
        few = jax.tree.map(lambda x: x[:most], prompts)
        prefixes = last.prefixes
        if prefixes is not None:
            prefixes = jax.tree.map(lambda x: x[: most * samples_per_prompt], prefixes)
        before = numbers_before(prompts, samples_per_prompt)
        own = [
            request._replace(first_sample=request.first_sample + before, fields={**request.fields, "extra": False})
            for request in (*others, last)
        ]
        more = Request(
            few,
            samples_per_prompt,
            temperature=fixed if method is None else held["temperature"],
            first_sample=numbers_before(few, inner.samples + samples_per_prompt) + inner.samples,
            first_group=count,
            prefixes=prefixes,
            fields={"extra": True},
        )
        return (*own, more)

    return inner._replace(
        requests=requests,
        memory=memory,
        remember=remember,
        provides=inner.provides | {"extra"},
        needs=inner.needs | {"numbered_samples", "temperatures"},
        lacks=inner.lacks | {"one_temperature", "one_group_a_prompt"},
        extra_groups=groups,
    )
