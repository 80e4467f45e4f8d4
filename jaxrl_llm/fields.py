"""THE table of names: what each array of a step means, its shape, what provides it, and how functions ask for it.

Names of what networks say follow rules and need no row of their own (`network_names`). Nor do these:

    <view>_text                    in a reading: what a network wrote as the completion of a view
    metric/<name>                  filled by credit, a number to be logged
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

from jaxrl_llm.experience import Experience
from jaxrl_llm.network_names import HEADS, compared_with, score_named
from jaxrl_llm.shipped import nearest

# scalar []; row [B]; token [B T]; either: one of both, a row's is spread over its tokens; vector [B ...]; prompt [B P].
Kind = Literal["scalar", "row", "token", "either", "vector", "prompt"]


class Field(NamedTuple):
    """One row of the table.

    Attributes:
      name: of the array.
      kind: its shape.
      provider: what provides it, a key of `PROVIDERS`.
      meaning: one line.
      absent: what it holds in rows that do not know it.
      fillable: an entry of credit may fill it.
      need: what a method that names it needs beyond samples, rewards and the policy's log-probabilities; "" is nothing.
    """

    name: str
    kind: Kind
    provider: str
    meaning: str
    absent: float = 0.0
    fillable: bool = False
    need: str = ""


# What credit fills under such a name is logged: one number, or the mean of a row's over rows that count and know it.
METRIC = "metric/"
# Who provides names, and what a user has to do where nothing does.
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
    "learner": "losses alone can name it: it is of the network that learns",
    "vocabulary": "an entry of credit may name it, with tokens alone",
    "step": "every step provides it",
    "metrics": "coefficients and schedules alone can name it",
    "text": "readings and rewards may name it: they run on the host",
}

_ROWS: Any = (
    # facts of sampling
    ("prompt_tokens", "prompt", "rollout", "prompt tokens, left-padded"),
    ("prompt_length", "row", "rollout", "real tokens of the prompt"),
    ("prompt_id", "row", "rollout", "stable id of the prompt in its data set"),
    ("answer_tokens", "vector", "rollout", "reference answer, right-padded"),
    ("answer_length", "row", "rollout", "real tokens of the reference answer"),
    ("sample", "row", "rollout", "number of the sample within its group"),
    ("group", "row", "rollout", "id of the group: the samples of one prompt"),
    ("weight", "row", "rollout", "1 for a row that counts, 0 for an absent one", 0.0, True),
    ("tokens", "token", "rollout", "completion tokens, right-padded"),
    ("length", "row", "rollout", "completion tokens, end of sequence included"),
    ("source", "token", "rollout", "where each token came from (experience.Source)"),
    ("mask", "token", "rollout", "1 on tokens that are trained on; in a loss, times the weight of the row", 0.0, True),
    ("behaviour_logprobs", "token", "rollout", "log-probabilities that the tokens were drawn with"),
    ("behaviour_entropy", "token", "rollout", "entropy of the distribution that each token was drawn from, in nats"),
    ("truncated", "row", "rollout", "the completion reached its length limit"),
    ("router_choices", "vector", "rollout", "experts that served each token; in a loss, of the policy that learns"),
    ("support", "vector", "rollout", "tokens that each token was drawn from, where sampling is truncated"),
    # rewards
    ("reward_components", "vector", "rewards", "one column a reward function, before weights; NaN does not apply"),
    ("rewards", "row", "rewards", "the weighted sum that is maximised", 0.0, True),
    ("correct", "row", "rewards", "1 where the first reward, the verifier, returned at least 1", 0.0, True),
    # credit
    ("advantages", "either", "credit", "how much better than expected", 0.0, True),
    ("global_advantages", "either", "credit", "advantages over the batch, beside those within groups", 0.0, True),
    ("returns", "either", "credit", "what a value model learns to expect", 0.0, True),
    ("token_rewards", "token", "credit", "rewards given to single tokens", 0.0, True),
    ("token_weight", "either", "credit", "factor of each token's loss", 0.0, True),
    ("turn", "token", "environment", "index of the turn that a token belongs to", 0.0, True),
    ("answer_id", "row", "credit", "equal where answers are equal, -1 for none", -1.0, True),
    ("budget", "row", "credit", "tokens that a row is allowed", 0.0, True),
    ("answer_weight", "row", "credit", "factor of the loss on the reference answer of a row", 0.0, True),
    ("longest_path", "row", "credit", "tokens of the longest path through a text with threads", 0.0, True),
    ("well_formed", "row", "credit", "1 where an answer can be read", 0.0, True),
    ("confidence", "row", "credit", "stated probability of the answer; NaN for none", float("nan"), True),
    (
        "verdict",
        "row",
        "credit",
        "of a critique: 1 for right, 0 for wrong; NaN for neither",
        float("nan"),
        True,
    ),
    ("perplexity", "row", "credit", "of the reference answer after the thought; infinite for none", 0.0, True),
    ("proxy_logprobs", "token", "credit", "log-probabilities under another distribution", 0.0, True),
    ("tempered_logprobs", "token", "credit", "log-probabilities at another temperature", 0.0, True),
    ("preferences", "vector", "credit", "wins over the other samples of the group", 0.0, True),
    ("entropy_history", "token", "credit", "mean entropy of earlier updates at the token's turn; 0 is none", 0.0, True),
    ("position_entropy", "row", "credit", "entropy of what follows the prompt in the data", float("nan"), True),
    ("kl_coefficients", "row", "credit", "units of reward that a nat of divergence costs a row", 0.0, True),
    ("kl_anchor", "row", "credit", "how far the policy has moved on average, in nats", 0.0, True),
    # data
    ("demonstration_tokens", "token", "data", "reference completion, right-padded"),
    ("demonstration_length", "row", "data", "real tokens of the reference completion"),
    ("paraphrase_tokens", "prompt", "data", "the problem in other words, left-padded"),
    ("paraphrase_length", "row", "data", "real tokens of that"),
    ("privileged_tokens", "prompt", "data", "the prompt with what sampling alone is told, left-padded"),
    ("privileged_length", "row", "data", "real tokens of that"),
    ("scaffold_tokens", "prompt", "data", "the prompt with the criteria of its rubric, left-padded"),
    ("scaffold_length", "row", "data", "real tokens of that"),
    ("source_id", "row", "data", "number of the source of a mixture that the prompt is of, -1 for none", -1.0),
    # conversations
    ("turn_rewards", "vector", "environment", "reward of each turn", 0.0, True),
    ("durations", "vector", "environment", "time that each turn took, as the environment says", 0.0, True),
    ("turns", "row", "environment", "turns that were taken"),
    ("stop", "row", "environment", "why the episode ended (rollout.StopReason)"),
    ("solved", "row", "environment", "1 where the environment says so"),
    # engines, plans, written rows
    ("staleness", "row", "engine", "steps between the policy that sampled a row and the one that learns from it"),
    ("baseline_rewards", "row", "greedy_baseline", "reward of the prompt's greedy completion"),
    ("branch", "row", "further", "1 for rows that were drawn after others of their group, in a second round"),
    ("trajectory", "row", "further", "row of the whole text that a row belongs to"),
    ("thread_weight", "row", "further", "1 for rows of threads that are there"),
    ("paired_group", "row", "paraphrased", "group of the same problem in other words, -1 for none", -1.0),
    ("extra", "row", "mixed_temperature", "whether the row was drawn at the other temperature"),
    ("successes", "vector", "continued_steps", "right continuations from behind each step"),
    ("continuations", "vector", "continued_steps", "continuations from behind each step"),
    ("label", "row", "adaptive", "1 where the reward is above the threshold"),
    ("pool_mean", "row", "adaptive", "mean label of all samples of the prompt"),
    ("pool_count", "row", "adaptive", "samples of the prompt"),
    ("written_mask", "token", "written", "1 on tokens that were written and are learned from; in a loss, times weight"),
    ("stored_logprobs", "token", "written", "log-probabilities of the policy that wrote a stored answer"),
    ("validation", "row", "held out", "1 on rows that are only measured on"),
    ("top_tokens", "token", "written", "likeliest tokens of a stored distribution, in each place; -1 for fewer"),
    ("top_logprobs", "token", "written", "their log-probabilities"),
    ("preferred", "row", "written", "1 for a pair's better row, 0 for the other; a label of a single row", -1.0, True),
    ("rating", "row", "written", "number that somebody gave the row", float("nan")),
    ("margin", "row", "written", "how much better the preferred row of a pair is said to be", 0.0, True),
    ("rank", "row", "written", "place of the row in its group, 0 is best", -1.0),
    ("step_labels", "token", "written", "label of each step, on its last token; NaN elsewhere", float("nan"), True),
    # what networks say, beside the rules
    ("hidden", "vector", "network", "the policy's hidden state that predicts each token, as the step found it"),
    ("prompt_logprobs", "prompt", "network", "log-probability of each prompt token after the first"),
    ("prompt_mask", "prompt", "network", "1 on prompt tokens after the first"),
    ("token_reward_logits", "token", "head", "the token reward model's number for each token"),
    ("log_probabilities", "vector", "vocabulary", "the policy's log-softmax over the vocabulary, a chunk at a time"),
    # while learning
    ("logprobs", "token", "learner", "log-probabilities under the policy that learns"),
    ("entropy", "token", "learner", "entropy of the policy that learns, in nats"),
    ("over_vocabulary", "token", "learner", "a functional of two whole distributions, which the loss carries"),
    ("router_probabilities", "vector", "learner", "what the routers give each expert, of the policy that learns"),
    # scalars
    ("step", "scalar", "step", "updates of a batch made so far"),
    ("reward", "scalar", "metrics", "mean reward"),
    ("correct_share", "scalar", "metrics", "share of rows that the verifier finds right"),
    ("constant_group_share", "scalar", "metrics", "share of groups whose rewards are all equal"),
    ("completion_tokens", "scalar", "metrics", "mean length, without what environments and tools answer"),
    ("truncated_share", "scalar", "metrics", "share of rows that reached the length limit"),
    ("entropy_per_token", "scalar", "metrics", "mean entropy of sampling"),
    ("kl_reference_per_token", "scalar", "metrics", "mean log-ratio of sampling to reference"),
    ("alignment", "scalar", "metrics", "whether the losses on written rows would lower a held-out loss faster"),
    # text, on the host: a list with one entry per row; in the singular, the entry of one row
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
    """What a method that names it needs beyond samples, rewards and the policy's log-probabilities; "" for nothing."""
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
    """All that `need_of` can say, once each."""
    return tuple(dict.fromkeys(["reference", *_NEEDS.values(), *_NETWORK_NEEDS.values()]))


def provided_by(*providers: str) -> frozenset[str]:
    """Names of the table that these provide."""
    return frozenset(name for name, field in FIELDS.items() if field.provider in providers)


TEXT = provided_by("text")


def is_written_text(name: str) -> bool:
    """Whether a name is that of texts which a network writes (`<view>_text`)."""
    return name.endswith("_text")


def kind_of(name: str) -> Kind:
    """The shape of a name; an entry of credit may fill any other name with one entry per row."""
    if name in FIELDS:
        return FIELDS[name].kind
    for end, kind in _ENDINGS.items():
        if name.endswith(end):
            return kind
    return "vector"


_ENDINGS: Mapping[str, Kind] = {"_logprobs": "token", "_entropy": "token", "_scores": "row"}


def absent_value(name: str) -> float:
    """What a name holds in rows that do not know it."""
    return FIELDS[name].absent if name in FIELDS else 0.0


# ---- messages -------------------------------------------------------------------------------------------------------


_EXAMPLES = {
    "advantages": "advantages: group_normalized",
    "turn": "turn: separated_turns",
    "turn_rewards": "turn_rewards: reference_progress",
}


def remedy(name: str, available: Collection[str]) -> str:
    """Who would provide a name that nothing provides, or which name may have been meant."""
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
    """Raises ValueError unless a value that fills a name has the shape that the table gives it."""
    count, width = rows.tokens.shape
    kind = kind_of(name) if name in FIELDS else "vector"
    if kind == "vector":
        if value.ndim == 0 or value.shape[0] != count:
            raise ValueError(
                f"{name} {by!r} returned shape {value.shape} for {count} completions; its first axis must have one "
                f"entry a completion, {count}"
            )
        return
    shapes = {"row": [(count,)], "token": [(count, width)], "either": [(count,), (count, width)]}[kind]
    if value.shape not in shapes:
        raise ValueError(
            f"{name} {by!r} returned shape {value.shape} for {count} completions of {width} tokens; it must return "
            f"shape {' or '.join(map(str, shapes))}"
        )
