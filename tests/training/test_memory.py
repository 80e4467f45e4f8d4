"""The compiled update step with a divergence over the vocabulary: what it allocates, read from the program itself."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.experience import Experience
from jaxrl_llm.losses import clipped_surrogate, divergence
from jaxrl_llm.models import TransformerConfig, logprobs, transformer
from jaxrl_llm.training import LossTerm, Rollout
from jaxrl_llm.training.composition import composition_of
from jaxrl_llm.training.initial import initial_state
from jaxrl_llm.training.learn import make_learn

# Programs are compiled and not run, so the sizes can be real ones: a float32 [B, T, V] array would be 2 GiB.
ROWS, LENGTH, VOCABULARY = 64, 256, 32_768
EVERYTHING = ROWS * LENGTH * VOCABULARY
MODEL = transformer(TransformerConfig(vocabulary_size=VOCABULARY, width=16, layers=1, heads=2, kv_heads=1))


def abstract_experience() -> Experience:
    """Shapes and dtypes of a batch, no numbers."""

    def of(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((ROWS, *shape), dtype)

    row, floats = of(jnp.int32), of(jnp.float32, LENGTH)
    return Experience(
        prompt_tokens=of(jnp.int32, 8),
        prompt_length=row,
        prompt_id=row,
        answer_tokens=of(jnp.int32, 1),
        answer_length=row,
        sample=row,
        group=row,
        weight=of(jnp.float32),
        tokens=of(jnp.int32, LENGTH),
        length=row,
        source=of(jnp.int8, LENGTH),
        mask=floats,
        behaviour_logprobs=floats,
        behaviour_entropy=floats,
        truncated=of(jnp.bool_),
        fields={"advantages": floats, "old_logprobs": floats, "reference_logprobs": floats},
    )


def compiled_update(**options):
    """The learning program of one update with `divergence(**options)`."""
    terms = [LossTerm(clipped_surrogate, name="policy"), LossTerm(divergence(**options), 0.1, name="divergence")]
    rollout = Rollout(samples_per_prompt=2, max_completion_tokens=LENGTH, eos_ids=(2,), pad_id=0)
    c = composition_of(MODEL, optax.sgd(1e-3), rollout, [], [], terms, None, None)
    state = jax.eval_shape(lambda: initial_state(c, jax.random.key(0)))

    def update(state, experience):
        return make_learn(c)(state, experience, [jnp.float32(term.coefficient) for term in terms])

    return jax.jit(update).lower(state, abstract_experience()).compile()


def largest_array(compiled) -> int:
    """Elements of the largest array that a compiled program names, in whatever layout, its dimensions merged or not."""
    shapes = re.findall(r"\b(?:pred|bf16|f8\w*|[fsuc]\d+)\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in set(shapes))


def temporary_bytes(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


OF_ALL = {"samples": "vocabulary", "generator": "reverse_kl"}
CASES = [
    pytest.param(OF_ALL, marks=pytest.mark.slow),
    pytest.param({"samples": "vocabulary", "generator": "jensen_shannon"}, marks=pytest.mark.slow),
    {"samples": "top_k", "generator": "forward_kl", "k": 16},
]


@pytest.mark.parametrize("options", CASES, ids=lambda options: f"{options['samples']}-{options['generator']}")
def test_the_update_step_holds_no_array_over_all_positions_and_the_vocabulary(options):
    compiled = compiled_update(**options)
    assert largest_array(compiled) < EVERYTHING
    # The chunks are there, so the program is the one that is meant.
    assert largest_array(compiled) == logprobs.SCORES_PER_CHUNK
    assert temporary_bytes(compiled) < 4 * EVERYTHING


def test_the_same_update_step_in_one_chunk_is_found_out(monkeypatch):
    monkeypatch.setattr(logprobs, "SCORES_PER_CHUNK", EVERYTHING)
    compiled = compiled_update(**OF_ALL)
    assert largest_array(compiled) >= EVERYTHING
    assert temporary_bytes(compiled) >= 4 * EVERYTHING


def test_a_naive_log_softmax_is_found_out():
    def reverse_kl(params, reference_params, hidden):
        log_p = jax.nn.log_softmax(MODEL.logits(params, hidden))
        log_q = jax.nn.log_softmax(MODEL.logits(reference_params, hidden))
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q))

    params = jax.eval_shape(MODEL.init, jax.random.key(0))
    hidden = jax.ShapeDtypeStruct((ROWS, LENGTH, 16), np.float32)
    compiled = jax.jit(jax.grad(reverse_kl)).lower(params, params, hidden).compile()
    assert largest_array(compiled) >= EVERYTHING
    assert temporary_bytes(compiled) >= 4 * EVERYTHING
