"""Samples of a step for samples.jsonl: some rows, with facts about each of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxrl_llm.experience import Experience, without_end
from jaxrl_llm.parallel import hosts
from jaxrl_llm.reporting import samples_table
from jaxrl_llm.training.reading import item_numbers

# Per-token fields of rows and their shorter names in samples.jsonl.
TOKEN_FACTS = {"advantages": "advantage", "behaviour_logprobs": "logprob", "behaviour_entropy": "entropy"}
MOST_TOKENS = 1024


def write_samples(
    run: Any, global_step: int, done: int, rows: Experience, items: list, *, first: bool, last: int
) -> None:
    """Write completions every `reporting.samples_every_steps` steps, and at the first and last step of a stage."""
    reporting = run.config.reporting
    every = reporting.samples_every_steps
    due = bool(every) and (done in (1, last) or done % every == 0)
    # With several processes a compiled program gathers the rows; it is compiled at the first step, like the others.
    if not due and not (reporting.samples_every_steps and first and jax.process_count() > 1):
        return
    chosen = spread(rows.tokens.shape[0], reporting.samples_per_report)
    of_rewards = ("rewards", "correct", "reward_components")
    names = ("tokens", "length", "group", "prompt_id", "truncated", *of_rewards, *TOKEN_FACTS)
    held = {name: value[chosen] for name, value in hosts.host_copy({n: rows[n] for n in names if n in rows}).items()}
    if not due:
        return
    decode, ends = run.parts.tokenizer.decode, run.parts.tokenizer.eos_ids
    of = [items[number] for number in item_numbers(held["prompt_id"], held["group"], None, items)]
    rewards = run.parts.step.composition.rewards
    written = [
        {
            "prompt": of[i]["body"],
            "completion": decode(without_end(held["tokens"][i][: held["length"][i]], ends)),
            "answer": of[i]["answer"],
            "truncated": bool(held["truncated"][i]),
        }
        | ({"reward": held["rewards"][i], "correct": bool(held["correct"][i])} if rewards else {})
        | {"rewards": {term.name: held["reward_components"][i][c] for c, term in enumerate(rewards)}}
        | token_facts(held, i, decode)
        for i in range(len(chosen))
    ]
    run.directory.write_samples(global_step, written)
    if reporting.samples_shown:
        run.console.print(samples_table(written[: reporting.samples_shown], global_step))


def token_facts(rows: Mapping[str, np.ndarray], row: int, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """The first 1024 tokens of a sample as text, with per-token numbers by which a report colours them."""
    count = min(int(rows["length"][row]), MOST_TOKENS)
    found: dict[str, list[Any]] = {"text": [decode([token]) for token in rows["tokens"][row][:count].tolist()]}
    for name, short in TOKEN_FACTS.items():
        if name in rows:
            values = np.asarray(rows[name][row], np.float64)
            values = np.broadcast_to(values, (count,)) if values.ndim == 0 else values[:count]
            found[short] = [float(f"{value:.4g}") for value in values]
    return {"tokens": found}


def spread(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` indices, evenly spaced, so that samples cover all levels of a mixed data set."""
    return np.linspace(0, count - 1, min(count, wanted)).round().astype(int)
