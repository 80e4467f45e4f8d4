"""Plans: how the completions of a step are requested. Each function returns a `plan.Plan`.

Plans are nested; `plain` is the innermost. Keywords that are named like a size of the run (samples_per_prompt,
max_completion_tokens, temperature, pad_id, encode) are filled from the run.
"""

from jaxrl_llm.rollout.plans.abandoned_rows import early_abort, mean_entropy_above
from jaxrl_llm.rollout.plans.adaptive_samples import adaptive
from jaxrl_llm.rollout.plans.annealed_hints import annealed_hint
from jaxrl_llm.rollout.plans.continued_rows import partial_rollouts
from jaxrl_llm.rollout.plans.demonstration_prefixes import demonstration_prefix
from jaxrl_llm.rollout.plans.demonstrations_in_groups import demonstration_in_group
from jaxrl_llm.rollout.plans.forked_rows import parallel_threads
from jaxrl_llm.rollout.plans.given_prefixes import prefixes
from jaxrl_llm.rollout.plans.greedy_baselines import greedy_baseline
from jaxrl_llm.rollout.plans.helped_rows import helped, under_view
from jaxrl_llm.rollout.plans.mixed_temperatures import mixed_temperature
from jaxrl_llm.rollout.plans.paraphrases import paraphrased
from jaxrl_llm.rollout.plans.plan import Plan, Request, plain
from jaxrl_llm.rollout.plans.prioritized_samples import prioritized
from jaxrl_llm.rollout.plans.purified_conversations import purified, turns_answered, turns_below
from jaxrl_llm.rollout.plans.refilled_groups import refill
from jaxrl_llm.rollout.plans.resumed_completions import (
    first_departure,
    from_the_start,
    highest_entropy,
    last_share,
    resume,
)
from jaxrl_llm.rollout.plans.rollout_budget import budget
from jaxrl_llm.rollout.plans.scaffolds import scaffolded
from jaxrl_llm.rollout.plans.step_continuations import continued_steps
from jaxrl_llm.rollout.plans.step_trees import tree_search
from jaxrl_llm.rollout.plans.voted_samples import voted

__all__ = [
    "Plan",
    "Request",
    "adaptive",
    "annealed_hint",
    "budget",
    "continued_steps",
    "demonstration_in_group",
    "demonstration_prefix",
    "early_abort",
    "first_departure",
    "from_the_start",
    "greedy_baseline",
    "helped",
    "highest_entropy",
    "last_share",
    "mean_entropy_above",
    "mixed_temperature",
    "parallel_threads",
    "paraphrased",
    "partial_rollouts",
    "plain",
    "prefixes",
    "prioritized",
    "purified",
    "refill",
    "resume",
    "scaffolded",
    "tree_search",
    "turns_answered",
    "turns_below",
    "under_view",
    "voted",
]
