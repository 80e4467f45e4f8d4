"""Demonstrations of prompts that no sample solved: stored in the state until there are enough for an update."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxrl_llm.experience import Experience
from jaxrl_llm.rows import Hardest, empty_rows, written_rows
from jaxrl_llm.statistics import group_leader, group_sum


def empty_demonstrations(hardest: Hardest, width: int) -> Experience:
    """The empty store of `asked_for`; every array is a separate buffer, so that it can be donated."""
    empty = empty_rows(hardest.capacity, hardest.max_prompt_tokens, hardest.max_answer_tokens, width)
    return jax.tree.map(jnp.copy, empty.filled(written_mask=jnp.zeros((hardest.capacity, width), jnp.float32)))


def asked_for(store: Experience, rows: Experience, hardest: Hardest) -> tuple[Experience, Experience]:
    """(the store after a step, the demonstrations to train on in it): ReLIFT's interleaving.

    The demonstration of every prompt of which no sample has a reward above 0 is put at the front of the store. If the
    store then holds `hardest.rows`, as many rows from the front are trained on and removed; otherwise the returned rows
    have weight 0.

    Args:
      store: rows of weight 1 for stored demonstrations, the newest first.
      rows: of this step, with rewards and demonstrations.
      hardest: sizes.

    Reference: ReLIFT (2506.07527).
    Certainty: verified
    """
    there = (rows.weight > 0).astype(jnp.float32)
    solved = group_sum((rows["rewards"] > 0).astype(jnp.float32), rows.group, there)
    asked = (group_leader(rows.group, there) > 0) & (solved == 0) & (rows["demonstration_length"] > 0)
    given = written_rows(
        rows.prompt_tokens,
        rows.prompt_length,
        rows.prompt_id,
        rows["demonstration_tokens"],
        rows["demonstration_length"],
        answer_width=store.answer_tokens.shape[1],
    )
    given = replace(given, weight=asked.astype(jnp.float32))
    both = {name: jnp.concatenate([given[name].astype(x.dtype), x]) for name, x in store.known().items()}
    order = jnp.argsort(both["weight"] == 0, stable=True)
    both = {name: x[order] for name, x in both.items()}
    enough = both["weight"][hardest.rows - 1] > 0
    learned = store.filled(**{name: x[: hardest.rows] for name, x in both.items()})
    first = jnp.where(enough, hardest.rows, 0)
    # Rows read beyond the end have weight 0.
    kept = {name: jnp.roll(x, -first, axis=0)[: hardest.capacity] for name, x in both.items()}
    gone = jnp.arange(hardest.capacity) >= len(order) - first
    kept["weight"] = jnp.where(gone, 0.0, kept["weight"])
    return store.filled(**kept), replace(learned, weight=jnp.where(enough, learned.weight, 0.0))
