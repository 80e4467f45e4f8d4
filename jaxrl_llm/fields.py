"""The table of names: meaning, shape and provider of each array of a step.

Names of network outputs follow rules (`network_names`) and have no entry in the table, nor have these:

    <view>_text                    in a reading: text that a network generated as the completion of a view
    metric/<name>                  filled by credit, a number to log
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

from jaxrl_llm.experience import Experience
from jaxrl_llm.network_names import HEADS, compared_with, score_named
from jaxrl_llm.shipped import nearest

# scalar []; row [B]; token [B T]; either: [B], broadcast over the tokens, or [B T]; vector [B ...]; prompt [B P].
Kind = Literal["scalar", "row", "token", "either", "vector", "prompt"]


class Field(NamedTuple):
    """One entry of the table.

    Attributes:
      name: of the array.
      kind: its shape.
      provider: a key of `PROVIDERS`.
      meaning: one line of text.
      absent: value in rows without the field.
      fillable: whether an entry of credit may fill it.
      need: requirement of a method that reads it, beyond samples, rewards and log-probabilities of the policy; "" for
        none.
    """

    name: str
    kind: Kind
    provider: str
    meaning: str
    absent: float = 0.0
    fillable: bool = False
    need: str = ""


# Values that credit fills under such a name are logged: a scalar, or the weighted mean of one value per row.
METRIC = "metric/"
# Providers of names, with the remedy for a missing name.
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
    "greedy_baseline": "the plan greedy_baseline provides it",
    "paraphrased": "the plan paraphrased provides it",
    "further": "a plan of several rounds provides it (resume, helped, demonstration_prefix, parallel_threads)",
    "mixed_temperature": "groups at another temperature provide it (rollout.plan: mixed_temperature)",
    "adaptive": "the plan adaptive provides it",
    "continued_steps": "the plan continued_steps provides it",
    "network": "a network provides it",
    "head": "a critic provides it: a network with a head, which networks may configure",
    "learner": "losses alone can name it: it belongs to the network in training",
    "vocabulary": "an entry of credit may name it, in functions of tokens alone",
    "step": "every step provides it",
    "metrics": "coefficients and schedules alone can name it",
    "text": "readings and rewards may name it: they run on the host",
}

_ROWS: Any = (
    # sampling
    ("prompt_tokens", "prompt", "rollout", "prompt tokens, left-padded"),
    ("prompt_length", "row", "rollout", "tokens of the prompt without padding"),
    ("prompt_id", "row", "rollout", "stable id of the prompt in its data set"),
    ("answer_tokens", "vector", "rollout", "reference answer, right-padded"),
    ("answer_length", "row", "rollout", "tokens of the reference answer without padding"),
    ("sample", "row", "rollout", "number of the sample within its group"),
    ("group", "row", "rollout", "id of the group: the samples of one prompt"),
    ("weight", "row", "rollout", "1 for a row that counts, 0 for an absent one", 0.0, True),
    ("tokens", "token", "rollout", "completion tokens, right-padded"),
    ("length", "row", "rollout", "completion tokens, end of sequence included"),
    ("source", "token", "rollout", "origin of each token (experience.Source)"),
    ("mask", "token", "rollout", "1 on tokens to train on; in a loss, times the weight of the row", 0.0, True),
    ("behaviour_logprobs", "token", "rollout", "log-probabilities of the tokens in sampling"),
    ("behaviour_entropy", "token", "rollout", "entropy of the sampling distribution at each token, in nats"),
    ("truncated", "row", "rollout", "the completion reached its length limit"),
    ("router_choices", "vector", "rollout", "experts of each token; in a loss, those of the policy in training"),
    ("support", "vector", "rollout", "candidate tokens of each position, if sampling is truncated"),
    # rewards
    ("reward_components", "vector", "rewards", "one column per reward function, unweighted; NaN for no reward"),
    ("rewards", "row", "rewards", "the weighted sum of the reward functions, which is maximised", 0.0, True),
    ("correct", "row", "rewards", "1 where the first reward function, the verifier, returned at least 1", 0.0, True),
    # credit
    ("advantages", "either", "credit", "estimated advantage: return minus a baseline", 0.0, True),
    ("global_advantages", "either", "credit", "advantages over the batch, beside those within groups", 0.0, True),
    ("returns", "either", "credit", "regression targets of a value model", 0.0, True),
    ("token_rewards", "token", "credit", "rewards of single tokens", 0.0, True),
    ("token_weight", "either", "credit", "factor of each token's loss", 0.0, True),
    ("turn", "token", "environment", "index of the turn that a token belongs to", 0.0, True),
    ("answer_id", "row", "credit", "equal where answers are equal, -1 for none", -1.0, True),
    ("budget", "row", "credit", "token budget of each row", 0.0, True),
    ("answer_weight", "row", "credit", "factor of the loss on the row's reference answer", 0.0, True),
    ("longest_path", "row", "credit", "tokens of the longest path through a text with threads", 0.0, True),
    ("well_formed", "row", "credit", "1 where an answer can be parsed", 0.0, True),
    ("confidence", "row", "credit", "stated probability of the answer; NaN for none", float("nan"), True),
    (
        "verdict",
        "row",
        "credit",
        "of a critique: 1 for right, 0 for wrong; NaN for neither",
        float("nan"),
        True,
    ),
    ("perplexity", "row", "credit", "of the reference answer after the reasoning; infinite for none", 0.0, True),
    ("proxy_logprobs", "token", "credit", "log-probabilities under another distribution", 0.0, True),
    ("tempered_logprobs", "token", "credit", "log-probabilities at another temperature", 0.0, True),
    ("preferences", "vector", "credit", "wins over the other samples of the group", 0.0, True),
    ("entropy_history", "token", "credit", "mean entropy of the token's turn in earlier updates, or 0", 0.0, True),
    ("position_entropy", "row", "credit", "entropy of the text after the prompt in the data", float("nan"), True),
    ("kl_coefficients", "row", "credit", "price of the divergence per row, in reward per nat", 0.0, True),
    ("kl_anchor", "row", "credit", "KTO's estimate of the KL to the reference, in nats", 0.0, True),
    # data
    ("demonstration_tokens", "token", "data", "reference completion, right-padded"),
    ("demonstration_length", "row", "data", "tokens of the reference completion without padding"),
    ("paraphrase_tokens", "prompt", "data", "a paraphrase of the problem, left-padded"),
    ("paraphrase_length", "row", "data", "tokens of the paraphrase"),
    ("privileged_tokens", "prompt", "data", "the prompt with information for sampling only, left-padded"),
    ("privileged_length", "row", "data", "tokens of the privileged prompt"),
    ("scaffold_tokens", "prompt", "data", "the prompt with the criteria of its rubric, left-padded"),
    ("scaffold_length", "row", "data", "tokens of the scaffold"),
    ("source_id", "row", "data", "index of the prompt's source in a mixture, -1 for none", -1.0),
    # conversations
    ("turn_rewards", "vector", "environment", "reward of each turn", 0.0, True),
    ("durations", "vector", "environment", "duration of each turn, as reported by the environment", 0.0, True),
    ("turns", "row", "environment", "turns that were taken"),
    ("stop", "row", "environment", "why the episode ended (rollout.StopReason)"),
    ("solved", "row", "environment", "1 where the environment reports success"),
    # engines, plans, written rows
    ("staleness", "row", "engine", "steps between the policy that sampled a row and the policy in training"),
    ("baseline_rewards", "row", "greedy_baseline", "reward of the prompt's greedy completion"),
    ("branch", "row", "further", "1 for rows that were sampled in a second round of their group"),
    ("trajectory", "row", "further", "index of the row with the whole text of the trajectory"),
    ("thread_weight", "row", "further", "1 for rows of existing threads"),
    ("paired_group", "row", "paraphrased", "group of the paraphrased problem, -1 for none", -1.0),
    ("extra", "row", "mixed_temperature", "whether the row was sampled at the other temperature"),
    ("successes", "vector", "continued_steps", "right continuations after each step"),
    ("continuations", "vector", "continued_steps", "continuations after each step"),
    ("label", "row", "adaptive", "1 where the reward is above the threshold"),
    ("pool_mean", "row", "adaptive", "mean label of all samples of the prompt"),
    ("pool_count", "row", "adaptive", "samples of the prompt"),
    ("written_mask", "token", "written", "1 on written tokens to train on; in a loss, times weight"),
    ("stored_logprobs", "token", "written", "log-probabilities of the policy that wrote a stored answer"),
    ("validation", "row", "held out", "1 on rows of the validation loss, which are not trained on"),
    ("top_tokens", "token", "written", "most probable tokens of a stored distribution, padded with -1"),
    ("top_logprobs", "token", "written", "their log-probabilities"),
    ("preferred", "row", "written", "1 for the better row of a pair, 0 for the other, or a single label", -1.0, True),
    ("rating", "row", "written", "rating of the row in the data", float("nan")),
    ("margin", "row", "written", "margin of the preferred row of a pair, by its labels", 0.0, True),
    ("rank", "row", "written", "rank of the row in its group, 0 is best", -1.0),
    ("step_labels", "token", "written", "label of each step, on its last token; NaN elsewhere", float("nan"), True),
    # outputs of networks that follow no rule
    ("hidden", "vector", "network", "hidden state of the policy that predicts each token, before the update"),
    ("prompt_logprobs", "prompt", "network", "log-probability of each prompt token after the first"),
    ("prompt_mask", "prompt", "network", "1 on prompt tokens after the first"),
    ("token_reward_logits", "token", "head", "logit of the token reward model for each token"),
    ("log_probabilities", "vector", "vocabulary", "log-softmax of the policy over the vocabulary, in chunks"),
    # in training
    ("logprobs", "token", "learner", "log-probabilities under the policy in training"),
    ("entropy", "token", "learner", "entropy of the policy in training, in nats"),
    ("over_vocabulary", "token", "learner", "a functional of two distributions over the vocabulary, given by the loss"),
    ("router_probabilities", "vector", "learner", "router probabilities of each expert, of the policy in training"),
    # scalars
    ("step", "scalar", "step", "batches trained on so far"),
    ("reward", "scalar", "metrics", "mean reward"),
    ("correct_share", "scalar", "metrics", "share of rows that the verifier accepts"),
    ("constant_group_share", "scalar", "metrics", "share of groups whose rewards are all equal"),
    ("completion_tokens", "scalar", "metrics", "mean length, without tokens of environments and tools"),
    ("truncated_share", "scalar", "metrics", "share of rows that reached the length limit"),
    ("entropy_per_token", "scalar", "metrics", "mean entropy of the sampling distribution, in nats"),
    ("kl_reference_per_token", "scalar", "metrics", "mean log-ratio of the sampling policy to the reference, in nats"),
    ("alignment", "scalar", "metrics", "first-order decrease of a held-out loss per unit of the supervised share"),
    # text on the host: a list with one entry per row, or in the singular the entry of one row
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
    **dict.fromkeys(("preferred", "rating", "margin", "rank", "step_labels"), "judged rows"),
}
FIELDS: dict[str, Field] = {row[0]: Field(*row)._replace(need=_NEEDS.get(row[0], "")) for row in _ROWS}
# Columns of the data whose texts are further prompts of the same problem: `<column>_tokens` and `<column>_length`.
PROMPT_COLUMNS = tuple(
    f.name.removesuffix("_tokens") for f in FIELDS.values() if f.kind == "prompt" and f.provider == "data"
)
_NETWORK_NEEDS = {"value": "value model", "twin": "twin values", "twin_target": "twin values"}


def need_of(name: str) -> str:
    """Requirement of methods that read the name, beyond samples, rewards and log-probabilities of the policy, or ""."""
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
    """All values of `need_of`, without ""."""
    return tuple(dict.fromkeys(["reference", *_NEEDS.values(), *_NETWORK_NEEDS.values()]))


def provided_by(*providers: str) -> frozenset[str]:
    """Names of the table with one of these providers."""
    return frozenset(name for name, field in FIELDS.items() if field.provider in providers)


TEXT = provided_by("text")


def is_written_text(name: str) -> bool:
    """Whether a name is that of texts generated by a network (`<view>_text`)."""
    return name.endswith("_text")


def kind_of(name: str) -> Kind:
    """The kind of a name; other names, which an entry of credit may fill, are vectors."""
    if name in FIELDS:
        return FIELDS[name].kind
    for end, kind in _ENDINGS.items():
        if name.endswith(end):
            return kind
    return "vector"


_ENDINGS: Mapping[str, Kind] = {"_logprobs": "token", "_entropy": "token", "_scores": "row"}


def absent_value(name: str) -> float:
    """Value of a name in rows without it."""
    return FIELDS[name].absent if name in FIELDS else 0.0


# ---- messages -------------------------------------------------------------------------------------------------------


_EXAMPLES = {
    "advantages": "advantages: group_normalized",
    "turn": "turn: separated_turns",
    "turn_rewards": "turn_rewards: reference_progress",
}


def remedy(name: str, available: Collection[str]) -> str:
    """Remedy for a missing name: its provider, or the most similar available name."""
    field = FIELDS.get(name)
    if field is None and (found := score_named(name, [*HEADS, *(f"{head}_target" for head in HEADS)])):
        return f"{PROVIDERS['head']}: {found.network}"
    if field is None or field.provider in ("rollout", "step"):
        return nearest(name, available)
    text = PROVIDERS[field.provider]
    if field.fillable and field.provider in ("credit", "environment"):
        text += f", for example {_EXAMPLES.get(name, name + ': a function of yours')}"
    if field.provider in ("learner", "metrics", "text", "vocabulary"):
        text += f"; {nearest(name, available)}"
    return text


@cache
def fillable() -> frozenset[str]:
    """Names of the table that an entry of credit may fill."""
    return frozenset(name for name, field in FIELDS.items() if field.fillable)


FACTS_READ_ONLY = frozenset(name for name, field in FIELDS.items() if not field.fillable)


def check_shape(value: Any, name: str, by: str, rows: Experience) -> None:
    """Raises ValueError unless a value that fills a name has the shape of its kind."""
    count, width = rows.tokens.shape
    kind = kind_of(name) if name in FIELDS else "vector"
    if kind == "vector":
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
