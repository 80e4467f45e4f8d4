"""Decoding and update rates relative to an accelerator's limits, and the gap of sampler and trainer in bfloat16.

    python benchmarks/accelerator.py --size 1.7b
    python benchmarks/accelerator.py --size 0.6b --only decode --layer-loop unrolled

A model of the sizes of a Qwen3 with random weights, on one device. The limits are measured in the same run: a copy of a
gigabyte (bytes read and written) and a product of two square bfloat16 matrices of random numbers.

- decode: seconds of one token of all rows, the difference between a long rollout and one of a single token over the
  tokens between. Its least bytes are every parameter that it multiplies by once, and the keys and values of the tokens
  so far once a row (those of a prompt once for its samples); their share of the bandwidth is shown.
- update: seconds of one clipped-surrogate AdamW step over written rows. Its least operations are 6 per parameter and
  token (the output head on completion tokens alone) and the causal half of the attention scores; what is computed
  twice to save memory is not counted. Their share of the matrix rate is shown.
- gap: |log-probability of the sampler - that of a teacher-forced pass| per token, where both compute alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from jaxrl_llm.experience import Prompts
from jaxrl_llm.losses import clipped_surrogate
from jaxrl_llm.models import TransformerConfig, transformer
from jaxrl_llm.planning.profiled import ceilings
from jaxrl_llm.rollout.external import logprob_gap
from jaxrl_llm.rollout.generation import generate
from jaxrl_llm.rows import Written, written_rows
from jaxrl_llm.training import Update, make_train_step

QWEN3 = {"vocabulary_size": 151_936, "layers": 28, "heads": 16, "kv_heads": 8, "head_width": 128}
SIZES = {
    "0.6b": QWEN3 | {"width": 1024, "mlp_width": 3072},
    "1.7b": QWEN3 | {"width": 2048, "mlp_width": 6144},
    "tiny": {
        **{"vocabulary_size": 512, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 16},
        **{"width": 64, "mlp_width": 128},
    },
}
PARTS = ("decode", "update", "gap")


def config_of(options: argparse.Namespace, **changes: Any) -> TransformerConfig:
    """The model, computed in bfloat16."""
    settings = {"layer_loop": options.layer_loop, "attention": options.attention, "compute_dtype": "bfloat16"}
    return TransformerConfig(rope_base=1e6, **SIZES[options.size] | settings | changes)


def median_seconds(call: Callable[[], Any], repetitions: int) -> float:
    """Median time of a call, after one untimed call."""
    jax.block_until_ready(call())
    found = []
    for _ in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def prompts_of(rows: int, width: int, vocabulary: int) -> Prompts:
    """Random prompts of one length."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, vocabulary, (rows, width)), jnp.int32)
    length, nothing = jnp.full(rows, width, jnp.int32), jnp.zeros((rows, 1), jnp.int32)
    return Prompts(tokens, length, jnp.arange(rows, dtype=jnp.int32), nothing, jnp.ones(rows, jnp.int32))


def multiplied(config: TransformerConfig) -> tuple[int, int]:
    """(parameters of the blocks' products, of the output head)."""
    attention = config.width * config.head_size * (2 * config.heads + 2 * config.kv_heads)
    return config.layers * (attention + 3 * config.width * config.mlp_size), config.width * config.vocabulary_size


def decode(options: argparse.Namespace, found: dict[str, float]) -> list[dict[str, Any]]:
    """Seconds a token of all rows for several numbers of rows, and its share of the bandwidth."""
    config = config_of(options, parameter_dtype="bfloat16")
    model = transformer(config)
    params = jax.jit(model.init)(jax.random.key(0))
    measured = []
    for rows in options.rows:
        samples = min(8, rows)
        prompts = prompts_of(rows // samples, options.prompt, config.vocabulary_size)

        def run(length: int, prompts: Prompts = prompts, samples: int = samples) -> float:
            settings = dict(samples_per_prompt=samples, max_completion_tokens=length, eos_ids=(), pad_id=0)
            program = jax.jit(partial(generate, model, **settings))
            return median_seconds(lambda: program(params, prompts, jax.random.key(0), 0), options.repetitions)

        whole, first = run(options.completion), run(1)
        seconds = (whole - first) / (options.completion - 1)
        per_token = 2 * config.layers * config.kv_heads * config.head_size * 2
        seen = rows // samples * options.prompt + rows * options.completion / 2
        least = 2 * sum(multiplied(config)) + per_token * seen
        measured.append(
            {
                "rows": rows,
                "seconds_per_token": seconds,
                "tokens_per_second": rows * options.completion / whole,
                "first_token": first,
                "least_bytes": least,
                "share": least / seconds / found["bytes"],
            }
        )
    return measured


def update(options: argparse.Namespace, found: dict[str, float]) -> dict[str, Any]:
    """Seconds of one update over written rows, and its share of the matrix rate."""
    rows, prompt, width = options.update_rows, options.prompt, options.update_completion
    config = config_of(options, remat=options.remat)
    rng = np.random.default_rng(0)
    draw = lambda size: jnp.asarray(rng.integers(3, config.vocabulary_size, (rows, size)), jnp.int32)  # noqa: E731
    lengths = jnp.full(rows, prompt, jnp.int32), jnp.full(rows, width, jnp.int32)
    batch = written_rows(
        draw(prompt), lengths[0], jnp.arange(rows), draw(width), lengths[1], answer_width=1, alone=True
    ).filled(
        advantages=jnp.asarray(rng.normal(size=(rows, width)), jnp.float32),
        old_logprobs=jnp.full((rows, width), -12.0, jnp.float32),
    )
    step = make_train_step(
        transformer(config),
        optax.adamw(1e-5),
        source=Written(rows, provides=frozenset({"advantages", "old_logprobs"})),
        losses=[clipped_surrogate],
        update=Update(sequences_per_microbatch=options.microbatch),
    )
    state = step.init(jax.random.key(0))
    seconds = []
    for _ in range(options.repetitions + 2):
        start = time.perf_counter()
        state, metrics = step(state, written=batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    blocks, head = multiplied(config)
    tokens = rows * (prompt + width)
    scores = 2 * 2 * config.layers * config.heads * config.head_size * rows * (prompt + width) ** 2 / 2
    flops = 3 * (2 * blocks * tokens + 2 * head * rows * width + scores)
    taken = statistics.median(seconds[2:])
    memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "seconds": taken,
        "first_call": seconds[0],
        "tokens_per_second": tokens / taken,
        "flops": flops,
        "share": flops / taken / found["flops"],
        "peak_memory": memory.get("peak_bytes_in_use", 0),
    }


def gap(options: argparse.Namespace, found: dict[str, float]) -> list[dict[str, Any]]:
    """The gap of log-probabilities on sampled rows, for each dtype; it has no limit."""
    del found
    measured = []
    for dtype in ("bfloat16", "float32"):
        model = transformer(config_of(options, parameter_dtype=dtype, compute_dtype=dtype))
        params = jax.jit(model.init)(jax.random.key(0))
        prompts = prompts_of(8, options.prompt, model.config.vocabulary_size)
        settings = dict(samples_per_prompt=8, max_completion_tokens=options.completion, eos_ids=(), pad_id=0)
        rows = jax.jit(partial(generate, model, **settings))(params, prompts, jax.random.key(0), 0)
        measured.append({"dtype": dtype, **logprob_gap(model, params, rows, temperature=1.0)._asdict()})
    return measured


def print_figures(figures: dict[str, Any], options: argparse.Namespace) -> None:
    """Tables."""
    console, limit = Console(), figures["limits"]
    rates = f"{limit['bytes'] / 1e12:.2f} TB/s, {limit['flops'] / 1e12:.0f} TFLOP/s"
    console.print(f"{figures['device']}, jax {jax.__version__}, Qwen3 {options.size}; limits {rates}")
    if "decode" in figures:
        table = Table("rows", "ms a token", "tokens/s", "prefill", "share of bandwidth", title="decode")
        for one in figures["decode"]:
            table.add_row(
                str(one["rows"]),
                f"{1e3 * one['seconds_per_token']:.2f}",
                f"{one['tokens_per_second']:,.0f}",
                f"{1e3 * one['first_token']:.0f} ms",
                f"{one['share']:.0%}",
            )
        console.print(table)
    if "update" in figures:
        one = figures["update"]
        console.print(
            f"update: {one['seconds']:.3f} s, {one['tokens_per_second']:,.0f} tokens/s, {one['share']:.0%} of the "
            f"matrix rate, peak {one['peak_memory'] / 2**30:.1f} GiB, first call {one['first_call']:.1f} s"
        )
    for one in figures.get("gap", ()):
        console.print(f"gap, {one['dtype']}: {one}")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.7b")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--layer-loop", default="auto", choices=("auto", "unrolled", "scanned"))
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64, 256], help="of decode")
    for name, value in (
        ("prompt", 256),
        ("completion", 256),
        ("update-rows", 32),
        ("update-completion", 768),
        ("microbatch", 16),
        ("repetitions", 3),
        ("side", 8192),
        ("copied", 2**30),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device = jax.local_devices()[0]
    figures: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__, "options": vars(options)}
    figures["limits"] = ceilings("bfloat16", size=options.side, length=options.copied // 4, repeats=options.repetitions)
    measured = {"decode": decode, "update": update, "gap": gap}
    for part in options.only:
        figures[part] = measured[part](options, figures["limits"])
    print_figures(figures, options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1, default=str) + "\n")
    return figures


if __name__ == "__main__":
    main()
