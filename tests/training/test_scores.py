"""What networks say of rows before the update: computed where it is asked for, a piece at a time, of views too."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import losses
from jaxrl_llm.experience import Sequences
from jaxrl_llm.models.logprobs import scaled_log_softmax, token_statistics
from jaxrl_llm.rollout.generation import generate
from jaxrl_llm.training import Fill, Network, Resources, Rollout, Update
from jaxrl_llm.training.composition import composition_of
from jaxrl_llm.training.initial import initial_state
from jaxrl_llm.training.scores import by_microbatch, hidden_states, over_vocabulary, viewed


def composed(model, names=(), views=None, networks=None, temperature=1.0, size=None):
    """A composition that is not checked, with networks and views for these names."""
    rollout = Rollout(
        samples_per_prompt=2, max_completion_tokens=6, eos_ids=(2,), pad_id=0, temperature=temperature
    )  # fmt: skip
    resources = Resources(views=views or {}, networks=networks or {}, critic=optax.sgd(0.1))
    # What is asked for brings the networks along.
    asked = eval(f"lambda {', '.join(names)}: 0")
    update = Update(sequences_per_microbatch=size)
    return composition_of(model, optax.sgd(0.1), rollout, [], [("rewards", asked)], [], update, resources)


def said(model, rows, names, *, own_samples=False, params=None, **options):
    """rows -> everything of these names, by one compiled program."""
    c = composed(model, names, **options)

    @jax.jit
    def all_of_them(rows):
        state = initial_state(c, jax.random.key(0), params)
        return viewed(c, state, rows, frozenset(names), own_samples=own_samples)

    return all_of_them(rows)


# ---- pieces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, calls", [(None, (8,)), (2, (2,)), (8, (8,)), (3, (8,))])
def test_rows_come_back_in_their_order_whatever_the_size_of_a_piece(bigram, rows, size, calls):
    params, seen = bigram.init(jax.random.key(0)), []

    def scored(part):
        seen.append(part.tokens.shape[0])
        hidden = hidden_states(bigram, params, part)
        return part.filled(reference_logprobs=token_statistics(bigram, params, hidden, part.tokens).logprobs)

    whole = jax.jit(scored)(rows)
    seen.clear()
    pieces = jax.jit(lambda rows: by_microbatch(scored, rows, size))(rows)
    assert tuple(dict.fromkeys(seen)) == calls
    np.testing.assert_allclose(pieces["reference_logprobs"], whole["reference_logprobs"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(pieces.tokens, rows.tokens)
    np.testing.assert_array_equal(pieces.group, rows.group)
    assert float(jnp.abs(whole["reference_logprobs"]).min(axis=1).max()) > 0


# ---- what costs a pass ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted, own_samples, passes",
    [
        (set(), True, 0),
        ({"old_logprobs", "old_entropy"}, True, 0),
        ({"old_logprobs"}, False, 1),
        ({"old_logprobs", "old_entropy", "hidden"}, False, 1),
        ({"reference_logprobs"}, True, 1),
        ({"reference_logprobs", "reference_entropy"}, True, 1),
        ({"reference_logprobs", "old_logprobs"}, False, 2),
        ({"old_values"}, True, 1),
        ({"old_twin_values", "old_values"}, True, 2),
        ({"hidden", "old_logprobs"}, True, 1),
        ({"baseline_rewards", "demonstration_tokens"}, False, 0),
        ({"same_logprobs", "same_entropy", "same_mask"}, False, 1),
        ({"reference_same_logprobs", "same_logprobs"}, False, 2),
    ],
)
def test_what_the_sampler_recorded_needs_no_pass_and_what_belongs_together_takes_one(
    bigram, rows, wanted, own_samples, passes
):
    read = []

    def apply(params, tokens, positions, cache):
        if tokens.shape[0] == rows.tokens.shape[0] and tokens.shape[1] > 1:
            read.append(tokens.shape)
        return bigram.apply(params, tokens, positions, cache)

    counted = bigram._replace(apply=apply)
    c = composed(counted, sorted(wanted), views={"same": itself})
    state = jax.eval_shape(partial(initial_state, c), jax.random.key(0))
    read.clear()
    jax.eval_shape(lambda state, rows: viewed(c, state, rows, wanted, own_samples=own_samples), state, rows)
    # One pass reads the prompts, and then what follows them.
    assert len(read) in (passes, 2 * passes)


# ---- what they say --------------------------------------------------------------------------------------------------


def test_teacher_forcing_repeats_the_sampler(model, make_prompts):
    params = jax.jit(model.init)(jax.random.key(0))
    sizes = dict(samples_per_prompt=2, max_completion_tokens=6, eos_ids=(2,), pad_id=0)
    sample = jax.jit(lambda params: generate(model, params, make_prompts(4), jax.random.key(1), 0, **sizes))
    sampled = sample(params)
    names = ["old_logprobs", "old_entropy", "hidden", "prompt_logprobs", "prompt_mask"]
    seen = said(model, sampled, names, params=params)
    np.testing.assert_allclose(seen["old_logprobs"], sampled.behaviour_logprobs, atol=1e-5)
    np.testing.assert_allclose(seen["old_entropy"], sampled.behaviour_entropy, atol=1e-5)
    scored = jax.jit(lambda hidden: token_statistics(model, params, hidden, sampled.tokens).logprobs)(seen["hidden"])
    np.testing.assert_allclose(scored * sampled.mask, sampled.behaviour_logprobs, atol=1e-5)
    # A prompt is predicted from its second token on.
    np.testing.assert_array_equal(seen["prompt_mask"].sum(1), sampled.prompt_length - 1)
    assert (np.asarray(seen["prompt_logprobs"])[np.asarray(seen["prompt_mask"]) > 0] < 0).all()


def test_a_credit_function_over_the_vocabulary_sees_whole_distributions(bigram, rows):
    params = bigram.init(jax.random.key(0))
    term = Fill("proxy_logprobs", partial(losses.min_p_logprobs, min_p=0.05), "min_p")
    got = over_vocabulary(bigram, params, rows, [term], temperature=1.0)[0]
    log_p = scaled_log_softmax(bigram.logits(params, hidden_states(bigram, params, rows)), 1.0)
    np.testing.assert_allclose(got, losses.min_p_logprobs(log_p, rows.tokens, min_p=0.05), atol=1e-5)


def itself(prompt_tokens, prompt_length, tokens, length, mask):
    """The view that is the row."""
    return Sequences(prompt_tokens, prompt_length, tokens, length, mask)


def continued(prompt_tokens, prompt_length, tokens, length):
    """The first token of the completion behind the prompt, and the rest of it."""
    return Sequences(
        jnp.concatenate([prompt_tokens, tokens[:, :1]], 1),
        prompt_length + 1,
        tokens[:, 1:],
        length - 1,
        (jnp.arange(1, tokens.shape[1]) < length[:, None]).astype(jnp.float32),
    )


def test_a_view_is_scored_as_the_same_sequence_would_be(model, rows):
    networks = {"slow": Network(decay=0.5), "sharp": Network(temperature=0.5)}
    names = ["logprobs", "entropy", "reference_logprobs", "slow_logprobs", "sharp_logprobs", "values"]
    direct = said(
        model, rows, [*(f"old_{name}" for name in ("logprobs", "entropy", "values")), *names[2:5]], networks=networks
    )
    views = {"same": itself, "rest": continued}
    asked = ["same_logprobs", "same_entropy", "reference_same_logprobs", "slow_same_logprobs", "sharp_same_logprobs"]
    asked += ["value_same_values", "rest_logprobs", "reference_rest_logprobs", "same_mask", "rest_mask"]
    seen = said(model, rows, asked, networks=networks, views=views)
    inside = np.asarray(rows.mask) > 0
    pairs = {"same_logprobs": "old_logprobs", "same_entropy": "old_entropy", "value_same_values": "old_values"}
    pairs |= {f"{name}_same_logprobs": f"{name}_logprobs" for name in ("reference", "slow", "sharp")}
    for of_view, of_row in pairs.items():
        np.testing.assert_allclose(
            np.asarray(seen[of_view])[inside], np.asarray(direct[of_row])[inside], atol=1e-5, err_msg=of_view
        )
    np.testing.assert_array_equal(seen["same_mask"], rows.mask)
    # Where a sequence is cut changes nothing of what is said behind the cut.
    later = inside[:, 1:]
    np.testing.assert_array_equal(np.asarray(seen["rest_mask"]) > 0, later)
    for of_view, of_row in (("rest_logprobs", "old_logprobs"), ("reference_rest_logprobs", "reference_logprobs")):
        np.testing.assert_allclose(
            np.asarray(seen[of_view])[later], np.asarray(direct[of_row])[:, 1:][later], atol=1e-5, err_msg=of_view
        )
    assert np.abs(np.asarray(direct["sharp_logprobs"] - direct["old_logprobs"])[inside]).max() > 0.1


def test_what_is_known_is_left_alone_and_the_rest_is_filled(bigram, rows):
    known = rows.filled(old_logprobs=jnp.full(rows.tokens.shape, -9.0))
    seen = said(bigram, known, ["old_logprobs", "reference_logprobs"])
    np.testing.assert_array_equal(seen["old_logprobs"], -9.0)
    assert "reference_logprobs" in seen
    assert "reference_logprobs" not in known


@pytest.mark.parametrize("size", [2, 4])
def test_pieces_say_the_same_as_all_rows_at_once(bigram, rows, size):
    names = ["old_logprobs", "reference_entropy", "old_values", "same_logprobs", "prompt_logprobs"]
    whole, pieces = (said(bigram, rows, names, views={"same": itself}, size=one) for one in (None, size))
    for name in names:
        np.testing.assert_allclose(pieces[name], whole[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_absent_rows_are_scored_like_others(bigram, rows):
    seen = said(bigram, replace(rows, weight=jnp.zeros(8)), ["old_logprobs"], temperature=0.7)
    table = np.asarray(jax.nn.log_softmax(bigram.init(jax.random.fold_in(jax.random.key(0), 0))["scores"] / 0.7, -1))
    previous = np.concatenate([rows.prompt_tokens[:, -1:], rows.tokens[:, :-1]], 1)
    np.testing.assert_allclose(seen["old_logprobs"], table[previous, rows.tokens] * rows.mask, atol=1e-5)
