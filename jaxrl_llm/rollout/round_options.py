"""How often, and how many times a prompt, completions are sampled before an update: the options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Refill:
    """Sample further prompts in the place of groups whose samples are all alike.

    A step is handed `max_rounds` times its prompts; those that it does not come to are not seen in this epoch.

    Attributes:
      max_rounds: batches of prompts at most. Places that are empty then have weight 0.
      metric: what must differ within a group that is kept: "correct" or "rewards".

    Reference: DAPO (2503.14476).
    """

    max_rounds: int = 10
    metric: Literal["correct", "rewards"] = "correct"

    def __post_init__(self):
        if self.max_rounds < 1:
            raise ValueError(f"rollout.refill.max_rounds is {self.max_rounds}; it must be at least 1")
        if self.metric not in ("correct", "rewards"):
            raise ValueError(f"rollout.refill.metric is {self.metric!r}; it must be 'correct' or 'rewards'")


@dataclass(frozen=True)
class Adaptive:
    """Sample each prompt until it has samples enough of both kinds; `samples_per_prompt` of them are kept.

    Rows bring `label` (1 where the reward is above `threshold`), `pool_mean` and `pool_count` (of all samples of the
    prompt), for `pool_centred`.

    Attributes:
      max_rounds: rounds at most.
      samples_per_round: samples of a prompt in each.
      threshold: reward above which a sample is right.
      both_kinds: see `finished_prompts`.

    Reference: Reinforce-Ada (2510.04996).
    """

    max_rounds: int = 4
    samples_per_round: int = 8
    threshold: float = 0.7
    both_kinds: bool = True

    def __post_init__(self):
        if self.max_rounds < 1 or self.samples_per_round < 1:
            raise ValueError(
                f"rollout.adaptive.max_rounds is {self.max_rounds} and rollout.adaptive.samples_per_round is "
                f"{self.samples_per_round}; both must be at least 1"
            )


@dataclass(frozen=True)
class Budget:
    """Share out the samples of a step by what they are worth, from each prompt's success at its last visit.

    Attributes:
      prompt_ids: prompts have ids below this; the success of each is remembered. None where a run knows its data.
      least, most, rule, alpha: see `knapsack_rollouts`.

    Reference: Knapsack RL (2509.25849).
    """

    prompt_ids: int | None = None
    least: int = 2
    most: int = 128
    rule: Literal["probability", "expectation"] = "probability"
    alpha: float = 0.9

    def __post_init__(self):
        if self.prompt_ids is not None and self.prompt_ids < 1:
            raise ValueError(f"rollout.budget.prompt_ids is {self.prompt_ids}; it must be at least 1")
