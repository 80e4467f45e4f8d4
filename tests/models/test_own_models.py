"""Users' models: functions and Linen modules that follow the protocol train; others are refused with the reason."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxrl_llm import advantages, losses
from jaxrl_llm.experience import Prompts
from jaxrl_llm.models import (
    TransformerConfig,
    abstract,
    check_model,
    from_functions,
    from_linen,
    initialise,
    logical_axes,
    parameter_count,
    transformer,
)
from jaxrl_llm.models.generic_cache import cache_axes, repeating
from jaxrl_llm.models.laws import LAWS
from jaxrl_llm.rollout import generate
from jaxrl_llm.training import Rollout, make_train_step

pytestmark = pytest.mark.slow

VOCABULARY, WIDTH = 13, 8


# ---- a recurrent model: its cache has no slots ----------------------------------------------------------------------


def recurrent_init(key):
    return {"table": jax.random.normal(key, (VOCABULARY, WIDTH)), "decay": jnp.full(WIDTH, 0.5)}


def recurrent_apply(params, tokens, positions, cache):
    def advance(state, column):
        token, position = column
        new = jnp.tanh(params["decay"] * state + params["table"][token])
        state = jnp.where(position[:, None] >= 0, new, state)
        return state, state

    state = jnp.zeros((tokens.shape[0], WIDTH)) if cache is None else cache
    state, hidden = jax.lax.scan(advance, state, (tokens.T, positions.T))
    return hidden.swapaxes(0, 1), None if cache is None else state


def tied_logits(params, hidden):
    return (hidden @ params["table"].T).astype(jnp.float32)


RECURRENT = dict(
    init=recurrent_init,
    apply=recurrent_apply,
    logits=tied_logits,
    vocabulary_size=VOCABULARY,
    init_cache=lambda rows, slots: jnp.zeros((rows, WIDTH)),
)


# ---- attention: a cache with slots ----------------------------------------------------------------------------------


class Seen(NamedTuple):
    """Embedded tokens in order, those in slots first."""

    embedded: Any
    positions: Any
    used: Any


def attention_init(key):
    return {"table": jax.random.normal(key, (VOCABULARY, WIDTH))}


def attention_cache(rows, slots):
    return Seen(jnp.zeros((slots, rows, WIDTH)), jnp.full((rows, slots), -1), jnp.int32(0))


def attention_apply(params, tokens, positions, cache, *, visible=lambda own, seen: (seen <= own) & (seen >= 0)):
    embedded = params["table"][tokens]
    # Positions are needed because attention ignores order.
    embedded = embedded + jnp.sin(positions[..., None] * jnp.arange(1, WIDTH + 1) / 3)
    keys, seen = embedded, positions
    if cache is not None:
        keys = jax.lax.dynamic_update_slice(cache.embedded, embedded.swapaxes(0, 1), (cache.used, 0, 0))
        seen = jax.lax.dynamic_update_slice(cache.positions, positions, (0, cache.used))
        cache = Seen(keys, seen, cache.used + tokens.shape[1])
        keys = keys.swapaxes(0, 1)
    scores = jnp.einsum("btd,bsd->bts", embedded, keys) / WIDTH
    scores = jnp.where(visible(positions[:, :, None], seen[:, None, :]), scores, -1e30)
    return embedded + jax.nn.softmax(scores) @ keys, cache


ATTENTION = dict(
    init=attention_init,
    apply=attention_apply,
    logits=tied_logits,
    vocabulary_size=VOCABULARY,
    init_cache=attention_cache,
)


# ---- the same as Linen modules --------------------------------------------------------------------------------------


class Network(nn.Module):
    """One attention layer, with names for the axes of its table."""

    vocabulary_size: int = VOCABULARY
    width: int = WIDTH

    def setup(self):
        named = nn.with_partitioning(nn.initializers.normal(1.0), ("vocabulary", "embed"))
        self.table = self.param("table", named, (self.vocabulary_size, self.width))
        self.out = nn.Dense(self.vocabulary_size)

    def __call__(self, tokens, positions, cache):
        return attention_apply({"table": self.table}, tokens, positions, cache)

    def logits(self, hidden):
        return self.out(hidden).astype(jnp.float32)

    def init_cache(self, rows, slots):
        return attention_cache(rows, slots)


class Uncached(nn.Module):
    """The same without a cache."""

    def setup(self):
        self.table = self.param("table", nn.initializers.normal(1.0), (VOCABULARY, WIDTH))

    def __call__(self, tokens, positions):
        return attention_apply({"table": self.table}, tokens, positions, None)[0]

    def logits(self, hidden):
        return tied_logits({"table": self.table}, hidden)


def built(name):
    if name == "recurrent":
        return from_functions(**RECURRENT)
    if name == "attention":
        return from_functions(**ATTENTION)
    if name == "attention, recomputed":
        recomputed = ATTENTION | {"init_cache": None, "apply": lambda p, t, at: attention_apply(p, t, at, None)[0]}
        return from_functions(**recomputed)
    if name == "linen":
        return from_linen(Network(), vocabulary_size=VOCABULARY)
    if name == "linen, recomputed":
        return from_linen(Uncached(), vocabulary_size=VOCABULARY)
    loop = name.removeprefix("transformer, ")
    return transformer(
        TransformerConfig(vocabulary_size=VOCABULARY, width=8, layers=2, heads=2, kv_heads=1, layer_loop=loop)
    )


MODELS = (
    "recurrent",
    "attention",
    "attention, recomputed",
    "linen",
    "linen, recomputed",
    "transformer, unrolled",
    "transformer, scanned",
)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return Prompts(
        tokens=rng.integers(3, VOCABULARY, (2, 5)).astype(np.int32),
        length=np.array([5, 3], np.int32),
        prompt_id=np.arange(2, dtype=np.int32),
        answer_tokens=np.full((2, 2), 5, np.int32),
        answer_length=np.ones(2, np.int32),
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_keeps_the_laws_passes(name):
    errors = check_model(built(name))
    assert errors.keys() == LAWS.keys()
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("name", ["recurrent", "linen", "linen, recomputed"])
def test_a_model_of_ones_own_learns(name, prompts):
    def fives(tokens, length):
        return (jnp.where(jnp.arange(tokens.shape[1]) < length[:, None], tokens == 5, False)).sum(1) / length

    model = built(name)
    step = make_train_step(
        model,
        optax.adam(0.1),
        source=Rollout(samples_per_prompt=16, max_completion_tokens=4, eos_ids=(1,), pad_id=0),
        rewards=[fives],
        credit=[("advantages", advantages.group_normalized)],
        losses=[losses.clipped_surrogate],
    )
    state, rewards = step.init(jax.random.key(0)), []
    for _ in range(12):
        state, metrics = step(state, prompts)
        rewards.append(float(metrics["reward"]))
        # Sampler and trainer are one function.
        assert float(metrics["sampler_gap_max"]) < 1e-4
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.3


def test_computing_everything_again_samples_what_a_cache_samples(prompts):
    drawn = []
    for name in ("attention", "attention, recomputed"):
        model = built(name)
        params = model.init(jax.random.key(0))
        sizes = dict(samples_per_prompt=3, max_completion_tokens=6, eos_ids=(1,), pad_id=0)
        drawn.append(generate(model, params, prompts, jax.random.key(1), 0, **sizes))
    np.testing.assert_array_equal(drawn[0].tokens, drawn[1].tokens)
    np.testing.assert_allclose(drawn[0].behaviour_logprobs, drawn[1].behaviour_logprobs, atol=1e-5)
    assert len(np.unique(drawn[0].tokens)) > 4


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["unrolled", "scanned"])
def test_the_derived_expansion_of_a_cache_samples_what_the_one_written_by_hand_samples(loop, prompts):
    model = built(f"transformer, {loop}")
    params = model.init(jax.random.key(0))
    sizes = dict(samples_per_prompt=3, max_completion_tokens=6, eos_ids=(1,), pad_id=0)

    def drawn(model):
        return generate(model, params, prompts, jax.random.key(1), 0, **sizes)

    # In the hand-written cache the samples share the prompt; in the derived one each has a copy.
    by_hand, derived = drawn(model), drawn(model._replace(expand_cache=repeating(model.init_cache)))
    np.testing.assert_array_equal(derived.tokens, by_hand.tokens)
    np.testing.assert_allclose(derived.behaviour_logprobs, by_hand.behaviour_logprobs, atol=1e-5)
    assert len(np.unique(by_hand.tokens)) > 4


def test_axes_of_a_cache_are_found_wherever_they_are():
    def init_cache(rows, slots):
        return {"a": jnp.zeros((3, slots + 2, rows)), "b": jnp.zeros((rows, 7)), "c": jnp.int32(0)}

    assert cache_axes(init_cache) == [(2, 1, 2), (0, None, 0), (None, None, 0)]
    cache = {"a": jnp.arange(3 * 3 * 2.0).reshape(3, 3, 2), "b": jnp.ones((2, 7)), "c": jnp.int32(4)}
    expanded = repeating(init_cache)(cache, 2, 5)
    assert jax.tree.map(jnp.shape, expanded) == {"a": (3, 8, 4), "b": (4, 7), "c": ()}
    np.testing.assert_array_equal(expanded["a"][:, :3], jnp.repeat(cache["a"], 2, axis=2))
    np.testing.assert_array_equal(expanded["a"][:, 3:], 0)
    assert int(expanded["c"]) == 4
    assert repeating(lambda rows, slots: ())((), 2, 5) == ()


@pytest.mark.parametrize(
    "init_cache",
    [
        lambda rows, slots: {"x": jnp.zeros((rows * slots, 2))},
        lambda rows, slots: {"x": jnp.zeros((rows, rows, slots))},
        lambda rows, slots: {"x": jnp.zeros((2 * rows, slots))},
        lambda rows, slots: {"x": jnp.zeros((rows, 2 * slots))},
        lambda rows, slots: {"x": jnp.zeros((rows + 1, slots))},
        lambda rows, slots: {"x": jnp.zeros((1,) * rows)},
    ],
)
def test_a_cache_whose_axes_cannot_be_told_needs_its_own_expansion(init_cache):
    with pytest.raises(ValueError, match=r"init_cache gives \['x'\] the shape .* lay it out so, or give expand_cache"):
        cache_axes(init_cache)


def test_the_parameters_are_described():
    functions, module = built("attention"), built("linen")
    assert parameter_count(functions.specs) == VOCABULARY * WIDTH
    assert logical_axes(functions.specs) == {"table": (None, None)}
    assert logical_axes(module.specs) == {
        "out": {"bias": (None,), "kernel": (None, None)},
        "table": ("vocabulary", "embed"),
    }
    params = module.init(jax.random.key(0))
    assert jax.tree.structure(abstract(module.specs)) == jax.tree.structure(params)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), abstract(module.specs)) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), params
    )
    assert all(math.isnan(spec.scale) for spec in jax.tree.leaves(module.specs, is_leaf=lambda x: hasattr(x, "scale")))
    with pytest.raises(ValueError, match=r"\['table'\] has no initialiser .* use the model's init function"):
        initialise(functions.specs, jax.random.key(0))
    named = from_functions(**ATTENTION, axes={"table": ("vocabulary", None)})
    assert logical_axes(named.specs) == {"table": ("vocabulary", None)}
    with pytest.raises(ValueError, match=r"\['table'\] has the shape \(13, 8\), but the axes \('embed',\)"):
        from_functions(**ATTENTION, axes={"table": ("embed",)})


def test_nnx_is_not_imported():
    code = "import sys, jaxrl_llm.models; sys.exit('flax.nnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- violations of the protocol are found when the model is built ---------------------------------------------------


def padded_cache(params, tokens, positions, cache):
    hidden, cache = attention_apply(params, tokens, positions, cache)
    return hidden, cache and cache._replace(positions=jnp.pad(cache.positions, [(0, 0), (0, 1)]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocabulary_size": 0}, "vocabulary_size is 0"),
        ({"vocabulary_size": 12}, r"logits gave float32\[2, 13\] .* must give float32\[2, 12\]"),
        ({"logits": lambda p, h: tied_logits(p, h).astype(jnp.bfloat16)}, r"logits gave bfloat16.*cast at its end"),
        ({"logits": lambda p, h: (tied_logits(p, h),)}, "logits gave a tuple"),
        ({"init": lambda key: {"table": jnp.zeros((13, 8)), "steps": jnp.int32(0)}}, r"\['steps'\] the dtype int32"),
        ({"apply": lambda *a: attention_apply(*a)[0]}, r"apply gave float32\[2, 3, 8\] .* a pair \(hidden, cache\)"),
        (
            {"apply": lambda *a: (attention_apply(*a)[0][:, -1], a[3])},
            r"hidden states float32\[2, 8\] .* must be \[B, T, D\]",
        ),
        ({"apply": lambda p, t, at, cache: (t[..., None], cache)}, r"int32\[2, 3, 1\] .* must be floating-point"),
        ({"apply": lambda *a: (attention_apply(*a)[0], None)}, "structure .* a cache goes in and comes out with one"),
        ({"apply": padded_cache}, r"cache.positions from int32\[2, 7\] into int32\[2, 8\] .* shapes and dtypes"),
        (
            {"apply": lambda p, t, at, c: (attention_apply(p, t, at, c)[0].astype("float32" if c else "bfloat16"), c)},
            r"float32\[2, 3, 8\] with a cache, but bfloat16\[2, 3, 8\] without",
        ),
        ({"init_cache": None, "expand_cache": lambda *a: a[0]}, "expand_cache was given without init_cache"),
        ({"expand_cache": lambda *a: None}, "expand_cache gave a NoneType for a cache that is a Seen"),
        (
            {"expand_cache": lambda cache, samples, extra: jax.tree.map(lambda x: x.astype(jnp.float32), cache)},
            "expand_cache turned .* leaves dimensions and dtypes as they are",
        ),
    ],
)
def test_what_breaks_the_protocol_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        from_functions(**(ATTENTION | change))


class WithStatistics(Network):
    def setup(self):
        super().setup()
        self.count = self.variable("statistics", "count", lambda: jnp.zeros(()))


class WithoutScores(nn.Module):
    def __call__(self, tokens, positions):
        return nn.Embed(13, 8)(tokens)


@pytest.mark.parametrize(
    "module, message",
    [
        (Network, "got the class Network; give an instance"),
        (object(), "got a object; give an instance of flax.linen.Module, or use from_functions"),
        (WithoutScores(), "WithoutScores has no method logits"),
        (WithStatistics(), "WithStatistics has variables in statistics besides its params"),
    ],
)
def test_a_module_that_cannot_be_a_policy_is_refused(module, message):
    with pytest.raises(ValueError, match=message):
        from_linen(module, vocabulary_size=VOCABULARY)


# ---- violations of a law are found by a trial -----------------------------------------------------------------------


def sees(visible):
    return {"apply": partial(attention_apply, visible=visible)}


def forgetful(params, tokens, positions, cache):
    hidden, filled = attention_apply(params, tokens, positions, cache)
    return hidden, filled and filled._replace(used=jnp.int32(0))


def by_column(params, tokens, positions, cache):
    columns = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if cache is not None:
        columns = columns + cache.used
    return attention_apply(params, tokens, jnp.where(positions < 0, -1, columns), cache)


def nothing_at_padding(params, tokens, positions, cache):
    hidden, cache = attention_apply(params, tokens, positions, cache)
    return jnp.where(positions[..., None] < 0, jnp.nan, hidden), cache


def tiled(cache, samples, extra):
    filled = repeating(attention_cache)(cache, samples, extra)
    order = jnp.arange(filled.positions.shape[0]).reshape(-1, samples).T.reshape(-1)
    return Seen(filled.embedded[:, order], filled.positions[order], filled.used)


def mixing(params, tokens, positions, cache):
    hidden, cache = attention_apply(params, tokens, positions, cache)
    # A batch statistic only in the decode step, so that finished rows influence the others.
    ended = (positions < 0).any() & (tokens.shape[1] == 1)
    return jnp.where(ended, hidden - hidden.mean(0), hidden), cache


def looking_around(params, hidden):
    scores = tied_logits(params, hidden)
    return scores - scores.max(axis=-2, keepdims=True)


@pytest.mark.parametrize(
    "law, change",
    [
        ("finite", {"apply": nothing_at_padding}),
        ("causal", sees(lambda own, seen: seen >= 0)),
        ("padding", sees(lambda own, seen: seen <= own)),
        ("padding", {"apply": by_column}),
        ("logits", {"logits": looking_around}),
        ("cache", {"apply": forgetful}),
        ("expand_cache", {"expand_cache": tiled}),
        ("ended rows", {"apply": mixing}),
    ],
)
def test_what_breaks_a_law_is_told_which(law, change):
    model = from_functions(**(ATTENTION | change))
    with pytest.raises(ValueError, match=f"the model breaks the law '{law}'"):
        check_model(model)
