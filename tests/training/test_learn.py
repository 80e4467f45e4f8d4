"""Epochs, minibatches and microbatches: what is visited, and that a split changes nothing."""

from __future__ import annotations

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import losses
from jaxrl_llm.losses import Aggregation, clipped_surrogate, entropy_bonus
from jaxrl_llm.rows import Written, minibatch_rows
from jaxrl_llm.training import LossTerm, Rollout, Update
from jaxrl_llm.training.checks import checked_split
from jaxrl_llm.training.composition import composition_of
from jaxrl_llm.training.initial import initial_state
from jaxrl_llm.training.learn import make_learn

MODES = get_args(Aggregation)


def composed(model, losses, update, *, samples=2, written=None):
    """A composition that is not checked: whatever its losses name is in the rows."""
    rollout = Rollout(samples_per_prompt=samples, max_completion_tokens=6, eos_ids=(2,), pad_id=0)
    sources = [rollout, written] if written else rollout
    return composition_of(model, optax.sgd(0.1), sources, [], [], losses, update, None)


def contrasted(logprobs, mask, weight, candidates):
    """What a row is against all rows of its batch, which a part of the batch sees too."""
    said = (logprobs * mask).sum(1)
    gap = jnp.square(said[:, None] - candidates[None, :])
    return losses.Loss((weight[:, None] * gap).sum(), weight.sum())


@pytest.fixture(scope="module")
def credited(rows):
    """Rows with advantages, one of them absent and one that counts in part."""
    rng = np.random.default_rng(2)
    return rows.filled(
        advantages=jnp.asarray(rng.normal(size=rows.tokens.shape), jnp.float32),
        old_logprobs=rows.behaviour_logprobs,
        candidates=jnp.asarray(rng.normal(size=rows.weight.shape), jnp.float32),
        weight=rows.weight.at[3].set(0.0).at[6].set(0.5),
    )


@pytest.fixture(scope="module")
def learned(bigram, credited):
    """size -> (aggregation -> (params, metrics)): one program for all modes, which the coefficients choose."""
    terms = [
        *(LossTerm(partial(clipped_surrogate, aggregation=mode, clip_high=0.01), name=mode) for mode in MODES),
        LossTerm(partial(entropy_bonus, aggregation="seq_mean_token_mean"), name="entropy"),
        LossTerm(contrasted, name="contrasted"),
    ]
    params, done = bigram.init(jax.random.key(0)), {}

    def at(size: int | None):
        if size not in done:
            c = composed(bigram, terms, Update(sequences_per_microbatch=size))
            learn, state = jax.jit(make_learn(c)), initial_state(c, jax.random.key(0), params)
            done[size] = {term.name: learn(state, credited, jnp.eye(len(terms))[i]) for i, term in enumerate(terms)}
        return done[size]

    return at


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("mode", [*MODES, "entropy", "contrasted"])
def test_every_split_of_a_batch_gives_the_same_update(learned, size, mode):
    (whole, one), (split, several) = learned(None)[mode], learned(size)[mode]
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(split.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for name in one:
        np.testing.assert_allclose(one[name], several[name], rtol=2e-5, atol=1e-6, err_msg=name)


def test_the_modes_differ_and_each_moves_the_parameters(learned, bigram):
    before = bigram.init(jax.random.key(0))["scores"]
    after = [np.asarray(learned(None)[mode][0].params["scores"]) for mode in MODES]
    for index, moved in enumerate(after):
        assert np.abs(moved - before).max() > 1e-4
        assert all(np.abs(moved - other).max() > 1e-5 for other in after[:index])


def test_metrics_say_what_they_average(learned, credited):
    _, metrics = learned(2)["token_mean"]
    np.testing.assert_allclose(metrics["loss"], metrics["loss/token_mean"], rtol=1e-6)
    # An absent row is behind neither the ratio nor the drift.
    counted = credited.mask * (credited.weight[:, None] > 0)
    assert metrics["sampler_gap_mean"] <= metrics["sampler_gap_max"]
    assert 0 < metrics["clip_share/token_mean"] < 1
    assert metrics["kl_update"] > 0
    assert counted[3].sum() == 0


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (1, 4), (3, 1), (2, 2)])
def test_every_row_is_visited_once_an_epoch_in_whole_groups(epochs, minibatches):
    prompts, samples = 4, 3
    order = np.asarray(minibatch_rows(jax.random.key(1), epochs, minibatches, [prompts], samples))
    assert order.shape == (epochs * minibatches, prompts * samples // minibatches)
    for epoch in order.reshape(epochs, -1):
        assert sorted(epoch) == list(range(prompts * samples))
    groups = order.reshape(epochs * minibatches, -1, samples) // samples
    assert (groups == groups[..., :1]).all()


def test_epochs_have_orders_of_their_own():
    epochs = np.asarray(minibatch_rows(jax.random.key(1), 3, 2, [16], 1)).reshape(3, -1)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def grouped(logprobs, advantages, mask, group):
    raise AssertionError("never called")


@pytest.mark.parametrize(
    ("update", "losses", "message"),
    [
        (Update(minibatches_per_epoch=3), [clipped_surrogate], "minibatches_per_epoch is 3, .*prompts_per_step 4"),
        (Update(sequences_per_microbatch=5), [clipped_surrogate], "sequences_per_microbatch is 5, .* 16 sequences"),
        (Update(minibatches_per_epoch=2, sequences_per_microbatch=16), [clipped_surrogate], "the 8 sequences"),
        (Update(sequences_per_microbatch=2), [clipped_surrogate, grouped], "'grouped' compares .*samples_per_prompt 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(bigram, update, losses, message):
    with pytest.raises(ValueError, match=message):
        checked_split(composed(bigram, losses, update, samples=4), 4)


@pytest.mark.parametrize(
    ("update", "losses", "microbatches"),
    [
        (Update(), [grouped], 1),
        (Update(sequences_per_microbatch=4), [grouped], 4),
        (Update(sequences_per_microbatch=8, minibatches_per_epoch=2), [grouped], 1),
        (Update(sequences_per_microbatch=1), [clipped_surrogate], 16),
    ],
)
def test_sizes_that_fit(bigram, update, losses, microbatches):
    assert checked_split(composed(bigram, losses, update, samples=4), 4) == microbatches


def test_written_rows_divide_as_the_sampled_ones_do(bigram):
    with pytest.raises(ValueError, match=r"minibatches_per_epoch is 2, .* number of groups of written rows 3"):
        checked_split(composed(bigram, [clipped_surrogate], Update(minibatches_per_epoch=2), written=Written(6, 2)), 4)
    with pytest.raises(ValueError, match=r"the 14 sequences .*4 prompts x 2 samples and 6 written rows"):
        checked_split(
            composed(bigram, [clipped_surrogate], Update(sequences_per_microbatch=4), written=Written(6, 2)), 4
        )


def test_every_minibatch_has_its_share_of_each_part():
    order = np.asarray(minibatch_rows(jax.random.key(0), 2, 2, [4, 2], 3))
    assert order.shape == (4, 9)
    assert ((order < 12).sum(1) == 6).all()
    for epoch in order.reshape(2, -1):
        assert sorted(epoch.tolist()) == list(range(18))
