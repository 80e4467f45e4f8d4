"""The part of the table of metrics about samples: rewards, validation, divergence, entropy, and lengths."""

from __future__ import annotations

from jaxrl_llm.reporting.metric_panel import (
    COUNTED,
    DRAWN,
    GROUPS,
    NO_ROW,
    OF_SOURCE,
    OF_STEP,
    ROWS,
    TOKENS,
    WITHIN,
    Metric,
    Panel,
)

NO_ROW_OF_SOURCE = "the step has no rows of the source"
CONSTANT_WITHIN = "one of the two is constant within every group"

PANELS = (
    Panel(
        "Reward",
        (
            Metric("reward", "reward", ROWS, "The weighted sum of all rewards."),
            Metric("reward_std", "reward", ROWS, "Standard deviation of the reward over rows."),
        ),
        "Mean reward of a completion, which training maximises.",
    ),
    Panel(
        "Right answers",
        (
            Metric("correct_share", "share", ROWS, "Rows whose first reward is at least 1; solved episodes."),
            Metric(
                "sampled_accuracy", "share", DRAWN, "As `correct_share`, but including rows that the plan leaves out."
            ),
        ),
        "Share of sampled completions that the first reward accepts.",
    ),
    Panel(
        "Individual rewards",
        (
            Metric(
                "reward/<reward>",
                "reward",
                "sampled rows that it applies to",
                "One reward, before its weight is applied.",
                absent=NO_ROW,
            ),
            Metric(
                "reward/<reward>_std",
                "reward",
                "sampled rows that it applies to",
                "Standard deviation of one reward over rows.",
                absent=NO_ROW,
            ),
            Metric(
                "reward/<reward>_weight",
                "",
                OF_STEP,
                "The reward's weight in the sum. The report shows what each reward adds to the sum, not this curve.",
                exact=True,
            ),
            Metric("reward/<reward>_applies", "share", ROWS, "Rows for which the reward is neither None nor NaN."),
            Metric("unrated_share", "share", "rows", "Rows to which no reward applies; they are not trained on."),
            Metric(
                "reward/<reward>_constant_groups",
                "share",
                GROUPS,
                "Groups in which the reward is constant.",
                absent=NO_ROW,
            ),
        ),
        "Each reward function by itself, before its weight is applied.",
    ),
    Panel(
        "Rewards against each other",
        (
            Metric(
                "reward_correlation/<reward>/<other>",
                "correlation",
                WITHIN,
                "Correlation of a reward with another reward, with `length`, or with `kl`: log pi - log pi_ref of the "
                "completion.",
                absent=CONSTANT_WITHIN,
            ),
            Metric(
                "starc/<reward>",
                "distance",
                WITHIN,
                "STARC distance of one of several rewards from their weighted sum, sqrt((1 - correlation) / 2): 0 if "
                "they differ by scale and offset only, 1 if they are opposite. For a verifier of weight 0, it "
                "measures the disagreement of the proxy reward with the verifier.",
                absent=CONSTANT_WITHIN,
            ),
        ),
        "Compared within prompts. A reward that is correlated with length or KL is easily exploited, and one at a "
        "large distance from the verifier is misleading.",
    ),
    Panel(
        "By source",
        (
            Metric("source/<source>/share", "share", ROWS, "Rows with prompts from this source."),
            Metric("source/<source>/reward", "reward", OF_SOURCE, "As `reward`.", NO_ROW_OF_SOURCE),
            Metric("source/<source>/correct_share", "share", OF_SOURCE, "As `correct_share`.", NO_ROW_OF_SOURCE),
            Metric(
                "source/<source>/completion_tokens", "tokens", OF_SOURCE, "As `completion_tokens`.", NO_ROW_OF_SOURCE
            ),
        ),
        "The main metrics for each source of prompts.",
    ),
    Panel(
        "Validation",
        (
            Metric("validation/greedy", "share", "problems", "Accuracy of greedy completions."),
            Metric(
                "validation/pass@<k>",
                "share",
                "problems",
                "Unbiased estimate of the probability that at least one of k samples is right.",
            ),
            Metric(
                "validation/maj@<k>", "share", "problems", "Probability that the majority vote of k samples is right."
            ),
        ),
        "Accuracy on the validation split, which is not trained on.",
    ),
    Panel(
        "Other validation metrics",
        (Metric("validation/<name>", "", "problems or samples", "Other metrics of [an evaluation](evaluation.md)."),),
        "Metrics of an evaluation other than accuracy.",
        apart=True,
    ),
    Panel(
        "KL divergence",
        (
            Metric(
                "kl_reference_per_token",
                "nats",
                TOKENS,
                "log pi - log pi_ref of the sampled tokens: the k1 estimate of the KL divergence from the reference.",
            ),
            Metric(
                "kl_update",
                "nats",
                "trained tokens of the last update",
                "r - 1 - log r, r = pi / pi_sampler: the k3 estimate of the KL divergence from the sampling policy.",
            ),
            Metric("teacher_kl/<loss>", "nats", COUNTED, "Divergence from the teacher, over the whole vocabulary."),
        ),
        "Divergence from the reference policy, from the sampling policy and from a teacher.",
    ),
    Panel(
        "Entropy",
        (Metric("entropy_per_token", "nats", TOKENS, "Entropy of the sampling distribution."),),
        "Nats per token. If it is near 0, all samples of a prompt are nearly the same.",
    ),
    Panel(
        "Length",
        (
            Metric(
                "completion_tokens",
                "tokens",
                ROWS,
                "Tokens generated by the policy, including the end-of-sequence token.",
            ),
        ),
        "Length of a completion.",
    ),
    Panel(
        "Truncated completions",
        (Metric("truncated_share", "share", ROWS, "Completions that were ended by a limit on tokens or turns."),),
        "Share of completions that reached the limit on tokens or turns.",
    ),
    Panel(
        "Groups without signal",
        (
            Metric("constant_group_share", "share", GROUPS, "Groups whose rewards are all equal."),
            Metric("kept_share", "share", ROWS, "Rows with a weight above 0 after credit."),
        ),
        "A group whose rewards are all equal gives no gradient with group-relative advantages.",
    ),
    Panel(
        "Degenerate completions",
        (
            Metric(
                "duplicate_share", "share", ROWS, "Completions that are equal to an earlier one of the same prompt."
            ),
            Metric("empty_share", "share", ROWS, "Completions that consist of the end-of-sequence token alone."),
            Metric(
                "repeated_ngram_share", "share", ROWS, "4-grams of tokens that occur earlier in the same completion."
            ),
            Metric(
                "foreign_script_share",
                "share",
                ROWS,
                "Completions with letters of a script that is not in their prompt; Latin and Greek are not counted.",
            ),
        ),
        "Typical outputs of a policy that exploits its reward.",
    ),
)
