"""Stored answers of a stage's initial policy: prompts that it solves are not sampled, and have one right answer each.

They are made once, before the stage. The other prompts are sampled; the stored answers and their log-probabilities
never change, so they need no reference model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxrl_llm import data
from jaxrl_llm.experience import Experience, KeyUse, NetworkState, TrainState
from jaxrl_llm.parallel import hosts
from jaxrl_llm.rows import written_rows
from jaxrl_llm.run.evaluation_batch import evaluation_batch
from jaxrl_llm.run.setup import Parts
from jaxrl_llm.selection import cycled_rows, near_perfect_groups
from jaxrl_llm.terms import Update
from jaxrl_llm.training.collect import collected
from jaxrl_llm.training.fill import reward_parts
from jaxrl_llm.training.networks import POLICY
from jaxrl_llm.training.reading import Context
from jaxrl_llm.training.segments import compiled, run

FILE = "stored_answers.npz"
_ROWS = ("prompt_tokens", "prompt_length", "prompt_id", "tokens", "length", "trained", "stored_logprobs")


@dataclass(frozen=True)
class StoredAnswers:
    """Stored answers, and the items that are sampled.

    Attributes:
      rows: prompt_tokens, prompt_length, prompt_id, tokens, length, trained (1 on the policy's own tokens, 0 on tokens
        of an environment) and stored_logprobs: one row per stored answer.
      explored: item ids of the prompts that are sampled in training.
    """

    rows: dict[str, np.ndarray]
    explored: np.ndarray

    def __len__(self) -> int:
        return len(self.rows["length"])

    @property
    def fingerprint(self) -> str:
        """Hash over all stored arrays."""
        digest = hashlib.sha256(np.ascontiguousarray(self.explored).tobytes())
        for name in _ROWS:
            digest.update(np.ascontiguousarray(self.rows[name]).tobytes())
        return digest.hexdigest()[:16]

    def save(self, directory: Path) -> None:
        """Write to the run directory."""
        arrays: dict[str, Any] = {"explored": self.explored, **self.rows}
        np.savez_compressed(directory / FILE, **arrays)

    @classmethod
    def load(cls, directory: Path) -> StoredAnswers:
        """Read the file that `save` wrote.

        Raises:
          FileNotFoundError: if the file is missing.
        """
        path = directory / FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist, but the run was started with it; restore it or start anew")
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return cls(rows={name: arrays[name] for name in _ROWS}, explored=arrays["explored"])

    def batch(self, key: jax.Array, step: int, rows_per_step: int, *, answer_width: int) -> Experience:
        """The stored answers of one step: each epoch goes through all of them in a new order."""
        key = jax.random.fold_in(key, KeyUse.STORED)
        chosen = np.asarray(cycled_rows(key, step, stored=len(self), rows_per_step=rows_per_step))
        arrays: dict[str, Any] = {n: jnp.asarray(self.rows[n][chosen]) for n in _ROWS}
        return written_rows(**arrays, answer_width=answer_width)


def stored_answers(
    parts: Parts, params: PyTree, source: Sequence[dict[str, Any]], key: jax.Array, *, attempts: int, min_correct: int
) -> StoredAnswers:
    """Draw `attempts` + 1 answers to each prompt, split the prompts, and store the last answers where they are right.

    Raises:
      ValueError: if no answer is stored, or too few prompts are left to sample.
    """
    config, samples = parts.config, attempts + 1
    c = parts.step.composition
    assert c.rollout is not None  # solved answers come beside samples
    plain = replace(c.rollout, samples_per_prompt=samples, plan=None, prompts_per_step=None)
    c = replace(c, sources=(plain,), update=Update(), losses=(), credit=())
    place = c.resources.placement
    draw = compiled([*collected(c, []), *reward_parts(c, "rows")], place, None)
    key = jax.random.fold_in(key, KeyUse.STORED)
    state = TrainState({POLICY: NetworkState(params)}, {}, key, jnp.int32(0))
    split = jax.jit(lambda *rows: near_perfect_groups(*rows, attempts=attempts, min_correct=min_correct))
    stored: list[dict[str, np.ndarray]] = []
    explored: list[np.ndarray] = []
    together = evaluation_batch(config, parts.model, place.mesh, place.rules)
    batches = data.evaluation_batches(
        source,
        parts.tokenizer,
        prompts_per_batch=max(1, min(len(source), together // samples)),
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_answer_tokens=config.rollout.max_completion_tokens,
        overlong=config.data.overlong_prompts,
    )
    for batch in batches:
        prompts = hosts.placed_rows(batch.prompts, place.mesh, place.rules)
        context = Context(batch.items, parts.tokenizer.decode, eos_ids=tuple(parts.tokenizer.eos_ids))
        # From here on every process of a run does the same with all rows.
        rows = hosts.host_copy(run(draw, state, {"prompts": prompts}, context)["rows"])
        facts = (rows["correct"], rows.sample, rows.group, rows.weight)
        solved = np.asarray(split(*facts))[::samples] > 0
        last = jax.tree.map(lambda x: np.asarray(x[samples - 1 :: samples]), rows)
        real = np.asarray(batch.weight) > 0
        explored.append(last.prompt_id[real & ~solved])
        kept = real & solved & (last["correct"] > 0)
        arrays = {name: last[name] for name in _ROWS[:-2]}
        arrays |= {"trained": last.mask, "stored_logprobs": last.behaviour_logprobs}
        stored.append({name: array[kept] for name, array in arrays.items()})
    made = StoredAnswers(
        {name: np.concatenate([part[name] for part in stored]) for name in _ROWS}, np.concatenate(explored)
    )
    counts = f"of {len(source)} prompts the initial policy solves all but {len(made.explored)}"
    if not len(made):
        raise ValueError(
            f"solved_answers has nothing to store: {counts} {min_correct} times of {attempts}; lower min_correct or "
            "train the initial policy longer"
        )
    if len(made.explored) < config.training.prompts_per_step:
        raise ValueError(
            f"solved_answers leaves too little to sample: {counts}, fewer than training.prompts_per_step "
            f"{config.training.prompts_per_step}; raise min_correct or use more items"
        )
    return made
