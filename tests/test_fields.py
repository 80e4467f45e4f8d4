"""The table of names: what a step can be asked for is in it or follows the rules, and what is not is told so."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from jaxrl_llm import fields
from jaxrl_llm.experience import FACTS
from jaxrl_llm.fields import (
    FIELDS,
    PROVIDERS,
    Score,
    absent_value,
    check_shape,
    every_need,
    fillable,
    kind_of,
    nearest,
    need_of,
    provided_by,
    remedy,
    score_named,
)
from jaxrl_llm.signatures import signature

NETWORKS = ["policy", "reference", "value", "proxy", "reward", "twin", "twin_target"]
VIEWS = ["answer", "other_answer"]
ROOMS = ("losses", "advantages", "rewards", "schedules", "selection")


def methods():
    """Every public function of the rooms of methods, with what it is called."""
    for room in ROOMS:
        face = import_module(f"jaxrl_llm.{room}")
        for name in face.__all__:
            if inspect.isfunction(getattr(face, name)):
                yield f"{room}.{name}", getattr(face, name)


# ---- the table ------------------------------------------------------------------------------------------------------


def test_each_name_has_a_provider_a_shape_and_a_meaning():
    assert {field.provider for field in FIELDS.values()} == PROVIDERS.keys()
    assert {field.kind for field in FIELDS.values()} == {"scalar", "row", "token", "either", "vector", "prompt"}
    for name, field in FIELDS.items():
        assert field.name == name
        assert field.meaning
        assert not field.meaning.endswith(".")


def test_facts_of_sampling_are_in_it_and_credit_may_change_two_of_them():
    assert set(FACTS) == provided_by("rollout")
    assert provided_by("rollout") & fillable() == {"weight", "mask"}
    assert provided_by("rewards", "credit") >= {"rewards", "advantages"}


def test_every_need_is_that_of_some_name():
    assert {field.need for field in FIELDS.values()} - {""} < set(every_need())
    assert need_of("reference_logprobs") == "reference"
    assert need_of("logprobs") == need_of("old_logprobs") == need_of("rewards") == ""
    assert need_of("old_entropy") == "entropy"
    assert need_of("old_values") == "value model"
    assert need_of("twin_target_values") == "twin values"
    assert need_of("completion") == "host"


def test_kinds_and_absent_values_of_names_that_are_not_in_it():
    assert (kind_of("advantages"), kind_of("confidence")) == ("either", "vector")
    assert (kind_of("proxy_answer_logprobs"), kind_of("teacher_entropy"), kind_of("reward_scores")) == (
        "token",
        "token",
        "row",
    )
    assert absent_value("preferred") == -1
    assert absent_value("answer_id") == -1
    assert absent_value("confidence") == absent_value("rewards") == 0
    assert absent_value("rating") != absent_value("rating")


# ---- every function of the rooms ------------------------------------------------------------------------------------


def asked_names() -> dict[str, set[str]]:
    """Name -> the functions that ask for it by a positional parameter, those of what they return left out."""
    asked: dict[str, set[str]] = {}
    for called, function in methods():
        for name in signature(function).required + signature(function).optional:
            asked.setdefault(name, set()).add(called)
    return asked


# Functions of the rooms whose parameters are arguments of a caller, or what an entry of credit of the recipe fills.
HELPERS = {
    "advantages.rank_bonus",
    "advantages.soft_minimum",
    "losses.aggregate",
    "losses.entropy_history_penalty",
    "losses.generator",
    "losses.mean_log_ratio",
    "losses.pessimistic_surrogate",
    "losses.renyi",
    "losses.token_share",
    "rewards.checked_host_reward",
    "rewards.extract_answer",
    "rewards.extract_number",
    "rewards.parsed_number",
    "schedules.gradient_alignment",
    "selection.balanced_samples",
    "selection.cycled_rows",
    "selection.finished_prompts",
    "selection.knapsack_rollouts",
    "selection.mixed_probability",
    "selection.rollout_value",
    "selection.rollouts_for_signal",
    "selection.squared_correlation",
}


def test_every_name_that_a_method_asks_for_is_known():
    """A row of the table, or a name that follows the rules; the rest are helpers, which recipes do not name."""
    unknown = {
        name: functions
        for name, functions in asked_names().items()
        if name not in FIELDS and score_named(name, NETWORKS, VIEWS) is None and not name.endswith("_mask")
    }
    assert {name: functions - HELPERS for name, functions in unknown.items() if functions - HELPERS} == {}
    assert set().union(*unknown.values()) == HELPERS, "whoever asks for known names alone is no helper any more"


# ---- names that follow rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("logprobs", Score("policy", "logprobs")),
        ("entropy", Score("policy", "entropy")),
        ("old_logprobs", Score("policy", "logprobs", as_found=True)),
        ("values", Score("value", "values")),
        ("old_values", Score("value", "values", as_found=True)),
        ("value_values", Score("value", "values")),
        ("reference_logprobs", Score("reference", "logprobs")),
        ("proxy_entropy", Score("proxy", "entropy")),
        ("reward_scores", Score("reward", "scores")),
        ("old_twin_values", Score("twin", "values", as_found=True)),
        ("twin_target_values", Score("twin_target", "values")),
        ("answer_logprobs", Score("policy", "logprobs", "answer")),
        ("old_answer_logprobs", Score("policy", "logprobs", "answer", True)),
        ("reference_answer_logprobs", Score("reference", "logprobs", "answer")),
        ("proxy_other_answer_entropy", Score("proxy", "entropy", "other_answer")),
        ("reward_answer_scores", Score("reward", "scores", "answer")),
        # what is of no network, or of none that is there
        ("behaviour_logprobs", None),
        ("teacher_logprobs", None),
        ("reference_question_logprobs", None),
        ("token_reward_logits", None),
        ("rewards", None),
        ("entropy_per_token", None),
        ("answer_mask", None),
    ],
)
def test_what_a_name_asks_of_whom(name, expected):
    assert score_named(name, NETWORKS, VIEWS) == expected


def test_a_token_reward_model_has_a_name_of_its_own():
    assert score_named("token_reward_logits", ["token_reward"]) == Score("token_reward", "values")
    assert score_named("values", ["policy"]) is None


# ---- messages -------------------------------------------------------------------------------------------------------


def test_nearest_suggests_or_lists():
    assert nearest("advantage", ["advantages", "rewards"]) == "did you mean 'advantages'?"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("advantages", "add an entry to credit that fills it, for example advantages: group_normalized"),
        ("budget", "for example budget: a function of yours"),
        ("turn_rewards", "a task that is answered in turns provides it"),
        ("staleness", "an external engine provides it"),
        ("extra", "rollout.plan: mixed_temperature"),
        ("pool_mean", "the plan adaptive provides it"),
        ("preferred", "written rows provide it"),
        ("validation", "written rows of the validation split"),
        ("values", "a critic provides it"),
        ("twin_target_values", "a critic provides it"),
        ("token_reward_logits", "a critic provides it"),
        ("logprobs", "losses alone can name it"),
        ("completions", "readings and rewards may name it"),
        ("reference_logprob", "did you mean 'reference_logprobs'"),
    ],
)
def test_a_message_says_who_would_provide_a_name(name, message):
    assert message in remedy(name, {"rewards", "reference_logprobs"})


ROWS = SimpleNamespace(tokens=jnp.zeros((4, 3)))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("rewards", (4,)), ("advantages", (4,)), ("advantages", (4, 3)), ("mask", (4, 3)), ("confidence", (4, 7, 2))],
)
def test_shapes_that_fit(name, shape):
    check_shape(jnp.zeros(shape), name, "some", ROWS)


@pytest.mark.parametrize(
    ("name", "shape", "right"),
    [
        ("rewards", (4, 3), r"shape \(4,\)"),
        ("advantages", (3, 4), r"\(4,\) or \(4, 3\)"),
        ("mask", (4,), r"shape \(4, 3\)"),
        ("confidence", (), "one entry a completion, 4"),
        ("preferences", (3, 4), "one entry a completion, 4"),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, shape, right):
    with pytest.raises(ValueError, match=rf"^{name} 'some' returned shape .* for 4 completions.*{right}"):
        check_shape(jnp.zeros(shape), name, "some", ROWS)


def test_the_docstring_of_the_module_says_the_rules():
    for name in (
        "old_<name>",
        "<network>_logprobs",
        "<network>_scores",
        "<view>_logprobs",
        "<network>_<view>_logprobs",
    ):
        assert name in fields.__doc__
