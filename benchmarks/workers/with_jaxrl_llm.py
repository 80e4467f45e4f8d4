"""jaxrl_llm as a worker of the benchmarks: rollout, step, decoding in slots, shared prefill, products of matrices."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from laps import job, laps

from jaxrl_llm.allocator import give_back_after_compiling
from jaxrl_llm.experience import Prompts
from jaxrl_llm.models.logprobs import token_statistics
from jaxrl_llm.models.weights import load_model
from jaxrl_llm.rollout.decoding import Decoding, Drawing, begin, decode
from jaxrl_llm.rollout.generation import generate
from jaxrl_llm.rollout.hidden_states import prompt_hidden
from jaxrl_llm.rollout.sampling import row_keys

what, workload, directory = job()
give_back_after_compiling()  # as `jaxrl train` does on a CPU
lap = laps()
model, params = load_model(directory, parameter_dtype=workload["dtype"], compute_dtype=workload["dtype"])
config = model.config
samples, completion_tokens = workload["samples"], workload["completion_tokens"]
versions = {"jax": jax.__version__}


def peak() -> dict[str, int]:
    """Peak memory of a device; empty for a CPU, whose memory is that of the process."""
    known = jax.local_devices()[0].memory_stats() or {}
    return {"peak_memory": known["peak_bytes_in_use"]} if "peak_bytes_in_use" in known else {}


def prompts_of(tokens: Any) -> Prompts:
    """Prompts of one length without answers."""
    tokens = jnp.asarray(tokens, jnp.int32)
    count, width = tokens.shape
    length, nothing = jnp.full(count, width, jnp.int32), jnp.zeros((count, 1), jnp.int32)
    return Prompts(tokens, length, jnp.arange(count, dtype=jnp.int32), nothing, jnp.ones(count, jnp.int32))


prompts = prompts_of(workload["prompt_tokens"])


def prompt_logprob() -> float:
    """Mean log-probability of the prompts, by which the weights of the workers are compared."""
    hidden = prompt_hidden(model, params, prompts.tokens, prompts.length)
    return float(token_statistics(model, params, hidden[:, :-1], prompts.tokens[:, 1:]).logprobs.mean())


def rollout() -> None:
    """One lap: all completions of all prompts, at full length."""
    request = lap(versions=versions, prompt_logprob=prompt_logprob())
    programs: dict[int, Callable] = {}
    key, step = jax.random.key(0), 0
    while True:
        length = request["completion_tokens"]
        if length not in programs:
            settings = dict(samples_per_prompt=samples, max_completion_tokens=length, eos_ids=(), pad_id=0)
            programs[length] = jax.jit(partial(generate, model, **settings))
        rows = jax.block_until_ready(programs[length](params, prompts, key, step))
        step += 1
        request = lap(tokens=int(rows.length.sum()), **peak())


def step() -> None:
    """One lap: one step of GRPO, from the rollout to the update."""
    import optax

    from jaxrl_llm.advantages import group_normalized
    from jaxrl_llm.losses import clipped_surrogate, kl_estimate
    from jaxrl_llm.training import Rollout, Update, make_train_step

    def reward(tokens: Array, length: Array) -> Array:
        inside = jnp.arange(tokens.shape[1]) < length[:, None]
        return jnp.sum((2 * tokens < config.vocabulary_size) & inside, axis=1) / length

    found = prompt_logprob()
    clip = {"clip_low": workload["clip"], "clip_high": workload["clip"]}
    taken = make_train_step(
        model,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(workload["learning_rate"], weight_decay=0.0)),
        source=Rollout(samples, completion_tokens, eos_ids=(), pad_id=0),
        rewards=[reward],
        credit=[("advantages", group_normalized)],
        losses=[
            partial(clipped_surrogate, **clip, aggregation="seq_mean_token_mean"),
            (partial(kl_estimate, aggregation="seq_mean_token_mean"), workload["kl"]),
        ],
        update=Update(sequences_per_microbatch=workload.get("sequences_per_microbatch")),
    )
    lap(versions=versions, prompt_logprob=found)
    global params
    state = taken.init(jax.random.key(0), params)
    del params  # the state has a copy
    while True:
        state, metrics = jax.block_until_ready(taken(state, prompts))
        written, reported = len(prompts.length) * samples * completion_tokens, {k: float(v) for k, v in metrics.items()}
        lap(tokens=written, reported=reported, **peak())


def started(prompts: Prompts, samples: int, slots: int, key: Array, longest: int) -> tuple[Drawing, Decoding]:
    """Prefilled rows."""
    count = prompts.length.shape[0]
    per_row = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), prompts)
    number = jnp.tile(jnp.arange(samples, dtype=jnp.int32), count)
    drawing = Drawing(
        model=model,
        params=params if model.for_decoding is None else model.for_decoding(params),
        keys=row_keys(key, 0, per_row.prompt_id, number),
        temperature=jnp.ones(count * samples),
        prompt_length=per_row.length,
        controls=None,
        eos_ids=(),
    )
    return drawing, begin(drawing, prompts, per_row, None, max_completion_tokens=longest, slots=slots, pad_id=0)


def skewed() -> None:
    """One lap: requests of given lengths, through slots, or in batches as large as there are slots."""
    request = lap(versions=versions)
    width = request["slots"]
    lengths = jnp.asarray(request["lengths"], jnp.int32)
    longest = int(lengths.max())
    finish = partial(decode, end_ids=())

    @jax.jit
    def in_slots(key):
        drawing, state = started(prompts, samples, 0, key, longest)
        return finish(drawing, state, active=jnp.ones(lengths.shape, bool), limit=lengths, slots=width)[0]

    @jax.jit
    def batch(prompts, lengths, key):
        drawing, state = started(prompts, samples, longest, key, longest)
        return finish(drawing, state, active=jnp.ones(lengths.shape, bool), limit=lengths)[0]

    def in_batches(key):
        at_a_time = width // samples
        for first in range(0, len(prompts.length), at_a_time):
            part = jax.tree.map(lambda x, first=first: x[first : first + at_a_time], prompts)
            yield batch(part, lengths[first * samples :][:width], key)

    while True:
        key = jax.random.key(request["seed"])
        states = [in_slots(key)] if request["in_slots"] else list(in_batches(key))
        written = [np.asarray(state.written.length) for state in states]
        calls = sum(int(state.calls) for state in states)
        # The first token of a row comes from its prefill and takes no slot.
        used = sum(int((length - 1).sum()) for length in written) / (calls * width)
        request = lap(tokens=sum(int(length.sum()) for length in written), utilisation=used, calls=calls)


def prefill() -> None:
    """One lap: the first token of all samples, from one prefill per prompt, or from one per sample."""
    request = lap(versions=versions)

    def first_tokens(prompts, samples, key):
        return generate(
            model,
            params,
            prompts,
            key,
            0,
            samples_per_prompt=samples,
            max_completion_tokens=completion_tokens,
            eos_ids=tuple(range(config.vocabulary_size)),  # any token ends its row
            pad_id=0,
        )

    programs = {}
    for shared in (True, False):
        given = prompts if shared else jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), prompts)
        lowered = jax.jit(first_tokens, static_argnums=1).lower(given, samples if shared else 1, jax.random.key(0))
        compiled = lowered.compile()
        cache = jax.eval_shape(lambda rows=given.length.shape[0]: model.init_cache(rows, prompts.tokens.shape[1]))
        costs = compiled.cost_analysis() or {}
        facts = {
            "flops": costs.get("flops", 0.0),
            "cache_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)),
        }
        programs[shared] = (partial(compiled, given, jax.random.key(0)), facts)
    while True:
        run, facts = programs[request["shared"]]
        rows = jax.block_until_ready(run())
        request = lap(tokens=int(rows.length.sum()), **facts)


def matrices() -> None:
    """One lap: only the products with weights of a forward pass, and the fastest product of this machine."""
    request = lap(versions=versions)
    sizes = [
        (config.width, (config.heads + 2 * config.kv_heads) * config.head_size),
        (config.heads * config.head_size, config.width),
        (config.width, 2 * config.mlp_size),
        (config.mlp_size, config.width),
    ] * config.layers + [(config.width, config.vocabulary_size)]
    dtype = jnp.dtype(workload["dtype"])
    weights = [jnp.full(size, 1e-3, dtype) for size in sizes]

    @partial(jax.jit, static_argnames=("rows", "times"))
    def products(weights, rows, times):
        inputs = {size: jnp.full((rows, size), 1e-3, dtype) for size in {size for size, _ in sizes}}

        def once(_, total):
            # Each product depends on the previous one, as in a model, so that the compiler cannot remove or reorder it.
            for (size, _), weight in zip(sizes, weights, strict=True):
                total = total + ((inputs[size] + total) @ weight)[0, 0] * 1e-9
            return total

        return jax.lax.fori_loop(0, times, once, dtype.type(0.0))

    square = jax.jit(jnp.matmul)
    side = request["side"]
    large = jnp.ones((side, side), dtype)

    def rate(operations: float, call: Callable[[], Any]) -> float:
        jax.block_until_ready(call())
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds.append(time.perf_counter() - start)
        return operations / min(seconds)

    while True:
        flops = sum(2 * inputs * outputs for inputs, outputs in sizes)
        rows, times = request["rows"], request["times"]
        request = lap(
            flops_per_token=flops,
            at_shape=rate(flops * rows * times, lambda rows=rows, times=times: products(weights, rows, times)),
            square=rate(2 * side**3, lambda: square(large, large)),
        )


{"rollout": rollout, "step": step, "skewed": skewed, "prefill": prefill, "matrices": matrices}[what]()
