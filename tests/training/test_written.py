"""Steps whose rows were all written: supervised learning, pairs, and what such a step refuses."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import losses
from jaxrl_llm.experience import Loss, Source
from jaxrl_llm.models.heads import HeadConfig
from jaxrl_llm.rows import Written, demonstrations, written_rows
from jaxrl_llm.training import Network, Resources, Update, make_train_step

KEY = jax.random.key(0)


def composed(model, loss, source=None, networks=None, optimizer=None, **changes):
    return make_train_step(
        model,
        optimizer or optax.sgd(1.0),
        source=source or Written(8),
        losses=[loss],
        resources=Resources(networks=networks or {}),
        **changes,
    )


@pytest.fixture(scope="module")
def written(rows):
    """The eight completions, of which what is odd is learned from, in pairs."""
    return written_rows(
        rows.prompt_tokens, rows.prompt_length, rows.prompt_id, rows.tokens, rows.length,
        answer_width=2, rows_per_group=2, alone=True, trained=(rows.tokens % 2).astype(jnp.float32),
        preferred=jnp.asarray([1.0, 0.0] * 4),
    )  # fmt: skip


def score(params, rows):
    """Log-probabilities of the tokens of rows under a table, and its rows that are read."""
    table = jax.nn.log_softmax(params["scores"], axis=-1)
    previous = jnp.concatenate([rows.prompt_tokens[:, -1:], rows.tokens[:, :-1]], 1)
    return table[previous, rows.tokens]


def host(tree):
    return jax.tree.map(np.array, tree)


# ---- supervised -----------------------------------------------------------------------------------------------------


def test_written_rows_know_what_is_learned_from(rows, written):
    inside = np.asarray(rows.mask) > 0
    odd = inside & (np.asarray(rows.tokens) % 2 == 1)
    np.testing.assert_array_equal(written["written_mask"], odd)
    np.testing.assert_array_equal(written.mask, odd)
    np.testing.assert_array_equal(written.group, np.arange(8) // 2)
    np.testing.assert_array_equal(written.sample, np.arange(8) % 2)
    np.testing.assert_array_equal(np.asarray(written.source) == Source.DEMONSTRATION, inside)
    beside = written_rows(
        rows.prompt_tokens, rows.prompt_length, rows.prompt_id, rows.tokens, rows.length, answer_width=2
    )  # fmt: skip
    np.testing.assert_array_equal(beside["written_mask"], inside)
    np.testing.assert_array_equal(beside.mask, 0)


@pytest.mark.parametrize("size", [None, 2])
def test_a_supervised_step_goes_down_the_slope_of_the_likelihood(bigram, written, size):
    step = composed(bigram, losses.negative_log_likelihood, update=Update(sequences_per_microbatch=size))
    assert len(step.programs) == 1
    assert step.priming == ()
    state = step.init(KEY)
    before = host(state.params)

    def by_hand(params):
        return -(score(params, written) * written["written_mask"]).sum() / written["written_mask"].sum()

    value, slope = jax.value_and_grad(by_hand)(before)
    state, metrics, seen = step.run(state, written=written)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(state.params["scores"], before["scores"] - slope["scores"], atol=1e-6)
    assert int(state.step) == 1
    assert metrics.keys() == {"loss", "loss/negative_log_likelihood", "gradient_norm", "parameter_norm"}
    np.testing.assert_array_equal(seen.tokens, written.tokens)


def test_rows_of_a_batch_of_demonstrations_are_the_rows_of_a_step(bigram, rows):
    names = ("prompt_tokens", "prompt_length", "prompt_id", "tokens", "length", "source", "weight", "mask")
    batch = SimpleNamespace(**{name: np.asarray(rows[name]) for name in names}, turn=np.zeros((8, 6), np.int32))
    step = composed(bigram, losses.negative_log_likelihood, optimizer=optax.adam(0.3))
    state, seen = step.init(KEY), []
    for _ in range(5):
        state, metrics = step(state, written=demonstrations(batch))
        seen.append(float(metrics["loss"]))
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] < seen[0] - 0.5


def test_a_loss_of_a_network_is_as_of_rows_that_were_sampled(bigram, written):
    """Distillation from another network on rows that somebody wrote."""

    def towards(logprobs, teacher_logprobs, mask):
        return Loss((jnp.square(logprobs - teacher_logprobs) * mask).sum(), mask.sum())

    networks = {"teacher": Network(origin="given", model=bigram)}
    step = composed(bigram, towards, networks=networks)
    teacher = {"scores": jnp.eye(16)}
    state = step.init(KEY, None, {"teacher": teacher})
    expected = jnp.square(score(state.params, written) - score(teacher, written)) * written.mask
    _, metrics = step(state, written=written)
    np.testing.assert_allclose(metrics["loss"], expected.sum() / written.mask.sum(), rtol=1e-5)


# ---- pairs ----------------------------------------------------------------------------------------------------------

PAIRS = Written(8, rows_per_group=2, provides=frozenset({"preferred"}))


def test_a_preference_loss_over_pairs_prefers_the_preferred(bigram, written):
    step = composed(bigram, partial(losses.dpo, beta=0.5), PAIRS)
    assert step.composition.samples == 2
    assert step.composition.wanted == {"reference_logprobs"}
    state = step.init(KEY)
    before = host(state.params)

    def by_hand(params):
        ratio = ((score(params, written) - score(before, written)) * written.mask).sum(1)
        return -jax.nn.log_sigmoid(0.5 * (ratio[::2] - ratio[1::2])).mean()

    value, slope = jax.value_and_grad(by_hand)(before)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    state, metrics = step(state, written=written)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(state.params["scores"], before["scores"] - slope["scores"], atol=1e-6)
    np.testing.assert_array_equal(state.networks["reference"].params["scores"], before["scores"])
    state, metrics = step(state, written=written)
    assert float(metrics["margin/dpo"]) > 0


def test_pairs_are_cut_into_minibatches_as_whole_groups(bigram, written):
    update = Update(minibatches_per_epoch=2, epochs_per_batch=2, sequences_per_microbatch=2)
    step = composed(bigram, losses.dpo, PAIRS, update=update, optimizer=optax.adam(0.1))
    state, metrics = step(step.init(KEY), written=written)
    assert int(state.networks["policy"].optimizer_state[0].count) == 4
    # Were a pair cut in two, it would be none, and the loss 0.
    assert 0.3 < float(metrics["loss"]) < np.log(2) + 1e-5


def better(reward_scores, group, preferred):
    """Bradley and Terry, of pairs that follow one another."""
    return Loss(-jax.nn.log_sigmoid(reward_scores[::2] - reward_scores[1::2]).sum(), jnp.float32(4.0))


def test_a_reward_model_alone_learns_from_pairs(bigram, written):
    networks = {"reward": Network(head=HeadConfig(), optimizer=optax.sgd(0.5))}
    step = composed(bigram, better, PAIRS, networks)
    assert step.composition.learning == {"reward"}
    state, seen = step.init(KEY), []
    policy = host(state.params)
    for _ in range(3):
        state, metrics = step(state, written=written)
        seen.append(float(metrics["loss"]))
    assert seen[0] > seen[1] > seen[2]
    np.testing.assert_array_equal(state.params["scores"], policy["scores"])
    assert not any(name in metrics for name in ("sampler_gap_max", "parameter_norm", "reward"))


# ---- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "source", "message"),
    [
        (losses.dpo, Written(8, 2), "names 'preferred', which nothing in this step provides; written rows provide it"),
        (losses.clipped_surrogate, Written(8), "names 'advantages', which nothing in this step provides"),
        (lambda logprobs, rewards: None, Written(8), "names 'rewards', which nothing in this step provides"),
    ],
)
def test_names_that_written_rows_do_not_know(bigram, loss, source, message):
    with pytest.raises(ValueError, match=message):
        composed(bigram, loss, source)


def test_the_number_of_rows_is_what_was_said(bigram, written, traced):
    with pytest.raises(ValueError, match="written has 8 rows, but this step was composed for 4"):
        traced(composed(bigram, losses.negative_log_likelihood, Written(4)), None, written)
    with pytest.raises(ValueError, match=r"trains on written rows: call step\(state, prompts, items, written\)"):
        traced(composed(bigram, losses.negative_log_likelihood))
    with pytest.raises(ValueError, match=r"has 6 written rows a step, which do not make groups of 4; take a multiple"):
        Written(6, 4)
    with pytest.raises(ValueError, match=r"minibatches_per_epoch is 3, which does not divide .* 4; "):
        traced(composed(bigram, losses.dpo, PAIRS, update=Update(minibatches_per_epoch=3)), None, written)
    with pytest.raises(ValueError, match=r"a microbatch must hold whole groups"):
        traced(composed(bigram, losses.dpo, PAIRS, update=Update(sequences_per_microbatch=1)), None, written)
