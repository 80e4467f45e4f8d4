"""The table of metrics: the meaning, the unit and the average of each number in metrics.jsonl.

A name may contain a part that depends on the run (`reward/<reward>`). docs/metrics.md and the charts of the report are
generated from this table, and tests check that it has every metric that a run writes.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence

from jaxrl_llm.reporting import metrics_of_samples
from jaxrl_llm.reporting.metric_panel import (
    COUNTED,
    DRAWN,
    EPISODES,
    LARGEST,
    NO_EPISODE,
    OF_STEP,
    ROWS,
    TOKENS,
    UPDATES,
    Metric,
    Panel,
)

PANELS = (
    *metrics_of_samples.PANELS,
    Panel(
        "Clipped",
        (
            Metric(
                "clip_share/<loss>",
                "share",
                COUNTED,
                "Tokens (rows for some losses) whose gradient is 0 because of clipping.",
            ),
            Metric("dual_clip_share/<loss>", "share", COUNTED, "Tokens clipped by the second bound (dual clip)."),
            Metric(
                "local_clip_share/<loss>",
                "share",
                COUNTED,
                "Tokens clipped in the surrogate of the advantages within groups (COPO).",
            ),
            Metric(
                "global_clip_share/<loss>",
                "share",
                COUNTED,
                "Tokens clipped in the surrogate of the advantages over the batch (COPO).",
            ),
            Metric(
                "floor_share/<loss>",
                "share",
                COUNTED,
                "Tokens of wrong answers whose ratio is at the lower bound (NFT).",
            ),
            Metric(
                "protected_share/<loss>",
                "share",
                COUNTED,
                "Unlikely tokens with the added KL term in place of clipping (Lp-Reg).",
            ),
            Metric(
                "outside_band_share/<loss>", "share", COUNTED, "Tokens whose entropy is outside of the band (SPINE)."
            ),
            Metric(
                "outside_history_share/<loss>",
                "share",
                COUNTED,
                "Tokens whose entropy is outside of the range around its history (EPO).",
            ),
            Metric("external_share/<loss>", "share", COUNTED, "Tokens that were not sampled by the policy."),
        ),
        "Share of tokens that are clipped, or treated differently by a loss.",
    ),
    Panel(
        "Gradient norm",
        (
            Metric("gradient_norm", "norm", UPDATES, "Euclidean norm of the policy's gradient, before clipping."),
            Metric("gradient_norm/<network>", "norm", UPDATES, "The same for another trained network."),
        ),
        "Norms of gradients before clipping.",
    ),
    Panel(
        "Loss",
        (
            Metric("loss", "", UPDATES, "The sum of all losses, which is minimised."),
            Metric("loss/<loss>", "", UPDATES, "One loss, before its coefficient is applied."),
        ),
        "The minimised sum and its terms. The value of a policy loss is not a measure of progress.",
    ),
    Panel(
        "Advantages and ratios",
        (
            Metric("advantage_abs_per_token", "", TOKENS, "Mean absolute advantage."),
            Metric(
                "ratio_max",
                "ratio",
                LARGEST,
                "Largest ratio of the probabilities under the policy and the sampling policy.",
            ),
        ),
        "Size of the advantages, and the largest importance ratio.",
    ),
    Panel(
        "Sampler and trainer",
        (
            Metric(
                "sampler_gap_max",
                "nats",
                LARGEST,
                "|log pi_trainer - log pi_sampler|, before the first update of the step.",
            ),
            Metric("sampler_gap_mean", "nats", TOKENS, "The mean of the same."),
            Metric("engine_gap_max", "nats", LARGEST, "The same for an external engine."),
            Metric("engine_gap_mean", "nats", TOKENS, "The mean of the same for an external engine."),
        ),
        "Difference of the log-probabilities of the same token in sampling and in training.",
        True,
    ),
    Panel(
        "Coefficients",
        (
            Metric(
                "coefficient/<loss>",
                "",
                OF_STEP,
                "Coefficient of a loss that a controller or a schedule changes.",
                exact=True,
            ),
        ),
        "Coefficients of losses that change during training.",
    ),
    Panel(
        "Learning rate",
        (
            Metric(
                "learning_rate",
                "",
                "the last update of the step",
                "Learning rate of the policy's optimiser.",
                exact=True,
            ),
        ),
        "Learning rate of the policy's optimiser.",
    ),
    Panel(
        "Parameters",
        (
            Metric("parameter_norm", "norm", OF_STEP, "Euclidean norm of the policy's trained parameters.", exact=True),
            Metric("parameter_norm/<network>", "norm", OF_STEP, "The same for another trained network.", exact=True),
            Metric(
                "skipped_update",
                "0 or 1",
                UPDATES,
                "1 if an update was skipped, since its gradient was not finite.",
                exact=True,
            ),
        ),
        "Norms of the trained parameters, and skipped updates.",
    ),
    Panel(
        "Preferences and values",
        (
            Metric("preferred_share/<loss>", "share", "pairs", "Pairs that the model orders as their label does."),
            Metric(
                "margin/<loss>", "", "pairs", "Implicit reward of the preferred answer minus that of the other answer."
            ),
            Metric(
                "log_odds_ratio/<loss>",
                "nats",
                "pairs",
                "Log-odds of the preferred answer minus those of the other answer.",
            ),
            Metric("score_gap/<loss>", "", "pairs", "Score of the preferred answer minus that of the other answer."),
            Metric(
                "deviation/<loss>",
                "",
                "pairs",
                "Predicted standard deviation of a score, averaged over heads and both answers.",
            ),
            Metric(
                "divergence_gap/<loss>",
                "nats",
                "pairs",
                "Divergence from the reference in the other answer minus that in the preferred answer.",
            ),
            Metric(
                "regret_gap/<loss>", "", "pairs", "Regret of the other segment minus that of the preferred segment."
            ),
            Metric(
                "same_goal/<loss>",
                "share",
                "pairs",
                "Mean sigmoid of the similarity of states within the preferred answer.",
            ),
            Metric(
                "other_goal/<loss>",
                "share",
                "pairs",
                "The same between states of the preferred and of the other answer.",
            ),
            Metric("win_share/<loss>", "share", "answers", "Samples of the policy that win against their opponent."),
            Metric("desirable_log_ratio/<loss>", "nats", "desirable rows", "log pi - log pi_ref of the completion."),
            Metric("undesirable_log_ratio/<loss>", "nats", "undesirable rows", "The same for undesirable completions."),
            Metric(
                "kl_anchor/<loss>",
                "nats",
                "judged rows",
                "Estimate of the KL divergence from the reference, subtracted from both in KTO.",
            ),
            Metric(
                "value_explained_variance",
                "",
                TOKENS,
                "1 - var(returns - values) / var(returns); 1 is perfect.",
                absent="all returns of the step are equal",
            ),
        ),
        "Metrics of preference losses, reward models and value models.",
        apart=True,
    ),
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
    Panel(
        "Host functions",
        (
            Metric("seconds/<function>", "s", OF_STEP, "Wall time of a function that runs on the host."),
            Metric("judge/<function>/<name>", "count", OF_STEP, "Counts of a judge: calls, tokens, cached answers."),
            Metric("failures/<function>", "count", OF_STEP, "Calls with an exception, or longer than `deadline_s`."),
        ),
        "Time and failures of functions that read text on the host.",
    ),
    Panel("Seconds", (Metric("seconds", "s", OF_STEP, "Wall time since the previous step."),), "Wall time of a step."),
    Panel(
        "Throughput",
        (
            Metric(
                "tokens_per_second", "tokens/s", OF_STEP, "Sampled tokens divided by the wall time of the whole step."
            ),
        ),
        "Sampled tokens per second of the whole step, including the updates.",
    ),
    Panel(
        "Memory",
        (
            Metric("host_memory_gib", "GiB", OF_STEP, "Resident memory of the process after the step.", exact=True),
            Metric(
                "device_memory_gib",
                "GiB",
                "the fullest device of the host",
                "Memory in use after the step.",
                exact=True,
            ),
            Metric(
                "device_peak_memory_gib",
                "GiB",
                "the fullest device of the host",
                "Largest memory in use since the start of the process.",
                exact=True,
            ),
        ),
        "Memory of the host process, and of devices that report it (a CPU is the host).",
    ),
    Panel(
        "Metrics of the recipe",
        (
            Metric(
                "metric/<name>",
                "",
                "rows with a value",
                "The value that the credit entry `metric/<name>` returns.",
                absent="it returns NaN for every row",
            ),
            Metric(
                "selection/<name>",
                "",
                OF_STEP,
                "Metrics of the selection, such as the value and the probability of each arm of `bandit`.",
            ),
        ),
        "Metrics that `credit` or a selection computes.",
        apart=True,
    ),
)
METRICS = tuple(metric for panel in PANELS for metric in panel.metrics)
# Settings, which are constant and not drawn.
SETTINGS = ("validation/problems", "validation/samples_per_problem", "reward/*_weight")
# Measurements of time and memory, which differ if a step is repeated.
OF_MACHINE = ("seconds", "tokens_per_second", "host_memory_gib", "device_memory_gib", "device_peak_memory_gib")


def described(name: str) -> Metric | None:
    """The row of a metric's name: an exact match, or else the longest pattern that matches; None if there is none."""
    fitting = [each for each in METRICS if each.name == name or fnmatch.fnmatchcase(name, each.pattern)]
    return max(fitting, key=lambda each: (each.name == name, len(each.pattern)), default=None)


def undefined(metrics: Mapping[str, float]) -> set[str]:
    """Names of the metrics that are not defined in a step: NaN, where the table says when they are absent.

    >>> undefined({"starc/brevity": math.nan, "loss": math.nan, "reward": 0.5})
    {'starc/brevity'}
    """
    rows = {name: described(name) for name, value in metrics.items() if math.isnan(value)}
    return {name for name, row in rows.items() if row is not None and row.absent}


def panels(names: Sequence[str]) -> list[Panel]:
    """The charts of these metrics in the order of the table: one chart for each unit of a panel.

    Metrics that are not in the table have a chart each.
    """
    rows = {name: described(name) for name in names}
    settings = {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in SETTINGS)}

    def drawn() -> Iterator[Panel]:
        for panel in PANELS:
            by_unit: dict[tuple[str, str], list[str]] = {}
            for metric in panel.metrics:
                for name in (name for name, row in rows.items() if row is metric and name not in settings):
                    by_unit.setdefault((metric.unit, name if panel.apart else ""), []).append(name)
            for (unit, name), own in by_unit.items():
                title = name or (f"{panel.title}: {unit}" if unit and len(by_unit) > 1 else panel.title)
                yield panel._replace(title=title, metrics=tuple(own), unit=unit)

    return [*drawn(), *(Panel(name, (name,), "") for name, row in rows.items() if row is None)]
