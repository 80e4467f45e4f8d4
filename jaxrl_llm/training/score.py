"""Score: completions -> rewards, in the graph where tokens decide and on the host where text does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrl_llm.experience import Experience
from jaxrl_llm.rewards import checked_host_reward, weighted_sum
from jaxrl_llm.training.wiring import call, fields_of, names

# A reward that names one of these wants text, so it runs on the host between the two jitted halves of a step.
HOST_NAMES = frozenset({"completions", "prompts", "answers", "items"})


@dataclass(frozen=True)
class RewardTerm:
    """One reward function of a recipe.

    Attributes:
      function: returns one number a row; see `HOST_NAMES` for those that run on the host.
      weight: factor in the sum that is maximised.
      name: for metrics and messages.
    """

    function: Callable[..., Any]
    weight: float = 1.0
    name: str = ""

    @property
    def on_host(self) -> bool:
        """Whether the function asks for text."""
        return bool(names(self.function) & HOST_NAMES)


def _in_graph(term: RewardTerm, experience: Experience) -> Float[Array, "B"]:
    reward = jnp.asarray(call(term.function, fields_of(experience)))
    rows = experience.tokens.shape[0]
    if reward.shape != (rows,):
        raise ValueError(
            f"reward {term.name!r} returned shape {reward.shape} for {rows} completions; it must return one number "
            f"for each completion, shape ({rows},)"
        )
    return reward.astype(jnp.float32)


def traceable_components(terms: Sequence[RewardTerm], experience: Experience) -> Float[Array, "B K"]:
    """One column for each reward; the columns of host rewards are 0 until `host_components` fills them."""
    rows = experience.tokens.shape[0]
    columns = [jnp.zeros(rows) if t.on_host else _in_graph(t, experience) for t in terms]
    return jnp.stack(columns, axis=1)


def host_components(
    terms: Sequence[RewardTerm], experience: Experience, items: Sequence[dict], decode: Callable[[Sequence[int]], str]
) -> np.ndarray:
    """Fill the columns of host rewards on rows that are there.

    `items` holds one dictionary a prompt: body, answer, task, level, ...

    Raises:
      RewardError: when a function raises, or returns the wrong shape, NaN or infinity.
    """
    wanted_of_rows = (experience.tokens, experience.length, experience.reward_components, experience.weight)
    tokens, length, components, weight = jax.device_get(wanted_of_rows)
    components, present = np.array(components), np.flatnonzero(weight > 0)
    # Groups beyond the prompts are more groups of the first prompts.
    per_row = [items[group % len(items)] for group in jax.device_get(experience.group)[present]]
    text = {
        "completions": [decode(tokens[row, : length[row]].tolist()) for row in present],
        "prompts": [item["body"] for item in per_row],
        "answers": [item["answer"] for item in per_row],
        "items": per_row,
    }
    for column, term in enumerate(terms):
        if term.on_host:
            wanted = names(term.function)
            data = {name: value for name, value in text.items() if name in wanted}
            rewards = checked_host_reward(term.function, data, rows=len(per_row), name=term.name)
            components[present, column] = rewards
    return components


def with_rewards(experience: Experience, terms: Sequence[RewardTerm]) -> Experience:
    """Experience with the weighted sum of its reward components and the verifier's verdict (`correct`).

    Of a conversation the environment knows whether it was solved, however its rewards are shaped.
    """
    components = jnp.asarray(experience.reward_components)
    solved = experience.extras.get("solved")
    return replace(
        experience,
        rewards=weighted_sum(components, weights=tuple(term.weight for term in terms)),
        correct=(components[:, 0] >= 1.0).astype(jnp.float32) if solved is None else solved,
    )
