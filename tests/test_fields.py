"""The table of names is the only one, it has a row for whatever public functions ask for, and rules name the rest."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

import jaxrl_llm
from jaxrl_llm import advantages, losses, rewards, schedules, selection
from jaxrl_llm.catalogue import built
from jaxrl_llm.experience import FACTS, Method
from jaxrl_llm.fields import (
    FIELDS,
    PROVIDERS,
    absent_value,
    check_shape,
    is_written_text,
    kind_of,
    nearest,
    need_of,
    provided_by,
    remedy,
)
from jaxrl_llm.network_names import HEADS, Score, score_named
from jaxrl_llm.signatures import names

PACKAGE = Path(jaxrl_llm.__file__).parent
NETWORKS = (
    "auxiliary",
    "policy",
    "reference",
    "proxy",
    "teacher",
    "reward",
    "previous",
    "guide",
    "process",
    "progress",
    "goal",
    "contrast",
    *HEADS,
    *(f"{head}_target" for head in HEADS),
)
VIEWS = ("answer", "itself", "mismatch", "opponent", "partner", "plain", "yes", "no")

# ---- what public functions ask for ----------------------------------------------------------------------------------

# Public functions that other functions call, and no step: what they are handed has the names of mathematics.
HELPERS = {
    "advantages": {"rank_bonus", "soft_minimum"},
    "losses": {
        *("aggregate", "aligned_gradients", "binary_logit_divergence", "generator", "goal_quality", "mean_log_ratio"),
        *("pessimistic_surrogate", "renyi", "token_share"),
    },
    "rewards": {
        *("contrastive_rubrics", "checked_host_reward", "dominated_volume", "extract_answer", "extract_number"),
        "parsed_number",
    },
    "schedules": {"gradient_alignment", "implicit_gradient", "influence_weights"},
    "selection": {
        # called by plans and selections with counts and shares of earlier rows
        "balanced_samples",
        "cycled_rows",
        "finished_prompts",
        "informativeness",
        "kept_by_two_maps",
        "knapsack_rollouts",
        "mixed_probability",
        "path_value",
        "rollout_value",
        "rollouts_for_signal",
        "share_counts",
        "squared_correlation",
        "stage_slots",
        "success_potential",
        "topology_value",
    },
}
# What an entry of credit fills for one function alone, whose docstring says what it is.
OF_ONE_FUNCTION = {
    *("conciseness", "difficulty", "high", "internal_confidence", "low", "middle", "patterns", "potentials", "quality"),
    *("reference_rewards", "stated_confidence", "step_match", "test_passes", "rating_probs", "rubric"),
    # votes and embeddings
    *("agrees", "embedding", "labelled", "token_certainty", "voter"),
    *("baseline_embedding", "goal_embedding", "hits"),
    *("continuations", "contributions", "drawn_turns", "grounded", "milestones", "successes", "trained"),
    "turn_factors",
    # of steps and turns
    *("action_id", "covered", "features", "state_id", "turn_answer_logprobs", "turn_labels", "turn_mask"),
    # of pairs
    *("candidates", "own_place"),
    *("calibration", "first_share", "log_collision", "pair_weight", "reward_shift", "swapped_share", "weak_share"),
    *("end_values", "original_correct", "refined_correct", "win_share"),
}
ROOMS = {room.__name__.split(".")[1]: room for room in (advantages, losses, rewards, schedules, selection)}


def is_known(name: str) -> bool:
    """Whether the table or a rule says what a name means."""
    by_rule = score_named(name, NETWORKS, VIEWS) is not None or name in {f"{view}_mask" for view in VIEWS}
    return name in FIELDS or by_rule or name in OF_ONE_FUNCTION or is_written_text(name)


def unknown_names(function) -> set[str]:
    """Names that a function, or what it returns by default, asks for and nothing explains."""
    return {name for name in names(function) if not is_known(name)}


@pytest.mark.parametrize("room", ROOMS)
def test_every_name_that_a_public_function_asks_for_is_explained(room):
    public = {name: getattr(ROOMS[room], name) for name in ROOMS[room].__all__}
    functions = {name: value for name, value in public.items() if inspect.isfunction(value)}
    unknown = {}
    for name, function in functions.items():
        made = function
        if inspect.signature(function).return_annotation in (Method, "Method"):
            made = built(function)
        asked = unknown_names(function) | (unknown_names(made) if isinstance(made, Method) else set())
        if asked:
            unknown[name] = asked
    assert unknown.keys() == HELPERS[room], {n: a for n, a in unknown.items() if n not in HELPERS[room]}


# ---- the table ------------------------------------------------------------------------------------------------------


def test_every_row_has_a_provider_that_says_what_to_do_and_a_meaning():
    for name, field in FIELDS.items():
        assert field.provider in PROVIDERS, name
        assert field.meaning, name
        assert field.kind in ("scalar", "reward", "row", "token", "either", "vector", "prompt", "batch"), name
    assert {field.provider for field in FIELDS.values()} | {"held out"} == set(PROVIDERS)


def test_every_fact_of_sampling_is_a_row_that_the_rollout_provides():
    assert set(FACTS) == provided_by("rollout")


def test_rows_are_not_what_rules_say_already():
    twice = {name for name in FIELDS if score_named(name, ["policy", "reference", *HEADS]) is not None}
    # What is of the network that learns, and the one name that no ending of the rules fits.
    assert twice == {"logprobs", "entropy", "token_reward_logits"}


def test_names_that_the_table_lacks_have_a_shape_by_their_ending():
    shapes = {name: kind_of(name) for name in ("reference_logprobs", "old_entropy", "judge_scores", "mine", "values")}
    expected = {"reference_logprobs": "token", "old_entropy": "token", "judge_scores": "row"}
    assert shapes == expected | {"mine": "vector", "values": "vector"}


# ---- names of what networks say -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("logprobs", Score("policy", "logprobs")),
        ("entropy", Score("policy", "entropy")),
        ("old_logprobs", Score("policy", "logprobs", as_found=True)),
        ("reference_logprobs", Score("reference", "logprobs")),
        ("old_reference_logprobs", Score("reference", "logprobs", as_found=True)),
        ("reference_entropy", Score("reference", "entropy")),
        ("values", Score("value", "values")),
        ("old_values", Score("value", "values", as_found=True)),
        ("twin_values", Score("twin", "values")),
        ("twin_target_values", Score("twin_target", "values")),
        ("value_scores", Score("value", "scores")),
        ("answer_logprobs", Score("policy", "logprobs", "answer")),
        ("old_answer_entropy", Score("policy", "entropy", "answer", as_found=True)),
        ("reference_answer_logprobs", Score("reference", "logprobs", "answer")),
        ("answer_values", Score("value", "values", "answer")),
        ("value_answer_scores", Score("value", "scores", "answer")),
        ("token_reward_logits", Score("token_reward", "values")),
    ],
)
def test_a_rule_says_what_a_name_asks_of_which_network(name, found):
    assert score_named(name, NETWORKS, VIEWS) == found


@pytest.mark.parametrize(
    "name",
    [
        "advantages",
        "answer_mask",  # of the view, not of a network
        "pupil_logprobs",  # nobody has described one
        "prompt_answer_logprobs",
        "answer_reference_logprobs",  # the network comes first
        "logprob",
        "oldlogprobs",
        "reference",
    ],
)
def test_a_name_that_follows_no_rule_is_nobodys(name):
    assert score_named(name, NETWORKS, VIEWS) is None


def test_a_name_of_a_network_that_is_not_there_is_nobodys():
    assert score_named("values", ["policy"]) is None
    assert score_named("token_reward_logits", ["policy"]) is None
    assert score_named("answer_logprobs", ["policy"]) is None
    assert score_named("teacher_logprobs", ["policy", "teacher"]) == Score("teacher", "logprobs")


def test_needs_follow_from_names():
    asked = {name: need_of(name) for name in ("old_logprobs", "old_entropy", "reference_logprobs", "twin_values")}
    assert asked == {
        "old_logprobs": "",
        "old_entropy": "entropy",
        "reference_logprobs": "reference",
        "twin_values": "twin values",
    }


# ---- messages -------------------------------------------------------------------------------------------------------


def test_nearest_suggests_or_lists():
    assert nearest("advantage", ["advantages", "rewards"]) == "did you mean 'advantages'?"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("advantages", "add an entry to credit that fills it, for example advantages: group_normalized"),
        ("values", "a critic provides it"),
        ("old_twin_values", "a critic provides it"),
        ("stored_logprobs", "written rows provide it"),
        ("staleness", "an external engine provides it"),
        ("reward", "only coefficients and schedules can read it"),
        ("rewardz", "did you mean 'rewards'?"),
        ("tokens", "known: rewards"),
    ],
)
def test_a_remedy_names_who_would_provide_it(name, said):
    assert remedy(name, {"rewards"}).startswith(said)


# ---- no other table -------------------------------------------------------------------------------------------------

# Sets of three or more names that are no copies of the table.
OTHER_SETS = {
    "rewards/host.py": "arithmetic knows no table; it is what `signatures.per_row` says",
    "rollout/plans/adaptive_samples.py": "what the plan declares that its rows know",
    "rollout/plans/step_continuations.py": "what the plan declares that its rows know",
    "rollout/turns.py": "what the sampler of turns fills in",
    "run/explain.py": "facts that are left out of a line that is shown",
    "training/scores.py": "what one pass of the policy over its own rows gives",
}


def sets_of_names(path: Path) -> list[set[str]]:
    """Sets that are written out in a module and hold three or more names of the table."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Set)]
    found = [{e.value for e in node.elts if isinstance(e, ast.Constant)} & FIELDS.keys() for node in nodes]
    return [each for each in found if len(each) >= 3]


def test_no_other_module_holds_a_table_of_names():
    found = {
        str(path.relative_to(PACKAGE)): sets
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "fields.py" and (sets := sets_of_names(path))
    }
    assert found.keys() == OTHER_SETS.keys(), found
    assert all(len(sets) == 1 for sets in found.values()), found


def test_the_sets_that_are_written_out_agree_with_the_table():
    from jaxrl_llm.rewards.host import _ONE_ROW
    from jaxrl_llm.rollout.turns import TURN_FIELDS
    from jaxrl_llm.signatures import _PER_ROW

    assert _ONE_ROW == _PER_ROW
    assert provided_by("environment") == TURN_FIELDS


# ---- shapes ---------------------------------------------------------------------------------------------------------

ROWS = SimpleNamespace(tokens=jnp.zeros((4, 3)))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("rewards", (4,)), ("advantages", (4,)), ("advantages", (4, 3)), ("mask", (4, 3)), ("stated", (4, 7, 2))],
)
def test_shapes_that_fit(name, shape):
    check_shape(jnp.zeros(shape), name, "some", ROWS)


@pytest.mark.parametrize(
    ("name", "shape", "right"),
    [
        ("rewards", (4, 3), r"shape \(4,\)"),
        ("advantages", (3, 4), r"\(4,\) or \(4, 3\)"),
        ("mask", (4,), r"shape \(4, 3\)"),
        ("stated", (), "one entry per completion, 4"),
        ("preferences", (3, 4), "one entry per completion, 4"),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, shape, right):
    with pytest.raises(ValueError, match=rf"^{name} 'some' returned shape .* for 4 completions.*{right}"):
        check_shape(jnp.zeros(shape), name, "some", ROWS)


def test_what_names_hold_in_rows_that_do_not_know_them():
    assert absent_value("preferred") == absent_value("answer_id") == -1
    assert absent_value("stated") == absent_value("rewards") == 0
    assert all(absent_value(name) != absent_value(name) for name in ("rating", "confidence", "verdict")), "no numbers"
