"""THE table of metrics: what each number of metrics.jsonl means, in which unit, and what it averages over.

A name may end in a part that a run chooses (`reward/<reward>`). docs/metrics.md is made of this table, the report takes
its charts from it, and tests hold that what is written is in it.
"""

from __future__ import annotations

import fnmatch
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """One row of the table.

    Attributes:
      name: of the number, or a form of names with <parts> that a run chooses.
      unit: in which it is counted.
      over: what it averages over.
      meaning: one sentence.
    """

    name: str
    unit: str
    over: str
    meaning: str

    @property
    def pattern(self) -> str:
        """The name with * in the place of what a run chooses."""
        head, *parts = self.name.split("<")
        return head + "".join("*" + part.partition(">")[2] for part in parts)


class Panel(NamedTuple):
    """One chart of the report: metrics that belong together.

    Attributes:
      title: heading.
      metrics: their rows in the table; of a chart that is drawn, their names.
      text: how it is read.
      log: the axis of values is logarithmic.
      apart: its numbers have nothing to do with each other, and get a chart each.
      unit: of all of its numbers; set when it is drawn.
    """

    title: str
    metrics: tuple[Any, ...]
    text: str
    log: bool = False
    apart: bool = False
    unit: str = ""


ROWS, TOKENS, GROUPS = "sampled rows", "trained tokens of sampled rows", "groups that were sampled"
UPDATES, OF_STEP, DRAWN = "updates of the step", "one number a step", "rows that the plan has drawn"
EPISODES, WITHIN = "episodes that know it", "rows where both apply, less the means of their groups"

PANELS = (
    Panel(
        "Reward",
        (
            Metric("reward", "reward", ROWS, "The weighted sum of all rewards."),
            Metric("reward_std", "reward", ROWS, "Standard deviation of the reward between rows."),
        ),
        "Mean reward of a completion, what training maximises.",
    ),
    Panel(
        "Right answers",
        (
            Metric("correct_share", "share", ROWS, "Rows whose first reward is at least 1; solved episodes."),
            Metric("sampled_accuracy", "share", DRAWN, "As `correct_share`, before a plan leaves rows out."),
        ),
        "Share of sampled completions that the first reward accepts.",
    ),
    Panel(
        "Rewards apart",
        (
            Metric("reward/<reward>", "reward", "sampled rows that it applies to", "One reward, before its weight."),
            Metric("reward/<reward>_std", "reward", ROWS, "Standard deviation of one reward between rows."),
            Metric("reward/<reward>_applies", "share", ROWS, "Rows that the reward applies to: neither None nor NaN."),
            Metric("unrated_share", "share", "rows", "Rows to which no reward applies; they teach nothing."),
            Metric("reward/<reward>_constant_groups", "share", GROUPS, "Groups in which one reward is constant."),
        ),
        "Each reward function by itself, before weights.",
    ),
    Panel(
        "Rewards against each other",
        (
            Metric(
                "reward_correlation/<reward>/<other>",
                "correlation",
                WITHIN,
                "With another reward, with `length`, or with `kl`, log pi - log pi_ref of the completion.",
            ),
            Metric(
                "starc/<reward>",
                "distance",
                WITHIN,
                "STARC distance of one of several rewards from their sum, sqrt((1 - correlation) / 2): 0 orders the "
                "samples alike, 1 the other way round. Of a verifier of weight 0 it is how far the proxy has left it.",
            ),
        ),
        "Within prompts: a reward that goes with length or KL is easily exploited; one far from the verifier misleads.",
    ),
    Panel(
        "By source",
        (
            Metric("source/<source>/share", "share", ROWS, "Rows whose prompts come from this source."),
            Metric("source/<source>/reward", "reward", "its sampled rows", "As `reward`, of one source of prompts."),
            Metric("source/<source>/correct_share", "share", "its sampled rows", "As `correct_share`."),
            Metric("source/<source>/completion_tokens", "tokens", "its sampled rows", "As `completion_tokens`."),
        ),
        "The same numbers for each source of prompts.",
    ),
    Panel(
        "Validation",
        (
            Metric("validation/greedy", "share", "problems", "Accuracy of greedy completions."),
            Metric("validation/pass@<k>", "share", "problems", "Unbiased chance that one of k samples is right."),
            Metric("validation/maj@<k>", "share", "problems", "Chance that the majority of k samples is right."),
        ),
        "Accuracy on problems that are not trained on.",
    ),
    Panel(
        "Validation, other numbers",
        (Metric("validation/<name>", "", "problems or samples", "Other numbers of [an evaluation](evaluation.md)."),),
        "What an evaluation measures beside accuracy.",
        apart=True,
    ),
    Panel(
        "KL divergence",
        (
            Metric(
                "kl_reference_per_token", "nats", TOKENS, "log pi - log pi_ref of the sampled tokens: a k1 estimate."
            ),
            Metric("kl_update", "nats", "trained tokens of the last update", "r - 1 - log r, r = policy / sampler."),
            Metric("teacher_kl/<loss>", "nats", "tokens that count", "From the teacher, over the vocabulary."),
        ),
        "From the reference, and of one update, in nats.",
    ),
    Panel(
        "Entropy",
        (Metric("entropy_per_token", "nats", TOKENS, "Entropy of the policy at the temperature of sampling."),),
        "Nats a token; near 0 all samples of a prompt are the same.",
    ),
    Panel(
        "Length",
        (
            Metric(
                "completion_tokens", "tokens", ROWS, "Tokens that the policy wrote, the end-of-sequence token included."
            ),
        ),
        "Tokens of a completion.",
    ),
    Panel(
        "Cut off",
        (Metric("truncated_share", "share", ROWS, "Completions that a limit of tokens or turns has ended."),),
        "Share of completions that reached the length limit.",
    ),
    Panel(
        "Groups without signal",
        (
            Metric("constant_group_share", "share", GROUPS, "Groups whose rewards are all equal."),
            Metric("kept_share", "share", ROWS, "Rows of weight above 0 after credit."),
        ),
        "Groups of equal rewards teach nothing.",
    ),
    Panel(
        "Degenerate completions",
        (
            Metric("duplicate_share", "share", ROWS, "Completions that an earlier one of the prompt is equal to."),
            Metric("empty_share", "share", ROWS, "Completions of the end-of-sequence token alone."),
            Metric("repeated_ngram_share", "share", ROWS, "4-grams of tokens that stood in the completion before."),
            Metric(
                "foreign_script_share",
                "share",
                ROWS,
                "Completions with letters of a script that is not in their prompt; Latin and Greek are in all.",
            ),
        ),
        "What a policy that exploits its reward often writes.",
    ),
    Panel(
        "Clipped",
        (
            Metric(
                "clip_share/<loss>",
                "share",
                "tokens that count",
                "Their gradient is clipped away; rows, of some losses.",
            ),
            Metric("dual_clip_share/<loss>", "share", "tokens that count", "Clipped by the second bound (dual clip)."),
            Metric("local_clip_share/<loss>", "share", "tokens that count", "Clipped by the bound within a group."),
            Metric("global_clip_share/<loss>", "share", "tokens that count", "Clipped by the bound over the batch."),
            Metric("floor_share/<loss>", "share", "tokens that count", "Tokens at the floor of their probability."),
            Metric("protected_share/<loss>", "share", "tokens that count", "Unlikely tokens that are not clipped."),
            Metric("outside_band_share/<loss>", "share", "tokens that count", "Tokens outside the band of entropies."),
            Metric(
                "outside_history_share/<loss>", "share", "tokens that count", "Entropies outside the band of the past."
            ),
            Metric("external_share/<loss>", "share", "tokens that count", "Tokens that the policy did not sample."),
        ),
        "Share of tokens whose gradient is clipped away.",
    ),
    Panel(
        "Gradient norm",
        (
            Metric("gradient_norm", "norm", UPDATES, "Euclidean norm of the policy's gradient before clipping."),
            Metric("gradient_norm/<network>", "norm", UPDATES, "Of another network that learns."),
        ),
        "Before clipping.",
    ),
    Panel(
        "Loss",
        (
            Metric("loss", "", UPDATES, "The sum that is minimised."),
            Metric("loss/<loss>", "", UPDATES, "One loss, before its coefficient."),
        ),
        "What is minimised, and its terms; of a policy loss the value says little.",
    ),
    Panel(
        "Advantages and ratios",
        (
            Metric("advantage_abs_per_token", "", TOKENS, "Absolute advantage."),
            Metric(
                "ratio_max", "ratio", "the largest of all tokens", "Largest probability ratio of policy and sampler."
            ),
        ),
        "Size of the advantages; largest importance ratio.",
    ),
    Panel(
        "Sampler and trainer",
        (
            Metric(
                "sampler_gap_max", "nats", "the largest of all tokens", "|log-probability of trainer minus sampler|."
            ),
            Metric("sampler_gap_mean", "nats", TOKENS, "The same; before the first update of the step."),
            Metric("engine_gap_max", "nats", "the largest of all tokens", "The same of an external engine."),
            Metric("engine_gap_mean", "nats", TOKENS, "The same of an external engine."),
        ),
        "Difference of their log-probabilities of the same token.",
        True,
    ),
    Panel(
        "Coefficients",
        (Metric("coefficient/<loss>", "", OF_STEP, "Factor of a loss, where a controller or a schedule moves it."),),
        "Factors of losses that change.",
    ),
    Panel(
        "Learning rate",
        (Metric("learning_rate", "", "the last update of the step", "Of the policy's optimiser."),),
        "Of the optimiser.",
    ),
    Panel(
        "Parameters",
        (
            Metric("parameter_norm", "norm", OF_STEP, "Euclidean norm of what is trained of the policy."),
            Metric("parameter_norm/<network>", "norm", OF_STEP, "Of another network that learns."),
            Metric("skipped_update", "0 or 1", UPDATES, "An update that was left out, as its gradient was not finite."),
        ),
        "Norms of what is trained; updates that were left out.",
    ),
    Panel(
        "Preferences and values",
        (
            Metric("preferred_share/<loss>", "share", "pairs", "Pairs that the model orders as they were judged."),
            Metric("margin/<loss>", "", "pairs", "Implicit reward of the preferred answer minus that of the other."),
            Metric(
                "log_odds_ratio/<loss>", "nats", "pairs", "Log-odds of the preferred answer minus those of the other."
            ),
            Metric("score_gap/<loss>", "", "pairs", "Score of the preferred answer minus that of the other."),
            Metric("deviation/<loss>", "", "pairs", "Stated deviation of a score, mean over heads and both answers."),
            Metric(
                "divergence_gap/<loss>",
                "nats",
                "pairs",
                "Divergence from the reference of the other answer minus that of the preferred one.",
            ),
            Metric("regret_gap/<loss>", "", "pairs", "Regret of the other segment minus that of the preferred one."),
            Metric("same_goal/<loss>", "share", "pairs", "Chance that two preferred answers are of one goal."),
            Metric("other_goal/<loss>", "share", "pairs", "The same of a preferred answer and one that was not."),
            Metric("win_share/<loss>", "share", "answers", "Share of the policy's samples that beat their opponent."),
            Metric("desirable_log_ratio/<loss>", "nats", "desirable rows", "log pi - log pi_ref of the completion."),
            Metric("undesirable_log_ratio/<loss>", "nats", "undesirable rows", "The same of undesirable ones."),
            Metric("kl_anchor/<loss>", "nats", "judged rows", "The point from which KTO measures both."),
            Metric("value_explained_variance", "", TOKENS, "1 - var(returns - values) / var(returns); 1 is perfect."),
        ),
        "What preference losses and value models have learned.",
        apart=True,
    ),
    Panel(
        "Episodes",
        (
            Metric("episode/<count>_per_episode", "count", EPISODES, "Turns, calls, errors, failures of an episode."),
            Metric("episode/stopped_by_<reason>", "share", EPISODES, "Why episodes ended."),
            Metric("episode/<name>", "share", EPISODES, "What [the environment](environments.md) measures."),
        ),
        "What an environment measures.",
    ),
    Panel(
        "Rounds of sampling",
        (
            Metric("rounds", "count", OF_STEP, "Rounds that a plan has sampled in."),
            Metric("groups_sampled", "count", OF_STEP, "Groups that `refill` has drawn."),
            Metric("groups_kept", "count", OF_STEP, "Groups with unequal rewards that `refill` has found."),
            Metric("samples_drawn", "count", OF_STEP, "Completions that `adaptive` has drawn."),
            Metric("prompts_unfinished", "count", OF_STEP, "Prompts that `adaptive` has given up."),
            Metric("largest_group", "count", OF_STEP, "Completions of the prompt with the most (`prioritized`)."),
            Metric("smallest_group", "count", OF_STEP, "Completions of the prompt with the fewest (`prioritized`)."),
            Metric("voted_reward", "reward", DRAWN, "Mean reward of all samples that have voted (`voted`)."),
            Metric(
                "prefix_tokens",
                "tokens",
                "rows of branches",
                "Tokens shown of a demonstration (`demonstration_prefix`).",
            ),
            Metric("helped_share", "share", "rows drawn with help", "Share of them that count (`helped`)."),
            Metric("purified_turns", "turns", "episodes", "Failed turns that were taken out (`purified`)."),
            Metric("abandoned_share", "share", "sampled rows", "Share that was given up (`early_abort`)."),
            Metric("waiting_share", "share", DRAWN, "Share that waits for the next step (`partial_rollouts`)."),
            Metric("tree_nodes", "count", "prompts", "Steps that the tree of a prompt has (`tree_search`)."),
            Metric("tree_solved", "share", "prompts", "Share whose tree holds a right answer (`tree_search`)."),
            Metric("forked_share", "share", ROWS, "Share of texts with threads (`parallel_threads`)."),
            Metric("resumed_tokens", "tokens", "rows of branches", "Tokens taken from earlier completions (`resume`)."),
            Metric("continued_tokens", "tokens", "completions", "Tokens drawn from behind steps (`continued_steps`)."),
            Metric("shown_tokens", "tokens", DRAWN, "Tokens of criteria that a prompt shows (`scaffolded`)."),
            Metric("extra_temperature", "", OF_STEP, "The second temperature of `mixed_temperature`."),
            Metric("staleness_steps", "steps", ROWS, "Updates since the policy that has sampled."),
            Metric("alignment", "", OF_STEP, "Fall of the validation loss as the supervised share grows (AMFT)."),
        ),
        "How the completions of a step were asked for.",
        apart=True,
    ),
    Panel(
        "Host functions",
        (
            Metric("seconds/<function>", "s", OF_STEP, "Wall time of a function that runs on the host."),
            Metric("judge/<function>/<name>", "count", OF_STEP, "Counts of a judge: calls, tokens, what was cached."),
            Metric("failures/<function>", "count", OF_STEP, "Calls that raised, or took longer than `deadline_s`."),
        ),
        "Time and failures of functions that read text.",
    ),
    Panel("Seconds", (Metric("seconds", "s", OF_STEP, "Wall time since the step before."),), "Of a step."),
    Panel(
        "Throughput",
        (Metric("tokens_per_second", "tokens/s", OF_STEP, "Sampled tokens by the wall time of the whole step."),),
        "Sampled tokens a second, updates included.",
    ),
    Panel(
        "Memory",
        (
            Metric("host_memory_gib", "GiB", OF_STEP, "Resident memory of the process after the step."),
            Metric("device_memory_gib", "GiB", "the fullest device of the host", "In use after the step."),
            Metric("device_peak_memory_gib", "GiB", "the fullest device of the host", "Most that was ever in use."),
        ),
        "Of the process on the host, and of devices that tell it (a CPU is the host).",
    ),
    Panel(
        "Numbers of the recipe",
        (
            Metric("metric/<name>", "", "rows that know it", "What an entry `metric/<name>` of `credit` fills."),
            Metric(
                "selection/<name>",
                "",
                OF_STEP,
                "Of the selection; `bandit`: value and chance of each arm.",
            ),
        ),
        "Filled by `credit`, or told by a selection.",
        apart=True,
    ),
)
METRICS = tuple(metric for panel in PANELS for metric in panel.metrics)
# What a clock or the machine says, which is another number when a step is taken again.
OF_MACHINE = ("seconds", "tokens_per_second", "host_memory_gib", "device_memory_gib", "device_peak_memory_gib")


def described(name: str) -> Metric | None:
    """The row of a number's name: the one that is spelt so, else the one with the closest form; None for none."""
    fitting = [each for each in METRICS if each.name == name or fnmatch.fnmatchcase(name, each.pattern)]
    return max(fitting, key=lambda each: (each.name == name, len(each.pattern)), default=None)
