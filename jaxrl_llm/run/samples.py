"""Completions that a run writes for people to read, and indices spread evenly over what there is."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxrl_llm.experience import Experience
from jaxrl_llm.parallel import hosts
from jaxrl_llm.training.reading import item_numbers


def write_samples(
    run: Any, global_step: int, done: int, rows: Experience, items: list, *, first: bool, last: int
) -> None:
    """Completions of every so many steps, and of the first and the last step of a stage."""
    reporting = run.config.reporting
    every = reporting.samples_every_steps
    due = bool(every) and (done in (1, last) or done % every == 0)
    # Over several processes, rows are gathered by a program, which is compiled with those of the first step.
    if not due and not (reporting.samples_every_steps and first and jax.process_count() > 1):
        return
    chosen = spread(rows.tokens.shape[0], reporting.samples_per_report)
    names = ("tokens", "length", "group", "prompt_id", "rewards", "reward_components", "truncated")
    held = {name: value[chosen] for name, value in hosts.host_copy({n: rows[n] for n in names if n in rows}).items()}
    if not due:
        return
    decode = run.parts.tokenizer.decode
    of = [items[number] for number in item_numbers(held["prompt_id"], held["group"], None, items)]
    rewards = run.parts.step.composition.rewards
    run.directory.write_samples(
        global_step,
        [
            {
                "prompt": of[i]["body"],
                "completion": decode(held["tokens"][i][: held["length"][i]].tolist()),
                "answer": of[i]["answer"],
                "truncated": bool(held["truncated"][i]),
            }
            | ({"reward": held["rewards"][i]} if rewards else {})
            | {term.name: held["reward_components"][i][c] for c, term in enumerate(rewards)}
            for i in range(len(chosen))
        ],
    )


def spread(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` indices, evenly spread, so that every level of a mixed data set is among them."""
    return np.linspace(0, count - 1, min(count, wanted)).round().astype(int)
