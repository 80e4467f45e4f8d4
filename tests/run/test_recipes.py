"""Recipe entries become functions, or one sentence about what is wrong with them."""

from __future__ import annotations

import sys
from functools import partial

import jax.numpy as jnp
import pytest

from jaxrl_llm import advantages, losses, rewards
from jaxrl_llm.config import read_tree
from jaxrl_llm.experience import Method
from jaxrl_llm.run.recipes import RecipeError, credit_terms, loss_terms, reward_terms
from jaxrl_llm.shipped import recipe_path
from jaxrl_llm.signatures import signature

USER_MODULE = """
from __future__ import annotations
from typing import TYPE_CHECKING

import jax.numpy as jnp

from jaxrl_llm.experience import Loss, Method

if TYPE_CHECKING:
    from elsewhere import Number

calls = []

def brevity(length, *, limit: int = 4):
    return (length <= limit).astype(jnp.float32)

def unresolved(length, *, limit: Number = 4):
    return limit

def scored(completions, *, bonus: float):
    return [len(text) + bonus for text in completions]

def plain(completions):
    return [0.0 for text in completions]

def pull(logprobs, mask, *, strength: float = 1.0):
    return Loss(-strength * (logprobs * mask).sum(), mask.sum())

def ramp(step, *, over: int = 10):
    return step / over

def counting(*, start: int = 0):
    if start < 0:
        raise ValueError(f"start is {start}; it must be at least 0")
    return Method(lambda: jnp.int32(start), lambda memory, rewards: (rewards, memory + 1))

a_number = 3
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module in the current directory, where `jaxrl` is started."""
    (tmp_path / "my_methods.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_methods", None)


def test_a_name_alone_is_the_public_function_itself():
    (term,) = reward_terms(["exact_answer"])
    assert (term.function, term.weight, term.name) == (rewards.exact_answer, 1.0, "exact_answer")
    assert not term.on_host
    (loss,) = loss_terms(["clipped_surrogate"])
    assert (loss.function, loss.coefficient, loss.name) == (losses.clipped_surrogate, 1.0, "clipped_surrogate")


def test_weight_and_name_stand_beside_the_hyper_parameters_of_a_reward():
    (term,) = reward_terms([{"answer_format": {"require_think": False, "weight": 0.5, "name": "shape"}}])
    assert (term.weight, term.name, term.function.keywords) == (0.5, "shape", {"require_think": False})


def test_a_reward_that_reads_text_runs_on_the_host():
    assert [term.on_host for term in reward_terms(["exact_match", "exact_answer"])] == [True, False]


def test_credit_entries_keep_their_order():
    terms = credit_terms(
        [
            {"rewards": {"soft_overlong": {"max_completion_tokens": 8, "buffer_tokens": 2}}},
            {"weight": "nonconstant_groups"},
            {"advantages": {"group_normalized": None}},
        ]
    )
    assert [(t.fields, t.name) for t in terms] == [
        ("rewards", "soft_overlong"),
        ("weight", "nonconstant_groups"),
        ("advantages", "group_normalized"),
    ]
    assert terms[0].function.keywords == {"max_completion_tokens": 8, "buffer_tokens": 2}
    assert terms[2].function is advantages.group_normalized


def test_a_factory_is_called_with_its_hyper_parameters():
    (term,) = credit_terms([{"advantages": {"running_mean_baseline": {"decay": 0.5}}}])
    assert isinstance(term.function, Method)
    assert term.memory_name == "advantages:running_mean_baseline"
    (exact,) = loss_terms([{"divergence": {"samples": "vocabulary", "coefficient": 0.1}}])
    assert signature(exact.function).required == ("over_vocabulary", "mask")
    assert exact.coefficient == 0.1


def test_numbers_that_yaml_reads_as_text_become_numbers():
    (loss,) = loss_terms([{"clipped_surrogate": {"clip_high": "2.8e-1", "coefficient": "1e-2"}}])
    assert (loss.function.keywords["clip_high"], loss.coefficient) == (0.28, 0.01)


@pytest.mark.usefixtures("user_module")
def test_functions_of_the_user_are_named_by_module_and_function():
    brevity, scored = reward_terms(
        [
            {"python": "my_methods:brevity", "limit": 3, "weight": 0.25},
            {"python": "my_methods:scored", "bonus": 1, "name": "text length"},
        ]
    )
    assert (brevity.name, brevity.weight, brevity.on_host) == ("brevity", 0.25, False)
    assert brevity.function(jnp.array([3, 4])).tolist() == [1.0, 0.0]
    assert (scored.name, scored.on_host) == ("text length", True)
    assert scored.function(completions=["ab"]) == [3.0]
    (plain,) = reward_terms(["my_methods:brevity"])
    assert plain.name == "brevity"
    (counting,) = credit_terms([{"rewards": {"python": "my_methods:counting", "start": 2}}])
    assert counting.function.init() == 2
    (pull,) = loss_terms(
        [{"python": "my_methods:pull", "strength": 2.0, "coefficient": {"python": "my_methods:ramp", "over": 5}}]
    )
    assert pull.name == "pull"
    assert pull.coefficient(5) == 1.0
    (by_path,) = loss_terms([{"python": "my_methods:pull", "coefficient": "my_methods:ramp"}])
    assert by_path.coefficient(5) == 0.5


@pytest.mark.usefixtures("user_module")
def test_an_annotation_that_cannot_be_resolved_is_not_checked():
    (term,) = reward_terms([{"python": "my_methods:unresolved", "limit": 3}])
    assert term.function(None) == 3


@pytest.mark.parametrize(
    ("build", "entries", "message"),
    [
        (reward_terms, ["exact_anser"], r"rewards names 'exact_anser', .* did you mean 'exact_answer'\?"),
        (reward_terms, ["weighted_sums"], "did you mean 'weighted_sum'"),
        (credit_terms, [{"advantages": "group_normalised"}], r"credit\.advantages names .* 'group_normalized'\?"),
        (loss_terms, ["cliped_surrogate"], r"losses names .* did you mean 'clipped_surrogate'\?"),
        (
            loss_terms,
            [{"clipped_surrogate": {"clip_hi": 0.3}}],
            r"losses\.clipped_surrogate\.clip_hi is not a hyper-parameter .* 'clip_high'\?",
        ),
        (
            loss_terms,
            [{"clipped_surrogate": {"clip_high": "wide"}}],
            r"losses\.clipped_surrogate\.clip_high is 'wide': .* valid number",
        ),
        (loss_terms, [{"clipped_surrogate": {"aggregation": "mean"}}], "aggregation is 'mean': .*'token_mean'"),
        (loss_terms, [{"clipped_surrogate": {"coefficient": [1]}}], r"coefficient is \[1\]; it must be a number"),
        (
            loss_terms,
            [{"clipped_surrogate": {"coefficient": "ramp"}}],
            "coefficient names 'ramp', which does not exist",
        ),
        (reward_terms, [{"exact_answer": {"weight": "much"}}], r"rewards\.exact_answer\.weight is 'much'"),
        (
            credit_terms,
            [{"rewards": {"soft_overlong": {"buffer_tokens": 2}}}],
            "needs max_completion_tokens; add soft_overlong: {max_completion_tokens: ...}",
        ),
        (
            credit_terms,
            [{"advantages": {"running_mean_baseline": {"decay": 1.5}}}],
            r"credit\.advantages\.running_mean_baseline\.decay is 1\.5",
        ),
        (loss_terms, [{"divergence": {"generator": "kl"}}], r"losses\.divergence: .*generator"),
        (credit_terms, ["group_normalized"], "must be one `field: method`"),
        (credit_terms, [{"rewards": "soft_overlong", "weight": "x"}], "must be one `field: method`"),
        (
            reward_terms,
            [{"python": "my_methods:plain", "value_on_failur": 0.0}],
            r"value_on_failur is not a hyper-parameter of my_methods:plain; did you mean 'value_on_failure'\?",
        ),
        (reward_terms, [{"python": "my_methods:plain", "deadline": 0.1}], r"did you mean 'deadline_s'\?"),
        (
            reward_terms,
            [{"python": "my_methods:plain", "qqq": 1}],
            "known: deadline_s, executor, memory_gib, name, reads, value_on_failure, weight$",
        ),
        (reward_terms, [{"exact_answer": {"wieght": 1}}], r"did you mean 'weight'\?"),
        (credit_terms, [{"advantages": {"group_normalized": {"read": {}}}}], r"did you mean 'reads'\?"),
        (loss_terms, [{"clipped_surrogate": {"coeficient": 1}}], r"did you mean 'coefficient'\?"),
        (reward_terms, [3], "rewards entry 3 is neither a name"),
        (reward_terms, [{"exact_answer": 0.5}], "neither a name, nor"),
        (reward_terms, [{"python": "my_methods:brevty"}], "'my_methods' has no 'brevty'"),
        (reward_terms, [{"python": "my_methods:a_number"}], "is not a function"),
        (reward_terms, [{"python": "no_such_module:f"}], "importing 'no_such_module' failed: .* set PYTHONPATH to it"),
        (reward_terms, [{"python": "my_methods:scored"}], "needs bonus"),
        (reward_terms, [{"python": "my_methods:brevity", "limit": 2.5}], r"limit is 2\.5: .* integer"),
        (reward_terms, [{"python": "my_methods:brevity", "limits": 2}], r"did you mean 'limit'\?"),
        (credit_terms, [{"rewards": {"python": "my_methods:counting", "start": -1}}], "start is -1; it must be"),
    ],
)
@pytest.mark.usefixtures("user_module")
def test_bad_entries_are_refused_with_a_remedy(build, entries, message):
    with pytest.raises(RecipeError, match=message):
        build(entries)


@pytest.mark.parametrize("coefficient", [-1.0, float("nan"), float("inf")])
def test_a_coefficient_out_of_range_is_refused(coefficient):
    with pytest.raises(RecipeError, match=r"losses\.kl_estimate\.coefficient is .*(at least 0|finite)"):
        loss_terms([{"kl_estimate": {"coefficient": coefficient}}])


def bound(function, key):
    """What a keyword of a function is bound to, at each level."""
    while isinstance(function, partial):
        if key in function.keywords:
            yield function.keywords[key]
        function = function.func


@pytest.mark.parametrize("name", ["dapo", "dr_grpo", "hbpo", "drpo", "rl_plus", "cure"])
def test_limits_of_a_recipe_follow_those_of_the_run(name):
    tree, limits = read_tree(recipe_path(name)), []
    for build, section in ((reward_terms, "rewards"), (credit_terms, "credit"), (loss_terms, "losses")):
        terms = build(tree[section], {"max_completion_tokens": 44, "samples_per_prompt": 16})
        limits += [limit for term in terms for limit in bound(term.function, "max_completion_tokens")]
    assert limits
    assert set(limits) == {44}
    assert "max_completion_tokens" not in str([tree[section] for section in ("rewards", "credit", "losses")])


def test_a_keyword_whose_default_is_none_is_filled_from_a_size_of_the_run_and_another_is_not():
    (term,) = loss_terms(["policy_gradient"], {"max_completion_tokens": 9})
    assert list(bound(term.function, "max_completion_tokens")) == [9]
    (term,) = loss_terms([{"policy_gradient": {"max_completion_tokens": 3}}], {"max_completion_tokens": 9})
    assert list(bound(term.function, "max_completion_tokens")) == [3]
    (term,) = loss_terms(["negative_aware_likelihood"], {"max_completion_tokens": 9})
    assert list(bound(term.function, "max_completion_tokens")) == []
