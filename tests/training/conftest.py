"""Two models over 16 symbols, prompts for them, and experience written by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.experience import Experience, Prompts, Source
from jaxrl_llm.models.decoder import TransformerConfig, transformer
from jaxrl_llm.models.model import Model
from jaxrl_llm.training.segments import shapes
from jaxrl_llm.training.step import given_work


@pytest.fixture(scope="session")
def model() -> Model:
    """One block of a transformer."""
    return transformer(TransformerConfig(vocabulary_size=16, width=16, layers=1, heads=2, kv_heads=1))


@pytest.fixture(scope="session")
def bigram(make_bigram) -> Model:
    return make_bigram(16)


@pytest.fixture(scope="session")
def make_prompts():
    """The first of eight prompts of two to four tokens, with the ids 0, 1, ..."""
    rng = np.random.default_rng(0)
    tokens, length = rng.integers(3, 16, (8, 4)).astype(np.int32), rng.integers(2, 5, 8).astype(np.int32)

    def make(count: int) -> Prompts:
        return Prompts(
            tokens=tokens[:count],
            length=length[:count],
            prompt_id=np.arange(count, dtype=np.int32),
            answer_tokens=np.full((count, 2), 5, np.int32),
            answer_length=np.ones(count, np.int32),
        )

    return make


@pytest.fixture(scope="session")
def rows() -> Experience:
    """Eight completions of two to six tokens, in four groups of two, as a rollout leaves them."""
    rng = np.random.default_rng(1)
    count, width = 8, 6
    length = np.array([6, 2, 3, 5, 4, 6, 2, 3], np.int32)
    inside = np.arange(width) < length[:, None]
    return Experience(
        prompt_tokens=jnp.asarray(rng.integers(3, 16, (count, 4)), jnp.int32),
        prompt_length=jnp.full(count, 4, jnp.int32),
        prompt_id=jnp.arange(count, dtype=jnp.int32) // 2,
        answer_tokens=jnp.zeros((count, 2), jnp.int32),
        answer_length=jnp.ones(count, jnp.int32),
        sample=jnp.arange(count, dtype=jnp.int32) % 2,
        group=jnp.arange(count, dtype=jnp.int32) // 2,
        weight=jnp.ones(count, jnp.float32),
        tokens=jnp.asarray(np.where(inside, rng.integers(3, 16, (count, width)), 0), jnp.int32),
        length=jnp.asarray(length),
        source=jnp.asarray(np.where(inside, Source.SAMPLED, Source.PAD), jnp.int8),
        mask=jnp.asarray(inside, jnp.float32),
        behaviour_logprobs=jnp.asarray(np.where(inside, -2.7, 0.0), jnp.float32),
        behaviour_entropy=jnp.asarray(np.where(inside, 2.7, 0.0), jnp.float32),
        truncated=jnp.asarray(length == width),
    )


@pytest.fixture(scope="session")
def traced():
    """(step, prompts, written) -> state, metrics and rows after the step, as shapes: nothing is compiled or run."""

    def trace(step, prompts=None, written=None):
        state = jax.eval_shape(step.init, jax.random.key(0))
        (*_, (program, work)) = shapes(step.segments, state, given_work(prompts, written))
        return jax.eval_shape(program.run, state, work)

    return trace
