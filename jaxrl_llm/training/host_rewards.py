"""Rewards on the host, in a run of one process or of several: each process scores the rows that its devices hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxrl_llm.experience import Experience
from jaxrl_llm.parallel import hosts
from jaxrl_llm.rewards import RewardError
from jaxrl_llm.training.score import RewardTerm, host_components

# What scoring reads of a row.
_READ = ("tokens", "length", "reward_components", "weight", "group")


def rewarded_on_host(
    terms: Sequence[RewardTerm], experience: Experience, items: Sequence[dict], decode: Callable[[Sequence[int]], str]
) -> Experience:
    """Experience with the columns of host rewards filled, and placed where they were.

    Over several processes every row is scored by one of them, and all samples of a prompt by the same one where each
    prompt has equally many. All processes must call it.

    Args:
      terms: reward functions.
      experience: rows of the whole batch.
      items: one dictionary a prompt of the whole batch, on every process.
      decode: token ids -> text.

    Raises:
      RewardError: on every process, when a function fails on one of them.
    """
    components = experience.reward_components
    assert components is not None
    placement = components.sharding if isinstance(components, jax.Array) else None
    if jax.process_count() > 1:
        assert isinstance(placement, NamedSharding)
        scored = _scored_by_all(terms, experience, items, decode, placement)
        placed = jax.make_array_from_callback(scored.shape, placement, lambda index: scored[index])
        return replace(experience, reward_components=placed)
    scored = host_components(terms, experience, items, decode)
    if isinstance(placement, NamedSharding):  # without a mesh, placing them by hand would compile both programs twice
        scored = jax.device_put(scored, placement)
    return replace(experience, reward_components=scored)


def _scored_by_all(
    terms: Sequence[RewardTerm],
    experience: Experience,
    items: Sequence[dict],
    decode: Callable[[Sequence[int]], str],
    placement: NamedSharding,
) -> np.ndarray:
    """All rows with their components, on every process."""
    read = {name: getattr(experience, name) for name in _READ}
    rows, own = hosts.own_rows(hosts.by_rows(read, len(items), cast(Mesh, placement.mesh)))
    scored, failure = own["reward_components"], None
    try:
        if len(rows):
            scored = host_components(terms, replace(experience, **own), items, decode)
    except RewardError as error:
        failure = error
    # One that raised alone would leave the others waiting for its rows.
    said = hosts.first_failure(None if failure is None else str(failure))
    if said is not None:
        raise RewardError(said) from failure
    return hosts.gathered_rows(rows, scored, experience.tokens.shape[0])
