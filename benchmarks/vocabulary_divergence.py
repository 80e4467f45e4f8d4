"""The cost of a divergence over the whole vocabulary: time and memory of the update step with and without it.

    python benchmarks/vocabulary_divergence.py --vocabulary 32000 --width 256 --layers 4 --json costs.json

One update of random experience is timed: without a divergence, with one estimated on samples (reference
log-probabilities given), exact over the vocabulary, and over the top k. The last two include the forward pass of the
reference, which is also timed separately: every divergence needs it, but a sampled one runs it before the update.
Repetitions alternate between the cases, and ratios are medians over repetitions, so other load on the machine affects
all cases equally.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_llm.experience import Experience, NetworkState, Source, TrainState
from jaxrl_llm.losses import clipped_surrogate, divergence
from jaxrl_llm.models.decoder import TransformerConfig, transformer
from jaxrl_llm.models.logprobs import token_statistics
from jaxrl_llm.models.model import Model
from jaxrl_llm.rollout.hidden_states import predicting_hidden
from jaxrl_llm.training import LossTerm, Rollout, Update
from jaxrl_llm.training.composition import composition_of
from jaxrl_llm.training.learn import make_learn

BASELINE, REFERENCE = "without", "reference forward alone"
SAMPLES_PER_PROMPT = 2


def random_experience(rows: int, prompt_tokens: int, completion_tokens: int, vocabulary: int) -> Experience:
    """Full-length rows with random advantages and log-probabilities."""
    rng = np.random.default_rng(0)
    shape = (rows, completion_tokens)
    drawn = lambda *size: jnp.asarray(rng.integers(0, vocabulary, size), jnp.int32)  # noqa: E731
    logprobs = jnp.full(shape, -math.log(vocabulary), jnp.float32)
    group = jnp.arange(rows, dtype=jnp.int32) // SAMPLES_PER_PROMPT
    return Experience(
        prompt_tokens=drawn(rows, prompt_tokens),
        prompt_length=jnp.full(rows, prompt_tokens, jnp.int32),
        prompt_id=group,
        answer_tokens=jnp.zeros((rows, 1), jnp.int32),
        answer_length=jnp.ones(rows, jnp.int32),
        sample=jnp.arange(rows, dtype=jnp.int32) % SAMPLES_PER_PROMPT,
        group=group,
        weight=jnp.ones(rows, jnp.float32),
        tokens=drawn(*shape),
        length=jnp.full(rows, completion_tokens, jnp.int32),
        source=jnp.full(shape, Source.SAMPLED, jnp.int8),
        mask=jnp.ones(shape, jnp.float32),
        behaviour_logprobs=logprobs,
        behaviour_entropy=-logprobs,
        truncated=jnp.zeros(rows, bool),
        fields={
            "advantages": jnp.asarray(rng.normal(size=shape), jnp.float32),
            "old_logprobs": logprobs,
            "reference_logprobs": logprobs,
        },
    )


def update_of(model: Model, options: dict[str, Any] | None, microbatch: int | None, tokens: int) -> Callable:
    """One update of the policy, with a divergence or without."""
    terms = [LossTerm(clipped_surrogate, name="policy")]
    if options is not None:
        terms.append(LossTerm(divergence(**options), coefficient=0.1, name="divergence"))
    update = Update(sequences_per_microbatch=microbatch)
    optimizer = optax.adamw(1e-4)
    source = Rollout(SAMPLES_PER_PROMPT, tokens, eos_ids=(), pad_id=0)
    learn = make_learn(composition_of(model, optimizer, source, [], [], terms, update, None))
    coefficients = [jnp.float32(term.coefficient) for term in terms]

    def run(params, reference_params, experience):
        networks = {
            "policy": NetworkState(params, optimizer.init(params)),
            "reference": NetworkState(reference_params),
        }
        return learn(TrainState(networks, {}, jax.random.key(0), jnp.int32(0)), experience, coefficients)

    return run


def reference_pass(model: Model) -> Callable:
    """The necessary operations of the reference in an exact divergence: hidden states, logits, log-softmax, once."""

    def run(params, reference_params, rows: Experience):
        hidden = predicting_hidden(
            model, reference_params, rows.prompt_tokens, rows.prompt_length, rows.tokens, rows.length
        )
        return token_statistics(model, reference_params, hidden, rows.tokens).logprobs

    return run


def array_sizes(program: str | None) -> set[int]:
    """Numbers of elements of all arrays in the text of a compiled program."""
    shapes = re.findall(r"\b(?:pred|bf16|f8\w*|[fsuc]\d+)\[([\d,]*)\]", program or "")
    return {math.prod(map(int, filter(None, shape.split(",")))) for shape in set(shapes)}


def measured(programs: dict[str, Any], arguments: tuple, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each repetition of each compiled program; repetitions alternate between the programs."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for repetition in range(repetitions + 1):
        names = list(programs) if repetition % 2 else list(programs)[::-1]
        for name in names:
            start = time.perf_counter()
            jax.block_until_ready(programs[name](*arguments))
            if repetition:  # the first call also loads the program and its arguments
                seconds[name].append(time.perf_counter() - start)
    return seconds


def benchmark(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row of the table for each case."""
    model = transformer(
        TransformerConfig(
            vocabulary_size=options.vocabulary, width=options.width, layers=options.layers, heads=options.heads
        )
    )
    params, reference = model.init(jax.random.key(0)), model.init(jax.random.key(1))
    experience = random_experience(options.rows, options.prompt_tokens, options.completion_tokens, options.vocabulary)
    exact = {"samples": "vocabulary"}
    cases: dict[str, dict[str, Any] | None] = {
        BASELINE: None,
        "sampled": {"generator": options.generators[0]},
        **{f"exact, {name}": exact | {"generator": name} for name in options.generators},
        f"top {options.top_k}": {"generator": options.generators[0], "samples": "top_k", "k": options.top_k},
    }
    functions = {
        name: update_of(model, case, options.microbatch, options.completion_tokens) for name, case in cases.items()
    }
    functions[REFERENCE] = reference_pass(model)
    arguments = (params, reference, experience)
    programs = {name: jax.jit(function).lower(*arguments).compile() for name, function in functions.items()}
    seconds = measured(programs, arguments, options.repetitions)

    whole = (options.microbatch or options.rows) * options.completion_tokens * options.vocabulary
    table = []
    for name, program in programs.items():
        ratios = [one / base for one, base in zip(seconds[name], seconds[BASELINE], strict=True)]
        memory = program.memory_analysis()
        table.append(
            {
                "case": name,
                "seconds": statistics.median(seconds[name]),
                "ratio": statistics.median(ratios),
                "runs_reference": "samples" in (cases.get(name) or {}),
                "temporary_bytes": memory.temp_size_in_bytes if memory else 0,
                "whole_array_bytes": 4 * whole,
                "whole_array_in_program": any(size >= whole for size in array_sizes(program.as_text())),
            }
        )
    return table


def printed(table: list[dict[str, Any]]) -> str:
    """The table as text; it also has the time of an exact divergence without the reference pass that any KL needs."""
    share = next(row["ratio"] for row in table if row["case"] == REFERENCE)
    lines = [f"{'update step':<26}{'seconds':>9}{'adds':>8}{'less reference':>16}{'temporary':>12}{'[B, T, V]':>11}"]
    for row in table:
        adds = "" if row["case"] in (BASELINE, REFERENCE) else f"{row['ratio'] - 1:+.2f}x"
        less = f"{row['ratio'] - 1 - share:+.2f}x" if row["runs_reference"] else ""
        lines.append(
            f"{row['case']:<26}{row['seconds']:>9.3f}{adds:>8}{less:>16}{row['temporary_bytes'] / 2**20:>8.0f} MiB"
            f"{'yes' if row['whole_array_in_program'] else 'no':>11}"
        )
    lines.append(f"a float32 [B, T, V] array would take {table[0]['whole_array_bytes'] / 2**20:.0f} MiB")
    lines.append(f"the forward pass of the reference takes {share:.2f}x the update step without a divergence")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, meaning in [
        ("vocabulary", 32_000, "symbols"),
        ("width", 256, "of the residual stream"),
        ("layers", 4, "blocks"),
        ("heads", 4, "attention heads"),
        ("rows", 16, "sequences in the batch"),
        ("prompt-tokens", 16, "prompt tokens of a sequence"),
        ("completion-tokens", 128, "completion tokens of a sequence"),
        ("top-k", 64, "tokens of the top-k divergence"),
        ("repetitions", 5, "timed repetitions of each case"),
    ]:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: {default})")
    parser.add_argument("--microbatch", type=int, default=None, help="sequences differentiated at once (default: all)")
    parser.add_argument(
        "--generators", nargs="+", default=["reverse_kl"], help="divergences to time exactly (default: reverse_kl)"
    )
    parser.add_argument("--json", type=Path, default=None, help="also write the table here")
    options = parser.parse_args(arguments)
    table = benchmark(options)
    print(printed(table))
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options) | {"json": str(options.json)}, "table": table}))


if __name__ == "__main__":
    main()
