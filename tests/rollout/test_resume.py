"""The plan `resume`: branches go on from positions of completions that were drawn before."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import advantages, losses
from jaxrl_llm.experience import Prompts, Source
from jaxrl_llm.rollout.plans import from_the_start, highest_entropy, last_share, plain, resume
from jaxrl_llm.rollout.plans.resumed_completions import one_of_highest
from jaxrl_llm.rollout.sampled import Rollout
from jaxrl_llm.training import make_train_step

ENTROPY = jnp.array([[2.0, 0.1, 1.5, 0.2, 0.9, 1.2]])
WIDTH = 8


def plan(branches, choose, *, samples=8, **options):
    options = {"max_completion_tokens": WIDTH, "pad_id": 0, "encode": None} | options
    inner = plain(samples_per_prompt=samples - branches)
    return resume(inner, choose=choose, samples_per_prompt=samples, branches=branches, **options)


def drawn(model, made, prompts=4):
    step = make_train_step(
        model,
        optax.sgd(0.1),
        source=Rollout(samples_per_prompt=8, max_completion_tokens=WIDTH, eos_ids=(2,), pad_id=0, plan=made),
        rewards=[lambda tokens: (tokens[:, 1] % 2).astype(jnp.float32)],
        credit=[("advantages", advantages.group_normalized)],
        losses=[losses.clipped_surrogate],
    )
    number = jnp.arange(prompts, dtype=jnp.int32)
    given = Prompts(number[:, None] + 3, number * 0 + 1, number, number[:, None], number * 0 + 1)
    return step.run(step.init(jax.random.key(0)), given)


@pytest.fixture
def model(make_bigram):
    return make_bigram(16)


def test_worked_example_of_cure():
    every = jnp.arange(6)[None] > 0
    found = [int(one_of_highest(ENTROPY, every, jnp.array([u]), candidates=3)[0]) for u in (0.0, 0.4, 0.99)]
    assert found == [2, 5, 4]


def test_the_first_token_and_excluded_ones_are_no_candidates():
    choose = partial(highest_entropy, candidates=6, excluded_ids=(7,))
    rows, tokens = 64, jnp.array([[1, 7, 3, 4, 5, 6]])
    data = [jnp.tile(x, (rows, 1)) for x in (ENTROPY, jnp.array([[1.0, 1, 1, 1, 1, 0]]), tokens)]
    found = choose(*data, jnp.arange(rows), jnp.zeros(rows, jnp.int32), jax.random.key(0))
    assert set(found.tolist()) == {2, 3, 4}
    again = choose(*(x[:5] for x in data), jnp.arange(5), jnp.zeros(5, jnp.int32), jax.random.key(0))
    np.testing.assert_array_equal(found[:5], again)  # a row's draw does not depend on the others


def test_without_candidates_a_branch_starts_afresh():
    nothing = jnp.zeros((1, 6), bool)
    assert one_of_highest(ENTROPY, nothing, jnp.array([0.9]), candidates=3).tolist() == [0]
    with pytest.raises(ValueError, match="candidates is 0; it must be at least 1"):
        highest_entropy(ENTROPY, nothing, nothing, jnp.zeros(1), jnp.zeros(1), jax.random.key(0), candidates=0)


@pytest.mark.parametrize(
    "branches", [pytest.param(2, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow), 7]
)
def test_branches_share_the_tokens_before_their_position(branches, model):
    choose = partial(highest_entropy, candidates=3)
    _, metrics, rows = drawn(model, plan(branches, choose))
    tokens, source, mask = (np.asarray(x).reshape(4, 8, WIDTH) for x in (rows.tokens, rows.source, rows.mask))
    length, branch = np.asarray(rows.length).reshape(4, 8), np.asarray(rows["branch"]).reshape(4, 8)
    first = 8 - branches
    np.testing.assert_array_equal(branch, [[0] * first + [1] * branches] * 4)
    np.testing.assert_array_equal(rows.group, np.repeat(np.arange(4), 8))
    np.testing.assert_array_equal(np.sort(np.asarray(rows.sample).reshape(4, 8)), [range(8)] * 4)
    kept = (source == Source.HINT).sum(2)
    assert kept[:, :first].sum() == 0
    assert (kept[:, first:] > 0).mean() > 0.5
    differing = 0
    for group in range(4):
        for number in range(branches):
            origin, there, count = number % first, first + number, kept[group, first + number]
            assert count < length[group, origin]
            assert count == kept[group, first + origin] or branches <= first  # one position a completion
            np.testing.assert_array_equal(tokens[group, there, :count], tokens[group, origin, :count])
            np.testing.assert_array_equal(mask[group, there, :count], 0)
            np.testing.assert_array_equal(mask[group, there, count : length[group, there]], 1)
            differing += tokens[group, there].tolist() != tokens[group, origin].tolist()
    assert differing > 0
    np.testing.assert_allclose(metrics["resumed_tokens"], kept[:, first:].mean(), rtol=1e-6)
    assert metrics["sampler_gap_max"] < 1e-5


def test_a_retry_keeps_nothing_and_a_share_a_share(model):
    _, metrics, _ = drawn(model, plan(4, from_the_start))
    assert metrics["resumed_tokens"] == 0
    np.testing.assert_array_equal(last_share(jnp.array([8, 5, 1])), [4, 2, 0])


def test_a_hint_stands_behind_what_is_kept_and_is_not_trained(model):
    made = plan(4, from_the_start, hint="ab", encode=lambda text: [9 if letter == "a" else 10 for letter in text])
    rows = drawn(model, made)[2]
    branch = np.asarray(rows["branch"]) > 0
    np.testing.assert_array_equal(np.asarray(rows.tokens)[branch, :2], [[9, 10]] * branch.sum())
    np.testing.assert_array_equal(np.asarray(rows.mask)[branch, :2], 0)
    with pytest.raises(ValueError, match="hint is 'ab', which needs encode="):
        plan(4, from_the_start, hint="ab")


@pytest.mark.parametrize("branches", [0, 8, 9])
def test_there_must_be_a_branch_and_a_completion(branches):
    with pytest.raises(ValueError, match=f"branches is {branches}"):
        resume(
            plain(samples_per_prompt=1),
            choose=from_the_start,
            samples_per_prompt=8,
            branches=branches,
            max_completion_tokens=WIDTH,
            pad_id=0,
            encode=None,
        )
