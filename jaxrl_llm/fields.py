"""The table of fields: meaning, shape and provider of each named array of a step.

Outputs of networks are named by rules (`network_names`) and have no entry here. Two other kinds of names have none:

    <view>_text                    the completion of a view that a network has generated, for readings
    metric/<name>                  a value that credit returns and that is logged as a metric
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

from jaxrl_llm.experience import Experience
from jaxrl_llm.network_names import HEADS, compared_with, score_named
from jaxrl_llm.shipped import nearest

# Shapes: scalar []; reward [K], one value per reward function; row [B]; token [B T]; either: [B] or [B T], where the
# value of a row is broadcast over its tokens; vector [B ...]; prompt [B P]; batch [B ...]: as vector, but a loss on a
# microbatch gets the entries of all rows of the batch.
Kind = Literal["scalar", "reward", "row", "token", "either", "vector", "prompt", "batch"]


class Field(NamedTuple):
    """One entry of the table.

    Attributes:
      name: name of the array.
      kind: its shape.
      provider: what computes it, a key of `PROVIDERS`.
      meaning: a short description.
      absent: value in rows for which it is unknown.
      fillable: whether an entry of credit may compute it.
      need: what a method with this parameter needs beyond samples, rewards and the policy's log-probabilities; "":
          nothing.
    """

    name: str
    kind: Kind
    provider: str
    meaning: str
    absent: float = 0.0
    fillable: bool = False
    need: str = ""


# Fields with this prefix are logged: a scalar, or the mean over rows with a positive weight and a value.
METRIC = "metric/"
# Providers, each with the text for error messages about a name that nothing provides.
PROVIDERS = {
    "rollout": "a source of rows provides it",
    "rewards": "a function in rewards provides it, for credit and losses",
    "credit": "add an entry to credit that fills it",
    "data": "the data provides it",
    "environment": "a task that is answered in turns provides it (grid, calculator, bargaining, self_correction), or "
    "an entry of credit that fills it",
    "engine": "an external engine provides it (rollout.engine)",
    "written": "written rows provide it (source: demonstrations, solved_answers or a file)",
    "held out": "written rows of the validation split provide it (source: {demonstrations: {validation: true}})",
    "greedy_baseline": "the plan greedy_baseline provides it (rollout.plan: greedy_baseline)",
    "paraphrased": "the plan paraphrased provides it (rollout.plan: paraphrased)",
    "further": "a plan of several rounds provides it (resume, helped, demonstration_prefix, parallel_threads)",
    "mixed_temperature": "the plan mixed_temperature provides it (rollout.plan: mixed_temperature)",
    "adaptive": "the plan adaptive provides it (rollout.plan: adaptive)",
    "continued_steps": "the plan continued_steps provides it (rollout.plan: continued_steps)",
    "network": "a network provides it",
    "head": "a critic provides it: a network with a head, configured in section networks",
    "learner": "only losses can read it: it is an output of the network in training",
    "vocabulary": "an entry of credit may read it, together with tokens only",
    "gradients": "only credit can read it, in steps with rewards and a loss on the policy",
    "step": "every step provides it",
    "metrics": "only coefficients and schedules can read it",
    "text": "only readings and rewards can read it: they run on the host",
}

_ROWS: Any = (
    # arrays of sampling
    ("prompt_tokens", "prompt", "rollout", "prompt tokens, left-padded"),
    ("prompt_length", "row", "rollout", "tokens of the prompt without padding"),
    ("prompt_id", "row", "rollout", "stable id of the prompt in its data set"),
    ("answer_tokens", "vector", "rollout", "reference answer, right-padded"),
    ("answer_length", "row", "rollout", "tokens of the reference answer without padding"),
    ("sample", "row", "rollout", "number of the sample within its group"),
    ("group", "row", "rollout", "id of the group: the samples of one prompt"),
    ("weight", "row", "rollout", "weight of the row; 0 for an absent row", 0.0, True),
    ("tokens", "token", "rollout", "completion tokens, right-padded"),
    ("length", "row", "rollout", "number of completion tokens, including end of sequence"),
    ("source", "token", "rollout", "origin of each token (experience.Source)"),
    ("mask", "token", "rollout", "1 on trained tokens; in a loss, times the weight of the row", 0.0, True),
    ("behaviour_logprobs", "token", "rollout", "log-probabilities under the sampling distribution"),
    ("behaviour_entropy", "token", "rollout", "entropy of the sampling distribution at each token, in nats"),
    ("truncated", "row", "rollout", "1 if the completion reached its length limit"),
    ("router_choices", "vector", "rollout", "experts of each token; in a loss, those of the policy in training"),
    ("support", "vector", "rollout", "with truncated sampling, the candidate tokens of each sampled token"),
    # rewards
    ("reward_components", "vector", "rewards", "one column per reward function, unweighted; NaN: does not apply"),
    ("rewards", "row", "rewards", "the weighted sum of all rewards, which training maximises", 0.0, True),
    ("correct", "row", "rewards", "1 if the first reward, the verifier, returned at least 1", 0.0, True),
    # credit
    ("advantages", "either", "credit", "advantages: how much better the actions were than expected", 0.0, True),
    (
        "global_advantages",
        "either",
        "credit",
        "advantages over the whole batch, in addition to those within groups",
        0.0,
        True,
    ),
    ("returns", "either", "credit", "targets of the value model", 0.0, True),
    ("token_rewards", "token", "credit", "rewards of single tokens", 0.0, True),
    ("token_weight", "either", "credit", "factor of each token's loss", 0.0, True),
    ("turn", "token", "environment", "index of the turn that a token belongs to", 0.0, True),
    ("answer_id", "row", "credit", "id of the answer, the same for equal answers; -1 for no answer", -1.0, True),
    ("budget", "row", "credit", "token budget of the row", 0.0, True),
    ("answer_weight", "row", "credit", "factor of the loss on the reference answer of a row", 0.0, True),
    ("longest_path", "row", "credit", "tokens on the longest path through a text with parallel threads", 0.0, True),
    ("well_formed", "row", "credit", "1 if an answer can be parsed", 0.0, True),
    ("confidence", "row", "credit", "stated probability of the answer; NaN for none", float("nan"), True),
    (
        "verdict",
        "row",
        "credit",
        "verdict of a critique: 1 for right, 0 for wrong; NaN for neither",
        float("nan"),
        True,
    ),
    (
        "perplexity",
        "row",
        "credit",
        "perplexity of the reference answer after the thought; infinite without a thought",
        0.0,
        True,
    ),
    ("proxy_logprobs", "token", "credit", "log-probabilities under another distribution", 0.0, True),
    ("tempered_logprobs", "token", "credit", "log-probabilities at another temperature", 0.0, True),
    ("preferences", "vector", "credit", "probability of beating each sample of the group", 0.0, True),
    ("entropy_history", "token", "credit", "mean entropy of earlier updates at the token's turn, or 0", 0.0, True),
    ("position_entropy", "row", "credit", "entropy of the tokens after the prompt in the data", float("nan"), True),
    ("kl_coefficients", "row", "credit", "cost of a nat of divergence per row, in units of reward", 0.0, True),
    ("candidates", "batch", "credit", "an embedding of each row, for contrastive losses", 0.0, True),
    ("kl_anchor", "row", "credit", "the estimate of the KL to the reference in KTO, in nats", 0.0, True),
    # data
    ("demonstration_tokens", "token", "data", "reference completion, right-padded"),
    ("demonstration_length", "row", "data", "tokens of the reference completion without padding"),
    ("paraphrase_tokens", "prompt", "data", "a paraphrase of the prompt, left-padded"),
    ("paraphrase_length", "row", "data", "tokens of the paraphrase without padding"),
    ("privileged_tokens", "prompt", "data", "the prompt with additional information for sampling only, left-padded"),
    ("privileged_length", "row", "data", "tokens of the privileged prompt without padding"),
    ("scaffold_tokens", "prompt", "data", "the prompt with the criteria of its rubric, left-padded"),
    ("scaffold_length", "row", "data", "tokens of the scaffold prompt without padding"),
    ("source_id", "row", "data", "index of the prompt's source in a mixture, -1 for none", -1.0),
    # conversations
    ("turn_rewards", "vector", "environment", "reward of each turn", 0.0, True),
    ("durations", "vector", "environment", "duration of each turn, as reported by the environment", 0.0, True),
    ("turns", "row", "environment", "number of turns taken"),
    ("stop", "row", "environment", "reason for the end of the episode (rollout.StopReason)"),
    ("solved", "row", "environment", "1 if the environment reports success"),
    # engines, plans, written rows
    ("staleness", "row", "engine", "steps between the policy that sampled a row and the policy in training"),
    ("baseline_rewards", "row", "greedy_baseline", "reward of the prompt's greedy completion"),
    ("branch", "row", "further", "1 for rows sampled in the second round of a plan"),
    ("trajectory", "row", "further", "index of the row with the whole text that this row is part of"),
    ("thread_weight", "row", "further", "1 for rows of threads that exist, 0 for all other rows"),
    ("paired_group", "row", "paraphrased", "group of the paraphrase of the same problem, -1 for none", -1.0),
    ("extra", "row", "mixed_temperature", "1 if the row was sampled at the second temperature"),
    ("successes", "vector", "continued_steps", "number of right continuations after each step"),
    ("continuations", "vector", "continued_steps", "number of continuations after each step"),
    ("label", "row", "adaptive", "1 where the reward is above the threshold"),
    ("pool_mean", "row", "adaptive", "mean label of all samples of the prompt"),
    ("pool_count", "row", "adaptive", "number of samples of the prompt"),
    ("written_mask", "token", "written", "1 on trained tokens of written rows; in a loss, times the row's weight"),
    ("stored_logprobs", "token", "written", "log-probabilities of the policy that generated a stored answer"),
    ("validation", "row", "held out", "1 on rows that are only evaluated, not trained on"),
    ("top_tokens", "token", "written", "most likely tokens of a stored distribution at each position, padded with -1"),
    ("top_logprobs", "token", "written", "their log-probabilities"),
    (
        "preferred",
        "row",
        "written",
        "1 for the better row of a pair, 0 for the other; or the label of a single row",
        -1.0,
        True,
    ),
    ("rating", "row", "written", "given rating of the row", float("nan")),
    ("margin", "row", "written", "given margin by which the preferred row of a pair is better", 0.0, True),
    ("rank", "row", "written", "rank of the row in its group, 0 is best", -1.0),
    ("step_labels", "token", "written", "label of each step, on its last token; NaN elsewhere", float("nan"), True),
    # outputs of networks that are not named by the rules
    ("hidden", "vector", "network", "hidden state of the policy at the start of the step that predicts each token"),
    ("prompt_logprobs", "prompt", "network", "log-probability of each prompt token after the first"),
    ("prompt_mask", "prompt", "network", "1 on prompt tokens after the first"),
    ("token_reward_logits", "token", "head", "output of the token reward model for each token"),
    ("log_probabilities", "vector", "vocabulary", "the policy's log-softmax over the vocabulary, in chunks"),
    # gradients before the update
    (
        "reward_influence",
        "reward",
        "gradients",
        "inner product of the policy gradient of each single reward with the sum of those of all rewards",
    ),
    # while learning
    ("logprobs", "token", "learner", "log-probabilities under the policy in training"),
    ("entropy", "token", "learner", "entropy of the policy in training, in nats"),
    (
        "over_vocabulary",
        "token",
        "learner",
        "a functional of two distributions over the vocabulary; the loss defines it",
    ),
    ("router_probabilities", "vector", "learner", "routing probabilities of each expert in the policy in training"),
    # scalars
    ("step", "scalar", "step", "number of completed steps"),
    ("reward", "scalar", "metrics", "mean reward"),
    ("correct_share", "scalar", "metrics", "share of rows accepted by the verifier"),
    ("constant_group_share", "scalar", "metrics", "share of groups whose rewards are all equal"),
    ("completion_tokens", "scalar", "metrics", "mean length, without observations of environments and tools"),
    ("truncated_share", "scalar", "metrics", "share of rows that reached the length limit"),
    ("entropy_per_token", "scalar", "metrics", "mean entropy of the sampling distribution"),
    ("kl_reference_per_token", "scalar", "metrics", "mean log-ratio of the sampling to the reference distribution"),
    (
        "alignment",
        "scalar",
        "metrics",
        "first-order decrease of the validation loss by the losses on written rows, minus that by the other losses",
    ),
    # text on the host: plural names are lists with one entry per row, singular names are the entry of one row
    ("completions", "row", "text", "decoded completions"),
    ("prompts", "row", "text", "problem texts"),
    ("answers", "row", "text", "reference answers"),
    ("items", "row", "text", "whole records of the data"),
    ("completion", "row", "text", "decoded completion of one row"),
    ("prompt", "row", "text", "problem text of one row"),
    ("answer", "row", "text", "reference answer of one row"),
    ("item", "row", "text", "record of one row"),
)
_NEEDS = {
    "behaviour_entropy": "entropy",
    "entropy": "entropy",
    "entropy_per_token": "entropy",
    "kl_reference_per_token": "reference",
    "over_vocabulary": "vocabulary",
    "log_probabilities": "vocabulary",
    "token_reward_logits": "token reward model",
    "reward_scores": "reward model",
    "teacher_logprobs": "teacher",
    "hidden": "hidden states",
    "turn": "turns",
    "turn_rewards": "turns",
    "durations": "durations",
    "proxy_logprobs": "proxy",
    "prompt_logprobs": "prompt scores",
    "prompt_mask": "prompt scores",
    "tempered_logprobs": "tempered scores",
    "extra": "extra samples",
    "baseline_rewards": "greedy sample",
    "preferences": "preferences",
    "answer_id": "answer ids",
    "budget": "budgets",
    "privileged_tokens": "privileged prompts",
    "branch": "branches",
    "stored_logprobs": "stored answers",
    "router_probabilities": "experts",
    **dict.fromkeys(("completions", "prompts", "answers", "items", "completion", "prompt", "answer", "item"), "host"),
    **dict.fromkeys(("demonstration_tokens", "demonstration_length", "source", "written_mask"), "demonstrations"),
    **dict.fromkeys(("paraphrase_tokens", "paraphrase_length", "paired_group"), "paraphrases"),
    **dict.fromkeys(("scaffold_tokens", "scaffold_length"), "scaffolds"),
    **dict.fromkeys(("top_tokens", "top_logprobs"), "stored distributions"),
    **dict.fromkeys(("alignment", "validation_gradient"), "meta-gradient"),
    "reward_influence": "gradients of single rewards",
    **dict.fromkeys(("preferred", "rating", "margin", "rank", "step_labels"), "judged rows"),
}
FIELDS: dict[str, Field] = {row[0]: Field(*row)._replace(need=_NEEDS.get(row[0], "")) for row in _ROWS}
# Columns of the data whose texts are further prompts of the same problem: `<column>_tokens` and `<column>_length`.
PROMPT_COLUMNS = tuple(
    f.name.removesuffix("_tokens") for f in FIELDS.values() if f.kind == "prompt" and f.provider == "data"
)
_NETWORK_NEEDS = {"value": "value model", "twin": "twin values", "twin_target": "twin values"}


def need_of(name: str) -> str:
    """The need of a method with this parameter beyond samples, rewards and the policy's log-probabilities, or ""."""
    if name in FIELDS:
        return FIELDS[name].need
    if compared_with(name):
        return _NEEDS["over_vocabulary"]
    found = score_named(name, ["policy", "reference", *HEADS, *(f"{head}_target" for head in HEADS)])
    if found is None:
        return _NEEDS.get(name, "")
    if found.network == "policy":
        return "entropy" if found.quantity == "entropy" else ""
    return _NETWORK_NEEDS.get(found.network, found.network)


def every_need() -> tuple[str, ...]:
    """All possible results of `need_of`."""
    return tuple(dict.fromkeys(["reference", *_NEEDS.values(), *_NETWORK_NEEDS.values()]))


def provided_by(*providers: str) -> frozenset[str]:
    """Names of the table with these providers."""
    return frozenset(name for name, field in FIELDS.items() if field.provider in providers)


TEXT = provided_by("text")


def is_written_text(name: str) -> bool:
    """Whether a name refers to texts that a network has generated (`<view>_text`)."""
    return name.endswith("_text")


def kind_of(name: str) -> Kind:
    """The kind of a name. For names that are not in the table it follows from their ending, else it is "vector"."""
    if name in FIELDS:
        return FIELDS[name].kind
    for end, kind in _ENDINGS.items():
        if name.endswith(end):
            return kind
    return "vector"


_ENDINGS: Mapping[str, Kind] = {"_logprobs": "token", "_entropy": "token", "_scores": "row"}


def of_batch(rows: Experience) -> dict[str, Any]:
    """The fields of kind "batch", of which each microbatch gets the entries of all rows."""
    return {name: value for name, value in rows.fields.items() if kind_of(name) == "batch"}


def absent_value(name: str) -> float:
    """The value of a field in rows for which it is unknown."""
    return FIELDS[name].absent if name in FIELDS else 0.0


# ---- messages -------------------------------------------------------------------------------------------------------


_EXAMPLES = {
    "advantages": "advantages: group_normalized",
    "turn": "turn: separated_turns",
    "turn_rewards": "turn_rewards: reference_progress",
}


def remedy(name: str, available: Collection[str]) -> str:
    """The end of an error message about a missing name: how it can be provided, or similar names that are available."""
    field = FIELDS.get(name)
    if field is None and (found := score_named(name, [*HEADS, *(f"{head}_target" for head in HEADS)])):
        return f"{PROVIDERS['head']}: {found.network}"
    if field is None or field.provider in ("rollout", "step"):
        columns = " (in a loop of your own, columns of the data are named in Resources(columns=...))"
        return nearest(name, available) + columns * (field is None)
    text = PROVIDERS[field.provider]
    if field.fillable and field.provider in ("credit", "environment"):
        text += f", for example {_EXAMPLES.get(name, name + ': your own function')}"
    if field.provider in ("learner", "metrics", "text", "vocabulary"):
        text += f"; {nearest(name, available)}"
    return text


@cache
def fillable() -> frozenset[str]:
    """Names of the table that an entry of credit may fill."""
    return frozenset(name for name, field in FIELDS.items() if field.fillable)


FACTS_READ_ONLY = frozenset(name for name, field in FIELDS.items() if not field.fillable)


def check_shape(value: Any, name: str, by: str, rows: Experience) -> None:
    """Raise ValueError unless a value has the shape of its field."""
    count, width = rows.tokens.shape
    kind = kind_of(name) if name in FIELDS else "vector"
    if kind in ("vector", "batch"):
        if value.ndim == 0 or value.shape[0] != count:
            raise ValueError(
                f"{name} {by!r} returned shape {value.shape} for {count} completions; its first axis must have one "
                f"entry per completion, {count}"
            )
        return
    shapes = {"row": [(count,)], "token": [(count, width)], "either": [(count,), (count, width)]}[kind]
    if value.shape not in shapes:
        raise ValueError(
            f"{name} {by!r} returned shape {value.shape} for {count} completions of {width} tokens; it must return "
            f"shape {' or '.join(map(str, shapes))}"
        )
