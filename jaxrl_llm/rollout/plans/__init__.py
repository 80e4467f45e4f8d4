"""Plans: how the completions of a step are asked for. `plan.Plan` is what each of them returns.

A plan is made around another, from the inside out; `plain` is the innermost. Keywords that are named like a size of the
run (samples_per_prompt, max_completion_tokens, temperature, pad_id, encode) are filled from the run.
"""

from jaxrl_llm.rollout.plans.adaptive_samples import adaptive
from jaxrl_llm.rollout.plans.continued_steps import continued_steps
from jaxrl_llm.rollout.plans.demonstrations_in_groups import demonstration_in_group
from jaxrl_llm.rollout.plans.given_prefixes import prefixes
from jaxrl_llm.rollout.plans.greedy_baselines import greedy_baseline
from jaxrl_llm.rollout.plans.mixed_temperatures import mixed_temperature
from jaxrl_llm.rollout.plans.paraphrases import paraphrased
from jaxrl_llm.rollout.plans.plan import Plan, Request, plain
from jaxrl_llm.rollout.plans.refilled_groups import refill
from jaxrl_llm.rollout.plans.resumed_completions import from_the_start, highest_entropy, last_share, resume
from jaxrl_llm.rollout.plans.rollout_budget import budget
from jaxrl_llm.rollout.plans.voted_samples import voted

__all__ = [
    "Plan",
    "Request",
    "adaptive",
    "budget",
    "continued_steps",
    "demonstration_in_group",
    "from_the_start",
    "greedy_baseline",
    "highest_entropy",
    "last_share",
    "mixed_temperature",
    "paraphrased",
    "plain",
    "prefixes",
    "refill",
    "resume",
    "voted",
]
