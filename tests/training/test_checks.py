"""Parts of a step that do not go together: each refusal says what is needed, what lacks it, and what would do."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import optax
import pytest

from jaxrl_llm import advantages, losses
from jaxrl_llm.experience import Selection
from jaxrl_llm.models import ExpertsConfig, TransformerConfig, transformer
from jaxrl_llm.parallel import make_mesh
from jaxrl_llm.rollout import Controls, Endpoint, HostEnvironment, plans
from jaxrl_llm.rollout.capabilities import CAPABILITIES, ROWS, SAMPLERS, require
from jaxrl_llm.rollout.environments import Environment
from jaxrl_llm.rollout.hand_over import External
from jaxrl_llm.rows import Replay, Written
from jaxrl_llm.terms import Fill, LossTerm, Reward
from jaxrl_llm.training import Placement, Resources, Rollout, Update, make_train_step
from jaxrl_llm.training.checks import replayed_fields

ROLLOUT = Rollout(samples_per_prompt=2, max_completion_tokens=6, eos_ids=(2,), pad_id=0)
TURNS = dict(max_turns=2, max_turn_tokens=2, max_observation_tokens=1, end_of_turn_ids=(2,))
INSIDE = Environment(lambda start, key: 0, lambda *turn: None, **TURNS)
IN_PYTHON = HostEnvironment(lambda item: 0, lambda *turn: None, workers=1, **TURNS)
ENGINE = External(Endpoint("http://localhost:1", "policy"))
TEXT = Resources(decode=str, encode=lambda text: [])
EXPERTS = transformer(
    TransformerConfig(vocabulary_size=16, width=16, layers=1, heads=2, kv_heads=1, experts=ExpertsConfig(2, 1))
)
SELECTION = Selection(lambda: 0, lambda memory, key, count: jnp.arange(count), lambda memory: memory)
TRUNCATION = Controls(top_k=3)

PLAIN = plans.plain(samples_per_prompt=2)
GREEDY = plans.greedy_baseline(PLAIN, temperature=1.0)
WRITTEN = plans.demonstration_in_group(PLAIN, max_completion_tokens=6, pad_id=0)
STARTED = plans.prefixes(PLAIN, texts=("a",), encode=lambda text: [3], max_completion_tokens=6, pad_id=0)
UNEVEN = plans.budget(PLAIN, samples_per_prompt=2, prompt_ids=4, most=8)
MIXED = plans.mixed_temperature(PLAIN, samples_per_prompt=2, prompt_share=0.5, temperature=1.5)
ADAPTIVE = plans.adaptive(PLAIN, samples_per_prompt=2)
BASELINE = {"credit": [("advantages", advantages.reward_minus_baseline)]}
STORE = Replay(0.5, 2, prompts_per_step=4, max_prompt_tokens=4, max_answer_tokens=2)


def total(tokens):
    return tokens.sum(1)


def grouped(logprobs, advantages, mask, group):
    raise AssertionError("never called")


def compose(model, source=ROLLOUT, **changes):
    parts = {
        "rewards": [total],
        "credit": [("advantages", advantages.raw_rewards)],
        "losses": [losses.policy_gradient],
        "resources": TEXT,
    }
    return make_train_step(model, optax.sgd(0.1), source=source, **(parts | changes))


# ---- capabilities ---------------------------------------------------------------------------------------------------


def test_every_capability_has_a_meaning_and_samplers_offer_known_ones():
    assert set(CAPABILITIES) >= ROWS
    for offers in SAMPLERS.values():
        assert set(CAPABILITIES) - ROWS >= offers
    for plan in (PLAIN, GREEDY, WRITTEN, STARTED, UNEVEN, MIXED, ADAPTIVE):
        assert plan.needs <= set(CAPABILITIES) - ROWS
        assert plan.lacks <= ROWS


def test_a_refusal_says_what_is_needed_by_whom_and_who_lacks_it():
    require("a", {"slots"}, "b", frozenset({"slots", "ahead"}))
    with pytest.raises(
        ValueError, match=r"^a needs decoding in slots \(slots\), which b does not offer; leave a out, or replace b$"
    ):
        require("a", {"slots", "ahead"}, "b", frozenset({"ahead"}))


@pytest.mark.parametrize(
    ("changed", "part", "capability", "by"),
    [
        # an engine
        ({"engine": ENGINE, "plan": STARTED}, "rollout.plan", "prefixes", "rollout.engine"),
        ({"engine": ENGINE, "plan": WRITTEN}, "rollout.plan", "prefixes", "rollout.engine"),
        ({"engine": ENGINE, "plan": UNEVEN}, "rollout.plan", "uneven_groups", "rollout.engine"),
        ({"engine": ENGINE, "plan": ADAPTIVE}, "rollout.plan", "active_prompts", "rollout.engine"),
        ({"engine": ENGINE, "plan": MIXED}, "rollout.plan", "temperatures", "rollout.engine"),
        ({"engine": ENGINE, "slots": 2}, "rollout.slots", "slots", "rollout.engine"),
        ({"engine": ENGINE, "environment": INSIDE}, "the environment", "conversations", "rollout.engine"),
        ({"engine": ENGINE, "off_policy_steps": 1}, "rollout.off_policy_steps", "ahead", "rollout.engine"),
        # an environment
        ({"environment": INSIDE, "plan": STARTED}, "rollout.plan", "prefixes", "the environment inside the program"),
        ({"environment": INSIDE, "plan": UNEVEN}, "rollout.plan", "uneven_groups", "the environment inside"),
        ({"environment": INSIDE, "slots": 2}, "rollout.slots", "slots", "the environment inside the program"),
        ({"environment": INSIDE, "truncation": TRUNCATION}, "rollout.truncation", "truncation", "the environment"),
        ({"environment": IN_PYTHON, "plan": ADAPTIVE}, "rollout.plan", "active_prompts", "the environment in Python"),
        ({"environment": IN_PYTHON, "plan": GREEDY}, "rollout.plan", "temperatures", "the environment in Python"),
        ({"environment": IN_PYTHON, "off_policy_steps": 1}, "off_policy_steps", "ahead", "the environment in Python"),
        # one another
        ({"truncation": TRUNCATION, "plan": WRITTEN}, "rollout.truncation", "drawn_by_policy", "rollout.plan"),
    ],
)  # fmt: skip
def test_what_samplers_and_plans_do_not_offer(bigram, changed, part, capability, by):
    message = rf"{part} needs {CAPABILITIES[capability]} \({capability}\), which {by}.* does not offer; leave "
    with pytest.raises(ValueError, match=message):
        compose(bigram, replace(ROLLOUT, **changed))


def test_a_selection_says_how_many_prompts_before_a_state_is_made(bigram):
    with pytest.raises(ValueError, match="a rollout with a selection needs prompts_per_step"):
        compose(bigram, replace(ROLLOUT, selection=SELECTION))


@pytest.mark.parametrize("changed", [{"engine": ENGINE}, {"environment": IN_PYTHON}])
def test_a_baseline_that_a_method_names_needs_temperatures(bigram, changed):
    with pytest.raises(ValueError, match=r"the greedy baseline \('baseline_rewards'\) needs .*\(temperatures\)"):
        compose(bigram, replace(ROLLOUT, **changed), **BASELINE)


@pytest.mark.parametrize(
    ("changed", "joined", "message"),
    [
        ({"plan": UNEVEN}, [Written(4, 2)], r"written rows needs .*\(equal_groups\), which rollout.plan"),
        ({"plan": UNEVEN}, [STORE], r"replay needs .*\(equal_groups\), which rollout.plan"),
        ({"truncation": TRUNCATION}, [Written(4, 2)], r"rollout.truncation needs .*\(drawn_by_policy\), which written"),
        ({"truncation": TRUNCATION}, [STORE], r"rollout.truncation needs .*\(drawn_by_policy\), which replay"),
        ({}, [Written(6, 3)], r"written rows come in groups of 3, .* rollout.samples_per_prompt 2; make both equal"),
    ],
)
def test_what_rows_of_another_source_cannot_join(bigram, changed, joined, message):
    with pytest.raises(ValueError, match=message):
        compose(bigram, [replace(ROLLOUT, **changed), *joined])


@pytest.mark.parametrize(
    ("changed", "joined", "message"),
    [
        ({"plan": WRITTEN}, [], r"rollout.replay_router needs .*\(drawn_by_policy\), which rollout.plan"),
        ({}, [Written(4, 2)], r"rollout.replay_router needs .*\(recorded_router\), which written rows"),
        ({}, [STORE], r"rollout.replay_router needs .*\(recorded_router\), which replay"),
        ({"engine": ENGINE}, [], r"rollout.replay_router needs .*\(router_record\), which rollout.engine"),
    ],
)
def test_experts_are_replayed_where_they_were_recorded(changed, joined, message):
    with pytest.raises(ValueError, match=message):
        compose(EXPERTS, [replace(ROLLOUT, replay_router=True, **changed), *joined])


def test_a_function_of_whole_distributions_is_refused_where_sampling_is_truncated(bigram):
    cut = replace(ROLLOUT, truncation=TRUNCATION)
    exact = losses.divergence(samples="vocabulary", gradient="exact")
    with pytest.raises(ValueError, match=r"needs tokens sampled from the whole vocabulary \(whole_vocabulary\), which"):
        compose(bigram, cut, losses=[losses.policy_gradient, exact])
    with pytest.raises(ValueError, match=r"'min_p_logprobs' needs .*\(whole_vocabulary\), which rollout.truncation"):
        compose(
            bigram,
            cut,
            credit=[
                ("proxy_logprobs", partial(losses.min_p_logprobs, min_p=0.1)),
                ("advantages", lambda rewards, proxy_logprobs: rewards),
            ],
        )


@pytest.mark.parametrize("update", [Update(minibatches_per_epoch=2), Update(sequences_per_microbatch=2)])
def test_a_loss_of_groups_cannot_be_cut_where_groups_are_uneven(bigram, update):
    uneven = replace(ROLLOUT, plan=UNEVEN)
    with pytest.raises(ValueError, match=r"loss 'grouped' in minibatches or microbatches, .*\(equal_groups\)"):
        compose(bigram, uneven, losses=[grouped], update=update)
    assert compose(bigram, uneven, losses=[grouped]) is not None
    assert compose(bigram, uneven, update=update) is not None


def test_what_goes_together_is_composed(bigram):
    """Engines and environments with the plans that ask for nothing that they do not offer."""
    refill = plans.refill(PLAIN, samples_per_prompt=2, max_rounds=2)
    for changed in (
        {"engine": ENGINE, "plan": refill},
        {"environment": INSIDE, "plan": refill},
        {"environment": INSIDE, "plan": ADAPTIVE},
        {"environment": INSIDE, "plan": MIXED},
        {"environment": IN_PYTHON, "plan": refill},
        {"truncation": TRUNCATION, "plan": STARTED},
        {"plan": ADAPTIVE, "off_policy_steps": 1},
        {"plan": refill, "selection": SELECTION, "prompts_per_step": 4},
    ):
        step = compose(bigram, replace(ROLLOUT, **changed))
        assert bool(step.priming) == ("off_policy_steps" in changed)
    assert compose(bigram, replace(ROLLOUT, environment=INSIDE), **BASELINE).composition.plan.drawn == 2


# ---- sources, tokens, text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ([], {}, "source is empty; a step needs rows"),
        (STORE, {}, "source is only a replay store, .* name a Rollout too"),
        (replace(ROLLOUT, eos_ids=(2, 16)), {}, r"rollout.eos_ids is \(2, 16\), but the model's token ids are 0 to 15"),
        (replace(ROLLOUT, pad_id=99), {}, r"rollout.pad_id is 99, but the model's token ids"),
        (replace(ROLLOUT, environment=IN_PYTHON), {"resources": Resources(decode=str)}, "needs decode= and encode="),
        (replace(ROLLOUT, replay_router=True), {}, "replay_router is true, but the model is not a mixture of experts"),
        (ROLLOUT, {"losses": [losses.router_balance]}, "'router_balance' names 'router_choices', but the model is no"),
        ([ROLLOUT, STORE], {"credit": [("preferences", lambda rewards: rewards), ("advantages", advantages.raw_rewards)], "losses": [lambda logprobs, preferences: None]}, "names 'preferences', which replayed rows do not have"),  # noqa: E501
        ([replace(ROLLOUT, plan=ADAPTIVE), STORE], {"losses": [lambda logprobs, label: None]}, "names 'label', which replayed rows do not"),  # noqa: E501
        (replace(ROLLOUT, selection=SELECTION), {}, "a rollout with a selection needs prompts_per_step"),
        (ROLLOUT, {"update": Update(alignment_every_steps=2)}, "alignment needs losses on written completions"),
    ],
)  # fmt: skip
def test_sources_that_cannot_be(bigram, source, changes, message):
    with pytest.raises(ValueError, match=message):
        compose(bigram, source, **changes).init(jnp.zeros(2, jnp.uint32))


@pytest.mark.parametrize(
    ("offload", "mesh", "message"),
    [
        ({"optimiser"}, True, "training.offload names 'optimiser'; it can name optimizer, reference"),
        ({"optimizer"}, False, "without a mesh; pass mesh=make_mesh"),
        ({"reference"}, True, "keeps no copy of a reference policy; leave it out"),
    ],
)
def test_what_cannot_be_offloaded(bigram, offload, mesh, message):
    place = Placement(make_mesh(1) if mesh else None, offload=frozenset(offload))
    with pytest.raises(ValueError, match=message):
        compose(bigram, resources=Resources(placement=place))


def test_a_source_is_one_or_several(bigram):
    both = compose(bigram, [ROLLOUT, Written(4, 2)]).composition
    assert (both.rollout, both.written.rows, both.joined_groups) == (ROLLOUT, 4, 2)
    alone = compose(bigram, Written(4), rewards=[], credit=[], losses=[losses.negative_log_likelihood]).composition
    assert (alone.rollout, alone.samples, alone.temperature, alone.joined_groups) == (None, 1, 1.0, 0)
    assert compose(bigram, [ROLLOUT, STORE]).composition.joined_groups == 4


def test_replayed_rows_of_conversations_keep_their_turns(bigram):
    def of_turns(logprobs, turn, solved, mask):
        return losses.negative_log_likelihood(logprobs, mask)

    def of_turn_rewards(logprobs, turn_rewards, mask):
        return losses.negative_log_likelihood(logprobs, mask)

    source = [replace(ROLLOUT, environment=INSIDE), Replay(0.5, 2, 4, 4, 4)]
    composed = compose(bigram, source, losses=[of_turns]).composition
    assert replayed_fields(composed) == {"solved": "row", "turn": "token"}
    with pytest.raises(ValueError, match="names 'turn_rewards', which replayed rows do not have"):
        compose(bigram, source, losses=[of_turn_rewards])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reward(len, math.nan), "reward 'len'.weight is nan; it must be finite"),
        (lambda: Reward(len, deadline_s=-1), "reward 'len'.deadline_s is -1; it must be above 0"),
        (lambda: Fill("advantages", len, value_on_failure=math.inf), "fill 'len'.value_on_failure is inf"),
        (lambda: LossTerm(len, math.nan), "loss 'len'.coefficient is nan; it must be finite"),
    ],
)
def test_numbers_of_terms_are_checked_where_they_are_written(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
