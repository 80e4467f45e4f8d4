"""Passes of the size that a batch needs: packed or trimmed rows give the losses and gradients of padded ones."""

from __future__ import annotations

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.losses import clipped_surrogate, divergence, entropy_bonus, kl_estimate, negative_log_likelihood
from jaxrl_llm.models.decoder import transformer
from jaxrl_llm.models.experts import ExpertsConfig
from jaxrl_llm.models.layer_kinds import DeltaConfig, LatentConfig
from jaxrl_llm.models.transformer_config import TransformerConfig
from jaxrl_llm.rollout.packed_rows import best_fit, bins_of
from jaxrl_llm.training import Rollout, Update
from jaxrl_llm.training.checks import checked
from jaxrl_llm.training.composition import composition_of
from jaxrl_llm.training.initial import initial_state
from jaxrl_llm.training.learn import Objective, gradient, parts_of
from jaxrl_llm.training.passes import at_smallest_size, bin_counts
from jaxrl_llm.training.scores import viewed

PLAIN = dict(vocabulary_size=16, width=16, layers=1, heads=2, kv_heads=1)
MODELS = {
    "plain": PLAIN,
    "window, sinks": PLAIN | {"window": 3, "attention_sinks": True},
    "xla": PLAIN | {"attention": "xla"},
    "latent": PLAIN
    | {
        "kv_heads": 2,
        "head_width": 4,
        "qk_norm": False,
        "latent": LatentConfig(rank=8, plain_width=8, rope_width=4, value_width=8),
    },
    "delta": PLAIN | {"layers": 2, "delta": DeltaConfig(2, 2, 4, 4, kernel=3, pattern=(True, False))},
    "experts": PLAIN | {"experts": ExpertsConfig(4, 2)},
}


def composed(model, update: Update = Update(), losses=(clipped_surrogate,)):  # noqa: B008
    rollout = Rollout(samples_per_prompt=2, max_completion_tokens=6, eos_ids=(2,), pad_id=0)
    return composition_of(model, optax.sgd(0.1), rollout, [], [], losses, update, None)


@pytest.fixture(scope="module")
def short(rows):
    """Rows that two fifths as many bins hold, with prompts of several lengths, one absent."""
    rng = np.random.default_rng(3)
    length = jnp.asarray([6, 1, 1, 2, 3, 1, 1, 1], jnp.int32)
    inside = jnp.arange(6) < length[:, None]
    return replace(
        rows,
        prompt_length=jnp.asarray([4, 1, 2, 1, 3, 1, 1, 2], jnp.int32),
        length=length,
        mask=rows.mask * inside,
        weight=rows.weight.at[3].set(0.0),
    ).filled(
        advantages=jnp.asarray(rng.normal(size=(8, 6)), jnp.float32),
        old_logprobs=rows.behaviour_logprobs,
        reference_logprobs=rows.behaviour_logprobs - 0.1,
    )


LOSSES = (clipped_surrogate, entropy_bonus, kl_estimate, divergence(samples="vocabulary", generator="reverse_kl"))


def of_update(model, params, rows, update: Update, losses=LOSSES):
    """Gradients and numbers of an update on rows."""
    c = composed(model, update, losses)
    state, objective = initial_state(c, jax.random.key(0), params), Objective(c, c.losses)

    def run(state, rows):
        return gradient(objective, None, parts_of(c, state), state, rows, [1.0] * len(losses))

    return jax.jit(run)(state, rows)


def same(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "plain" else pytest.mark.slow) for kind in MODELS]
)
def test_packed_rows_have_the_losses_and_gradients_of_padded_ones(short, kind):
    model = transformer(TransformerConfig(**MODELS[kind]))
    params, losses = model.init(jax.random.key(1)), LOSSES[::3] if kind == "plain" else LOSSES[:1]
    padded = of_update(model, params, short, Update(), losses)
    same(of_update(model, params, short, Update(packing=(0.5,)), losses), padded)


@pytest.mark.slow
def test_microbatches_are_packed_and_trimmed_each_to_its_own_size(short):
    model = transformer(TransformerConfig(**PLAIN))
    params = model.init(jax.random.key(1))
    padded = of_update(model, params, short, Update())
    same(of_update(model, params, short, Update(sequences_per_microbatch=4, packing=(0.25, 0.5))), padded)
    cut = replace(short, length=jnp.minimum(short.length, 3), mask=short.mask * (jnp.arange(6) < 3))
    trimmed = of_update(model, params, cut, Update(sequences_per_microbatch=4, completion_buckets=(2, 3, 5)))
    same(trimmed, of_update(model, params, cut, Update()))


def test_the_smallest_size_is_taken(short):
    def seen(rows, size):
        whole = 100
        return jnp.float32(whole if size is None else size if isinstance(size, int) else len(size.token))

    def taken(update, **changes):
        return float(at_smallest_size(update, replace(short, **changes), seen))

    buckets, packing = Update(completion_buckets=(2, 4)), Update(packing=(0.25, 0.5, 0.75))
    assert [taken(buckets, length=short.length.at[0].set(n)) for n in (1, 4, 5)] == [4, 4, 100]
    # 31 tokens in bins of 10: four; with every row full, eight rows are their own bins.
    assert taken(packing) == 4
    assert taken(packing, length=jnp.full(8, 6), prompt_length=jnp.full(8, 4)) == 100


def test_scores_of_networks_are_packed_too(short):
    model = transformer(TransformerConfig(**PLAIN))
    rows = short
    wanted = {"old_logprobs", "old_entropy", "hidden"}

    def said(update):
        c = composed(model, update, LOSSES)
        state = initial_state(c, jax.random.key(0), model.init(jax.random.key(1)))
        bare = replace(rows, fields={})
        scored = viewed(c, state, bare, wanted | {"reference_logprobs"}, own_samples=False)
        inside = jnp.arange(6) < rows.length[:, None]
        return {n: jnp.where(inside if scored[n].ndim == 2 else inside[..., None], scored[n], 0) for n in scored.fields}

    padded = jax.jit(lambda: said(Update()))()
    assert padded.keys() == wanted | {"reference_logprobs"}
    same(jax.jit(lambda: said(Update(packing=(0.5,))))(), padded)


def test_every_row_finds_its_place():
    # The worked example of the card: 5 3 7 2 4 1 into bins of 8, and rows of 2 and 3 tokens into one of 6.
    plan = best_fit(jnp.asarray([5, 3, 7, 2, 4, 1]), 8)
    assert [sorted(np.flatnonzero(plan.bin == b)) for b in range(int(plan.used))] == [[2, 5], [0, 1], [3, 4]]
    bins = bins_of(best_fit(jnp.asarray([2, 3]), 6), jnp.asarray([1, 2]), jnp.asarray([1, 1]), 3, 3, 1)
    assert bins.positions.tolist() == [[0, 1, 2, 0, 1, -1]]
    assert bins.segments.tolist() == [[1, 1, 1, 0, 0, 2]]
    rows = jnp.arange(12).reshape(2, 6)
    real = bins.slot < 6
    assert (bins.taken(bins.put(rows)) == jnp.where(real, rows, 0)).all()


@pytest.mark.parametrize("seed", range(3))
def test_bins_hold_what_they_can_and_rows_do_not_overlap(seed):
    rng = np.random.default_rng(seed)
    length = rng.integers(1, 17, 24)
    plan = best_fit(jnp.asarray(length), 16)
    held = {
        b: sorted((int(o), int(o + n)) for o, n, at in zip(plan.offset, length, plan.bin, strict=True) if at == b)
        for b in range(int(plan.used))
    }
    for places in held.values():
        assert places[0][0] == 0
        assert places[-1][1] <= 16
        assert all(end == start for (_, end), (start, _) in itertools.pairwise(places))
    # No two bins could be one.
    filled = sorted(places[-1][1] for places in held.values())
    assert len(filled) < 2 or filled[0] + filled[1] > 16


def test_numbers_of_bins_are_shares_of_the_rows():
    assert bin_counts(16, (0.5, 0.25, 1.0)) == [4, 8]
    assert bin_counts(1, (0.5,)) == []


def test_what_cannot_be_packed_is_refused(make_bigram):
    with pytest.raises(
        ValueError, match=r"training.packing is set, but the model of the policy does not support segments"
    ):
        checked(composed(make_bigram(16), Update(packing=(0.5,)), [negative_log_likelihood]))
    with pytest.raises(ValueError, match=r"training.packing and training.completion_buckets are both set"):
        Update(packing=(0.5,), completion_buckets=(4,))
    model = transformer(TransformerConfig(**PLAIN))
    params, ids = model.init(jax.random.key(0)), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="segments were given with a cache"):
        model.apply(params, ids, ids, model.init_cache(1, 2), segments=ids)
