"""The part of the table of metrics about rollouts: conversations with an environment, and rounds of sampling."""

from __future__ import annotations

from jaxrl_llm.reporting.metric_panel import DRAWN, EPISODES, NO_EPISODE, OF_STEP, ROWS, Metric, Panel

PANELS = (
    Panel(
        "Episodes",
        (
            Metric(
                "episode/<count>_per_episode",
                "count",
                EPISODES,
                "Number of turns, calls, errors or failures in an episode.",
                absent=NO_EPISODE,
            ),
            Metric(
                "episode/stopped_by_<reason>",
                "share",
                EPISODES,
                "Episodes that ended for this reason.",
                absent=NO_EPISODE,
            ),
            Metric(
                "episode/<name>", "share", EPISODES, "Metrics of [the environment](environments.md).", absent=NO_EPISODE
            ),
        ),
        "Metrics of conversations with an environment.",
    ),
    Panel(
        "Rounds of sampling",
        (
            Metric("rounds", "count", OF_STEP, "Rounds of sampling of a plan."),
            Metric("groups_sampled", "count", OF_STEP, "Groups that `refill` has sampled."),
            Metric("groups_kept", "count", OF_STEP, "Groups with unequal rewards, which `refill` keeps."),
            Metric("samples_drawn", "count", OF_STEP, "Completions that `adaptive` has sampled."),
            Metric(
                "prompts_unfinished",
                "count",
                OF_STEP,
                "Prompts that did not meet the condition of `adaptive` in all its rounds.",
            ),
            Metric("largest_group", "count", OF_STEP, "Size of the largest group (`prioritized`)."),
            Metric("smallest_group", "count", OF_STEP, "Size of the smallest group (`prioritized`)."),
            Metric("voted_reward", "reward", DRAWN, "Mean reward of all samples that take part in the vote (`voted`)."),
            Metric(
                "prefix_tokens",
                "tokens",
                "branches; all rows of `annealed_hint`",
                "Tokens of the demonstration at the start (`demonstration_prefix`, `annealed_hint`).",
            ),
            Metric("helped_share", "share", "rows sampled with help", "Rows that are trained on (`helped`)."),
            Metric("purified_turns", "turns", "episodes", "Failed turns that were removed (`purified`)."),
            Metric("abandoned_share", "share", "sampled rows", "Completions that were abandoned (`early_abort`)."),
            Metric(
                "waiting_share",
                "share",
                "new completions",
                "Completions that are continued in the next step (`partial_rollouts`).",
            ),
            Metric("tree_nodes", "count", "prompts", "Steps in the tree of a prompt (`tree_search`)."),
            Metric("tree_solved", "share", "prompts", "Prompts whose tree has a right answer (`tree_search`)."),
            Metric("forked_share", "share", ROWS, "Completions with parallel threads (`parallel_threads`)."),
            Metric(
                "resumed_tokens", "tokens", "branches", "Tokens of the earlier completion that are kept (`resume`)."
            ),
            Metric(
                "continued_tokens",
                "tokens",
                "completions",
                "Tokens sampled in continuations of its steps (`continued_steps`).",
            ),
            Metric("shown_tokens", "tokens", DRAWN, "Tokens of the rubric's criteria in the prompt (`scaffolded`)."),
            Metric("extra_temperature", "", OF_STEP, "The second temperature of `mixed_temperature`.", exact=True),
            Metric(
                "staleness_steps",
                "steps",
                ROWS,
                "Steps between the policy that sampled the rows and the policy in training.",
                exact=True,
            ),
            Metric(
                "alignment",
                "",
                OF_STEP,
                "First-order decrease of the validation loss by losses on written rows, minus that by the others; 0 in "
                "steps without a measurement (AMFT).",
            ),
        ),
        "Metrics of the plan that samples the completions of a step.",
        apart=True,
    ),
)
