"""What the TPU compiler says of parts of a step. test_ahead.py runs this in a process that compiles for TPUs."""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jaxrl_llm.experience import Prompts
from jaxrl_llm.models import TransformerConfig, token_statistics, transformer
from jaxrl_llm.parallel.backend import planned_for
from jaxrl_llm.planning.ahead import described_devices, kernels_for
from jaxrl_llm.planning.topologies import topology
from jaxrl_llm.rollout import generate

ROWS, LENGTH, VOCABULARY, WIDTH = 4, 8192, 151_936, 2048


def compiled(function, *arguments, device):
    """The function, compiled for arrays on one device."""
    place = SingleDeviceSharding(device)
    on_it = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
    with kernels_for(device):
        return jax.jit(function).lower(*jax.tree.map(on_it, jax.eval_shape(lambda: arguments))).compile()


def logprob_gradient_bytes(device, chunk):
    """Temporaries of the gradient of summed log-probabilities and entropies."""
    model = transformer(TransformerConfig(vocabulary_size=VOCABULARY, width=WIDTH, layers=1, heads=16, kv_heads=8))

    def total(params, hidden, tokens):
        found = token_statistics(model, params, hidden, tokens, temperature=0.9, entropy=True, chunk=chunk)
        return jnp.sum(found.logprobs + 0.01 * found.entropy)

    params = {"embedding": jnp.zeros((VOCABULARY, WIDTH), jnp.bfloat16)}
    hidden, tokens = jnp.zeros((ROWS, LENGTH, WIDTH), jnp.bfloat16), jnp.zeros((ROWS, LENGTH), jnp.int32)
    program = compiled(jax.grad(total, argnums=(0, 1)), params, hidden, tokens, device=device)
    return program.memory_analysis().temp_size_in_bytes


def rollout_text(device, **settings):
    """A rollout as the TPU runs it."""
    config = TransformerConfig(
        vocabulary_size=512,
        width=256,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=128,
        compute_dtype="bfloat16",
        **settings,
    )
    model, number = transformer(config), jnp.zeros(8, jnp.int32)
    prompts = Prompts(jnp.zeros((8, 128), jnp.int32), number, number, jnp.zeros((8, 1), jnp.int32), number)
    sampled = partial(generate, model, samples_per_prompt=4, max_completion_tokens=64, eos_ids=(1,), pad_id=0)
    program = compiled(
        lambda params, prompts: sampled(params, prompts, jax.random.key(0), 0),
        jax.eval_shape(model.init, jax.random.key(0)),
        prompts,
        device=device,
    )
    return program.as_text()


if __name__ == "__main__":
    v5p, v5e = (described_devices(topology(name))[0] for name in ("v5p:2x2x1", "v5e:2x2"))
    with planned_for("tpu"):
        found = {
            "chunked": logprob_gradient_bytes(v5p, None),
            "whole": logprob_gradient_bytes(v5p, LENGTH),
            "paged": "ragged_paged_attention" in rollout_text(v5e, cache_layout="paged"),
            "contiguous": "ragged_paged_attention" in rollout_text(v5e, cache_layout="contiguous"),
        }
    Path(sys.argv[1]).write_text(json.dumps(found))
