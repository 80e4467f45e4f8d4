"""A source of rows: the policy, an engine, or a policy in conversation with an environment samples completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxrl_llm.experience import Selection
from jaxrl_llm.ranges import Count, Natural, require_ranges
from jaxrl_llm.rollout.controls import Controls
from jaxrl_llm.rollout.environments import Environment
from jaxrl_llm.rollout.hand_over import External
from jaxrl_llm.rollout.host_environments import HostEnvironment
from jaxrl_llm.rollout.plans import Plan


@dataclass(frozen=True)
class Rollout:
    """A source of rows: the policy samples completions of the prompts that a step is handed.

    Attributes:
      samples_per_prompt: completions of each prompt that learn.
      max_completion_tokens: longest completion, end of sequence included.
      eos_ids: tokens that end a completion.
      pad_id: token that fills the rest; may be one of `eos_ids`.
      temperature: of the softmax, above 0; the trainer scores at the same temperature.
      plan: how they are asked for; None draws all at once.
      prompts_per_step: prompts in a batch, if known: sizes that do not divide are then found when the step is built.
      replay_router: a mixture of experts learns through the experts that sampled each token.
      slots: completions that are decoded at a time; None decodes all side by side.
      truncation: top-k, with top-p and min-p within it, of what is sampled. The trainer then computes over the tokens
        that each one could have been, too; None samples from the whole vocabulary.
      off_policy_steps: 1 samples a batch with the policy before the last update (one-step off-policy), 0 with the
        newest.
      environment: what answers the turns of conversations; None where one completion is all.
      engine: an engine in another process that samples in the place of the policy.
      selection: what chooses the prompts of a step; None where the caller does. Needs `prompts_per_step`.
    """

    samples_per_prompt: Count
    max_completion_tokens: Count
    eos_ids: Sequence[Natural]
    pad_id: Natural
    temperature: float = 1.0
    plan: Plan | None = None
    prompts_per_step: Count | None = None
    replay_router: bool = False
    slots: Count | None = None
    truncation: Controls | None = None
    off_policy_steps: int = 0
    environment: Environment | HostEnvironment | None = None
    engine: External | None = None
    selection: Selection | None = None

    def __post_init__(self):
        if self.truncation is not None and self.truncation.top_k is None:
            raise ValueError(
                "rollout.top_p or rollout.min_p is set without rollout.top_k; training keeps the tokens that each one "
                "was drawn from, so bound their number (for example top_k: 64)"
            )
        if self.off_policy_steps not in (0, 1):
            raise ValueError(f"rollout.off_policy_steps is {self.off_policy_steps}; it must be 0 or 1")
        if self.temperature <= 0:
            raise ValueError(
                f"rollout.temperature is {self.temperature}; training samples need a temperature above 0 "
                "(greedy decoding is for evaluation)"
            )
        require_ranges(self, "rollout")
