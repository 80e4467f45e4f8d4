"""The table of metrics: the meaning, the unit and the average of each number in metrics.jsonl.

A name may contain a part that depends on the run (`reward/<reward>`). docs/metrics.md and the charts of the report are
generated from this table, and tests check that it has every metric that a run writes.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence

from jaxrl_llm.reporting import metrics_of_rollouts, metrics_of_samples
from jaxrl_llm.reporting.metric_panel import (
    COUNTED,
    LARGEST,
    OF_STEP,
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
    *metrics_of_rollouts.PANELS,
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
