"""Every selection of the library with memory, on records and rows made up: what tests of laws go through.

A selection that is added to `jaxrl_llm.selection` is among them. Hyper-parameters that it fills from a run are in
`SIZES`; where it has others without a default, `OPTIONS` has a line for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm import selection
from jaxrl_llm.experience import Selection

RECORDS = [{"prompt": f"p{n}", "level": 1 + n % 3, "domain": "ab"[n % 2], "rate": (n % 5) / 4} for n in range(12)]
COUNT = 6  # prompts of a step
SIZES = {"total_steps": 5, "samples_per_prompt": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "domain_aware": {"refresh_every_steps": 1},
    "most_variable": {"explore_steps": 3, "prompts": 2},
    "variance_aware": {"refresh_every_steps": 1},
    "easy_to_hard": {"steps_per_stage": 2, "replay": 0.4},
    "topology_aware": {"turns": 2},
}
# Other forms: (function, its hyper-parameters).
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "band": ("by_pass_rate", {"rule": "band", "low": 0.1, "high": 0.9, "pass_rate": "rate"}),
    "power law": ("easy_to_hard", {"steps_per_stage": 2, "replay": 0.4, "replay_power": 1.0}),
    "plateau": ("easy_to_hard", {"advance": "plateau", "window": 2}),
    "gaussian": ("growing_difficulty", {"pace": "gaussian", "rate": 0.5}),
}


def of_library() -> list[str]:
    """Names of the functions of `jaxrl_llm.selection` that return a `Selection`."""
    returned = {name: getattr(getattr(selection, name), "__annotations__", {}) for name in selection.__all__}
    return [name for name, hints in returned.items() if hints.get("return") in ("Selection", Selection)]


EVERY = {name: (name, OPTIONS.get(name, {})) for name in of_library()} | FORMS


def made(name: str, records: Sequence[dict[str, Any]] = RECORDS) -> Selection:
    """One of `EVERY` on these records, with the sizes that it asks for."""
    function, options = EVERY[name]
    build = getattr(selection, function)
    sizes = {"records": records, "items": len(records), "prompts_per_step": COUNT, **SIZES}
    return build(
        **{key: value for key, value in sizes.items() if key in inspect.signature(build).parameters}, **options
    )


def rows_of(item: Any, names: Sequence[str]) -> dict[str, Any]:
    """Two rows of each chosen item, whose facts are those of its prompt, wherever it stands.

    Numbers are multiples of 1/8, so that sums over them are the same in any order.
    """
    item = jnp.repeat(item, 2)
    number = jnp.asarray([int(name[1:]) for name in names], jnp.int32)[item]
    first = jnp.arange(len(item)) % 2
    right = ((number + first) % 3 == 0).astype(jnp.float32)
    tokens = number[:, None] * first[:, None] + jnp.arange(4)
    return {
        "item": item,
        "correct": right,
        "rewards": right,
        "advantages": right[:, None] - jnp.ones((1, 4)) / 4,
        "tokens": tokens,
        "mask": jnp.ones((len(item), 4)),
        "turn": jnp.broadcast_to(jnp.arange(4) // 2, tokens.shape),
        "length": jnp.full(len(item), 4),
        "group": jnp.repeat(jnp.arange(len(item) // 2), 2),
        "position_entropy": number / 8,
        "weight": jnp.ones(len(item)),
    }


def elsewhere(rows: dict[str, Any]) -> dict[str, Any]:
    """The same rows in other places, as over several processes, among rows that are absent."""
    count = len(rows["item"])
    absent = {name: jnp.zeros_like(array[:2]) for name, array in rows.items()}
    absent |= {"group": absent["group"] + count // 2, "rewards": absent["rewards"] + 7.0}
    return {name: jnp.concatenate([absent[name], array[::-1]]) for name, array in rows.items()}


def learned(one: Selection, memory: Any, rows: dict[str, Any]) -> Any:
    """The memory after a step with these rows."""
    return one.update(memory, **{name: rows[name] for name in list(inspect.signature(one.update).parameters)[1:]})


def choices(names: Sequence[str], steps: int, rows_at: Any = None, **placed: Any) -> dict[str, list[list[int]]]:
    """Items that each selection chooses in some steps, learning from rows of all processes.

    Args:
      names: of `EVERY`.
      steps: how many.
      rows_at: where the rows of a step lie; None leaves that open.
      placed: of `jax.jit`: where memories lie.
    """
    of_records = [record["prompt"] for record in RECORDS]
    every = {name: made(name) for name in names}

    def step(memories: dict[str, Any], number: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        chosen = {name: one.choose(memories[name], jax.random.key(number), COUNT) for name, one in every.items()}
        rows = {name: rows_of(chosen[name], of_records) for name in every}
        if rows_at is not None:
            rows = jax.lax.with_sharding_constraint(rows, rows_at)
        return {name: learned(one, memories[name], rows[name]) for name, one in every.items()}, chosen

    memories, seen = jax.jit(lambda: {name: one.init() for name, one in every.items()}, **placed)(), []
    compiled = jax.jit(step, **placed)
    for number in range(steps):
        memories, chosen = compiled(memories, number)
        seen.append(jax.device_get(chosen))
    return {name: [one[name].tolist() for one in seen] for name in names}
