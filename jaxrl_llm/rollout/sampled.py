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
    """A source of rows: the policy samples completions of the prompts of a step.

    Attributes:
      samples_per_prompt: completions of each prompt to train on.
      max_completion_tokens: longest completion, end of sequence included.
      eos_ids: tokens that end a completion.
      pad_id: token that fills the rest; may be one of `eos_ids`.
      temperature: of the softmax, above 0; the trainer computes log-probabilities at the same temperature.
      plan: in which rounds completions are sampled; None samples all at once.
      prompts_per_step: prompts in a batch, if known; sizes that do not divide are then refused when the step is built.
      replay_router: the update of a mixture of experts uses the experts that were chosen when each token was sampled.
      slots: completions that are decoded at a time; None decodes all in one batch.
      truncation: top-k sampling, optionally with top-p and min-p. The trainer then normalises over the same tokens;
        None samples from the whole vocabulary.
      off_policy_steps: 1 samples a batch with the policy before the last update (one-step off-policy), 0 with the
        newest.
      environment: returns the observations in multi-turn conversations; None for single-turn sampling.
      engine: an engine in another process that samples instead of the policy.
      selection: chooses the prompts of a step; None if the caller chooses them. Needs `prompts_per_step`.
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
                "rollout.top_p or rollout.min_p is set without rollout.top_k; training stores the set of tokens that "
                "each token was sampled from, so set its largest size (for example top_k: 64)"
            )
        if self.off_policy_steps not in (0, 1):
            raise ValueError(f"rollout.off_policy_steps is {self.off_policy_steps}; it must be 0 or 1")
        if self.temperature <= 0:
            raise ValueError(
                f"rollout.temperature is {self.temperature}; training samples need a temperature above 0 "
                "(greedy decoding is for evaluation)"
            )
        require_ranges(self, "rollout")
