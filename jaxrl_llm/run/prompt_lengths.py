"""Prompt lengths of a config, and the widths for which its programs are compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxrl_llm.data import DataSpec
from jaxrl_llm.data.buckets import buckets
from jaxrl_llm.data.tasks.items import record
from jaxrl_llm.run.batches import prompt_widths, prompts_handed
from jaxrl_llm.run.evaluation_batch import evaluation_batch
from jaxrl_llm.run.problems import data_sets
from jaxrl_llm.run.setup import Parts
from jaxrl_llm.run.stages import spread

# Prompts per split: enough for shares in per cent.
_MOST = 1024
_MOST_BYTES = 64 * 2**20


def prompt_lengths(parts: Parts, split: str) -> Int[np.ndarray, "N"] | None:
    """Tokens of up to 1024 prompts of a split, spread over it; None where its data cannot be had at little cost."""
    config, task = parts.config, parts.config.task
    if task is None:
        files = [file for file in (config.data.path, config.data.validation_path, config.data.test_path) if file]
        try:
            if sum(Path(file).expanduser().stat().st_size for file in files) > _MOST_BYTES:
                return None
            source = data_sets(config, [split])[split]
        except (OSError, ValueError):  # the run will report the error
            return None
        items = [source[int(index)] for index in spread(len(source), _MOST)]
    else:
        count = min(_MOST, task.train_items if split == "train" else task.test_items)
        made = DataSpec(task.name, task.levels, split, count, task.seed, task.options).items()
        items = [record(item, number) for number, item in enumerate(made)]
    try:
        return np.array([len(parts.tokenizer.prompt_ids(item)) for item in items])
    except ValueError:
        return None


def width_shares(parts: Parts) -> list[dict[str, Any]]:
    """For training and evaluation, each width of prompts: the share of prompts that need it, and of batches.

    A batch is as wide as its longest prompt asks for, so with independent prompts the share of batches of at most a
    width is the share of such prompts to the power of their number. None stands where the data is not known.
    """
    config, rollout = parts.config, parts.config.rollout
    samples = 1 + config.evaluation.samples_per_problem
    place = parts.step.composition.resources.placement
    evaluated = evaluation_batch(config, parts.model, place.mesh, place.rules) // samples
    evaluated = min(config.evaluation.problems, max(1, evaluated))
    stages = [
        ("training", "train", prompt_widths(config), prompts_handed(parts)),
        ("evaluation", "test", buckets(rollout.max_prompt_tokens), evaluated),
    ]
    rows = []
    for stage, split, widths, count in stages:
        lengths = prompt_lengths(parts, split)
        if lengths is not None:  # longer ones are dropped, or are an error
            lengths = lengths[lengths <= widths[-1]]
        below = 0.0
        for width in widths:
            row = {"stage": stage, "width": width, "prompts": None, "batches": None}
            if lengths is not None and len(lengths):
                held = float(np.mean(lengths <= width))
                row |= {"prompts": held - below, "batches": held**count - below**count}
                below = held
            rows.append(row)
    return rows
