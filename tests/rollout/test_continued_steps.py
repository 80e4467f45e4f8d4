"""Continuations from behind each step: exact labels on a small chain, and one pass over each completion."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import losses, rewards
from jaxrl_llm.experience import Prompts, Source
from jaxrl_llm.models import TransformerConfig, transformer
from jaxrl_llm.models.heads import HeadConfig
from jaxrl_llm.rollout import Prefixes, generate, plans
from jaxrl_llm.signatures import on_host
from jaxrl_llm.training import Network, Resources, Rollout, make_train_step

EOS, RIGHT, WRONG, SURE, OPEN, START = 2, 6, 7, 4, 5, 9
WIDTH, SAMPLES, CONTINUATIONS = 4, 32, 16


def chain(make_bigram):
    """START -> SURE or OPEN, evenly; SURE -> RIGHT, OPEN -> RIGHT or WRONG, evenly; then the end."""
    table = np.full((10, 10), -1e9, np.float32)
    for origin, targets in {
        START: (SURE, OPEN),
        SURE: (RIGHT,),
        OPEN: (RIGHT, WRONG),
        RIGHT: (EOS,),
        WRONG: (EOS,),
    }.items():
        table[origin, list(targets)] = 0.0
    table[[0, 1, EOS, 3, 8]] = 0.0
    return make_bigram(10)._replace(init=lambda key: {"scores": jnp.asarray(table)})


def right(tokens):
    return (tokens[:, 1] == RIGHT).astype(jnp.float32)


def a_token_a_step(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


def one_step(tokens):
    return jnp.zeros(tokens.shape, jnp.int32)


def prompts(count=2):
    number = jnp.arange(count, dtype=jnp.int32)
    return Prompts(jnp.full((count, 1), START), number * 0 + 1, number, number[:, None], number * 0 + 1)


def labelled(model, steps, *, form="soft", width=WIDTH, turns=3, decode=None):
    plan = plans.continued_steps(
        plans.plain(samples_per_prompt=SAMPLES),
        choose=steps,
        samples_per_prompt=SAMPLES,
        max_turns=turns,
        continuations=CONTINUATIONS,
    )
    step = make_train_step(
        model,
        optax.sgd(0.1),
        source=Rollout(samples_per_prompt=SAMPLES, max_completion_tokens=width, eos_ids=(EOS,), pad_id=0, plan=plan),
        rewards=[right],
        credit=[
            *([] if on_host(steps) else [("turn", steps)]),
            ("turn_labels", partial(rewards.continuation_labels, form=form)),
            ("step_labels", rewards.labels_at_ends),
        ],
        losses=[losses.step_label_likelihood],
        resources=Resources(networks={"process": Network(head=HeadConfig(), optimizer=optax.sgd(1.0))}, decode=decode),
    )
    state, metrics, rows = step.run(step.init(jax.random.key(0)), prompts())
    return state, metrics, jax.device_get(rows)


def test_labels_of_a_chain_are_its_chances(make_bigram):
    state, metrics, rows = labelled(chain(make_bigram), a_token_a_step)
    first, second = rows.tokens[:, 0], rows.tokens[:, 1]
    labels = rows["turn_labels"]
    assert rows.tokens.shape == (2 * SAMPLES, WIDTH)  # continuations are not learned from
    assert set(first) == {SURE, OPEN}
    np.testing.assert_array_equal(labels[first == SURE, 0], 1.0)
    assert abs(labels[first == OPEN, 0].mean() - 0.5) < 0.05  # some 500 draws
    np.testing.assert_array_equal(labels[:, 1], second == RIGHT)
    np.testing.assert_array_equal(labels[:, 2], second == RIGHT)  # of the end: the completion itself
    np.testing.assert_array_equal(rows["step_labels"][:, :3], labels)
    assert np.isnan(rows["step_labels"][:, 3]).all()
    # Two tokens are drawn behind the first step, one behind the second, none behind the end.
    np.testing.assert_allclose(metrics["continued_tokens"], CONTINUATIONS * (2 + 1))
    assert float(jnp.abs(state.networks["process"].params["head"]["weight"]).sum()) > 0


@pytest.mark.slow
def test_steps_may_be_read_from_the_text_of_completions(make_bigram):
    def a_word_a_step(completions, length):
        assert [len(text.split()) for text in completions] == length.tolist()
        return [np.arange(count) for count in length]

    decode = lambda ids: " ".join(map(str, ids))  # noqa: E731
    _, metrics, read = labelled(chain(make_bigram), a_word_a_step, decode=decode)
    _, same, rows = labelled(chain(make_bigram), a_token_a_step)
    for name in ("successes", "continuations", "turn_labels"):
        np.testing.assert_array_equal(read[name], rows[name])
    inside = np.arange(WIDTH) < read.length[:, None]
    np.testing.assert_array_equal(read["turn"][inside], rows["turn"][inside])
    assert metrics["continued_tokens"] == same["continued_tokens"]
    assert metrics["seconds/turn"] >= 0
    with pytest.raises(ValueError, match=r"'turn' of rollout.plan reads text, so make_train_step needs decode="):
        labelled(chain(make_bigram), a_word_a_step)


@pytest.mark.slow
def test_hard_labels_and_completions_without_a_border_or_cut_off(make_bigram):
    _, metrics, rows = labelled(chain(make_bigram), one_step, form="hard")
    np.testing.assert_array_equal(rows["turn_labels"][:, 0], rows["correct"])  # one step: the verdict
    assert np.isnan(rows["turn_labels"][:, 1:]).all()
    assert metrics["continued_tokens"] == 0
    _, _, hard = labelled(chain(make_bigram), a_token_a_step, form="hard", turns=1)
    np.testing.assert_array_equal(hard["turn_labels"][:, 0], 1.0)  # one of sixteen is right from either
    _, _, cut = labelled(chain(make_bigram), a_token_a_step, width=2)
    assert cut.truncated.all()
    np.testing.assert_array_equal(cut["turn_labels"][:, 1], cut["correct"])  # nothing can follow


# ---- one pass over each completion ----------------------------------------------------------------------------------

MODEL = transformer(TransformerConfig(11, width=16, layers=2, heads=4, kv_heads=2, window=6, layer_loop="unrolled"))
GIVEN = Prompts(
    jnp.array([[0, 3, 4], [5, 6, 7]]),
    jnp.array([2, 3]),
    jnp.arange(2),
    jnp.zeros((2, 1), jnp.int32),
    jnp.ones(2, jnp.int32),
)
SHARED = Prefixes(
    jnp.array([[3, 4, 5, 6], [7, 8, 9, EOS], [3, 3, 8, 9], [4, 5, 6, 7]]),
    jnp.array([1, 4, 2, 4, 0, 2, 4, 1, 3, 2, 2, 1]),  # three go on from each
    jnp.full((4, 4), Source.HINT, jnp.int8),
)


def continued(model, params, prefixes=SHARED):
    return generate(
        model,
        params,
        GIVEN,
        jax.random.key(1),
        0,
        samples_per_prompt=6,
        max_completion_tokens=8,
        eos_ids=(EOS,),
        pad_id=0,
        prefixes=prefixes,
    )


def copies(model):
    return model._replace(cut_cache=None)


def test_samples_go_on_from_different_places_of_what_they_share():
    params = MODEL.init(jax.random.key(0))
    ours, theirs = (jax.device_get(jax.jit(partial(continued, model))(params)) for model in (MODEL, copies(MODEL)))
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    for name in ("length", "source", "mask", "truncated", "sample", "group"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    np.testing.assert_allclose(ours.behaviour_logprobs, theirs.behaviour_logprobs, atol=1e-5)
    np.testing.assert_allclose(ours.behaviour_entropy, theirs.behaviour_entropy, atol=1e-5)
    kept = np.asarray(SHARED.length)
    np.testing.assert_array_equal((ours.source == Source.HINT).sum(1), kept)
    np.testing.assert_array_equal(ours.length, kept + (ours.mask > 0).sum(1))
    assert ours.length[3] == 4  # a whole completion: nothing is drawn behind its end


def test_a_prefix_is_gone_through_once():
    seen = []

    def counted(params, tokens, positions, cache):
        seen.append(tokens.shape)
        return MODEL.apply(params, tokens, positions, cache)

    params = jax.eval_shape(MODEL.init, jax.random.key(0))
    flops = {}
    for name, model in (("shared", MODEL), ("copies", copies(MODEL))):
        seen.clear()
        lowered = jax.jit(partial(continued, model._replace(apply=counted))).lower(params)
        flops[name] = lowered.cost_analysis()["flops"]
        wide = [shape for shape in seen if shape[1] > 1]
        # Prompts, then four prefixes of four tokens; or twelve of them, each a copy.
        assert wide == ([(2, 3), (4, 4)] if name == "shared" else [(2, 3), (12, 5)])
    assert flops["shared"] < 0.8 * flops["copies"]


def test_what_cannot_be_shared_out_is_refused():
    params = jax.eval_shape(MODEL.init, jax.random.key(0))
    uneven = Prefixes(SHARED.tokens[:3], SHARED.length, SHARED.source[:3])
    with pytest.raises(ValueError, match=r"prefixes.tokens has 3 rows .* 12 completions of 2 prompts"):
        jax.eval_shape(lambda: continued(MODEL, params, uneven))
    inner = plans.refill(plans.plain(samples_per_prompt=2), samples_per_prompt=2)
    with pytest.raises(ValueError, match="continued_steps needs rows sampled in one round"):
        plans.continued_steps(inner, choose=one_step, samples_per_prompt=2, max_turns=2)
