"""Time saved by packing and trimming: supervised steps and updates of the same rows, padded, packed and trimmed.

    python benchmarks/packing.py --json packing.json

Supervised rows have lengths as in GSM8K (questions of mean length 60 tokens, answers of 130, both log-normal, at most
256 and 512). Rows of an update are samples of a policy whose completions are mostly short: a geometric length, at most
512 tokens. The cases are timed in turn, on the same rows, after a step that is not timed. The reported tokens are those
that are trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from jaxrl_llm.experience import Experience
from jaxrl_llm.losses import clipped_surrogate, negative_log_likelihood
from jaxrl_llm.models import TransformerConfig, transformer
from jaxrl_llm.rows import Written, written_rows
from jaxrl_llm.training import Update, make_train_step

BARS = {"packed": 1.6, "trimmed": 1.3}


def supervised_lengths(rng: np.random.Generator, rows: int, prompt: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(prompts, completions): log-normal, like questions and answers of GSM8K, scaled to these widths."""
    asked = rng.lognormal(np.log(0.23 * prompt), 0.4, rows)
    answered = rng.lognormal(np.log(0.23 * width), 0.5, rows)
    return np.clip(asked, 8, prompt).astype(np.int32), np.clip(answered, 8, width).astype(np.int32)


def sampled_lengths(rng: np.random.Generator, rows: int, prompt: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(prompts of full width, mostly short completions); the longest completion has about half the width."""
    return np.full(rows, prompt, np.int32), np.minimum(rng.geometric(8 / width, rows), width).astype(np.int32)


def rows_of(rng: np.random.Generator, lengths: tuple[np.ndarray, np.ndarray], prompt: int, width: int) -> Experience:
    """Rows of these lengths with random tokens and advantages."""
    count = len(lengths[0])
    draw = lambda size: jnp.asarray(rng.integers(3, 250, (count, size)), jnp.int32)  # noqa: E731
    rows = written_rows(
        draw(prompt), jnp.asarray(lengths[0]), jnp.arange(count), draw(width), jnp.asarray(lengths[1]),
        answer_width=1, alone=True,
    )  # fmt: skip
    return rows.filled(
        advantages=jnp.asarray(rng.normal(size=(count, width)), jnp.float32),
        old_logprobs=jnp.full((count, width), -5.5, jnp.float32),
    )


def steps_of(update: Update, rows: int, loss: Any, sizes: dict[str, int]) -> tuple[Any, Any]:
    """(step, its first state)."""
    model = transformer(TransformerConfig(256, **sizes))
    source = Written(rows, provides=frozenset({"advantages", "old_logprobs"}))
    step = make_train_step(model, optax.adamw(1e-4), source=source, losses=[loss], update=update)
    return step, step.init(jax.random.key(0))


def timed(cases: dict[str, Update], batches: Sequence[Experience], loss: Any, sizes: dict[str, int]) -> dict[str, Any]:
    """Seconds of each batch by case, and the loss of the last batch; the cases alternate."""
    built = {name: steps_of(update, batches[0].tokens.shape[0], loss, sizes) for name, update in cases.items()}
    steps, states = {n: one[0] for n, one in built.items()}, {n: one[1] for n, one in built.items()}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    losses: dict[str, float] = {}
    for number, batch in enumerate([batches[0], *batches]):
        for name, step in steps.items():
            start = time.perf_counter()
            states[name], metrics = step(states[name], written=batch)
            losses[name] = float(jax.block_until_ready(metrics["loss"]))
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {"seconds": seconds, "loss": losses}


def compared(what: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of packing ("packed"), or of trimming ("trimmed")."""
    rng, prompt, width = np.random.default_rng(0), options.prompt, options.width
    lengths = supervised_lengths if what == "packed" else sampled_lengths
    batches = [rows_of(rng, lengths(rng, options.rows, prompt, width), prompt, width) for _ in range(options.batches)]
    sizes = {"width": options.model_width, "layers": options.layers, "heads": 4, "kv_heads": 4}
    update = {
        "packed": Update(packing=(0.25, 0.375, 0.5, 0.75)),
        "trimmed": Update(completion_buckets=tuple(width * n // 8 for n in (1, 2, 4, 6))),
    }[what]
    found = timed(
        {"padded": Update(), what: update},
        batches,
        negative_log_likelihood if what == "packed" else clipped_surrogate,
        sizes,
    )
    tokens = [float(batch.length.sum()) for batch in batches]
    rates = {name: sum(tokens) / sum(times) for name, times in found["seconds"].items()}
    pairs = zip(found["seconds"]["padded"], found["seconds"][what], strict=True)
    return {
        "tokens_per_second": rates,
        "ratio": statistics.median(a / b for a, b in pairs),
        "bar": BARS[what],
        "loss": found["loss"],
        "filled": sum(tokens) / (len(batches) * options.rows * width),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("rows", 32),
        ("prompt", 256),
        ("width", 512),
        ("model-width", 128),
        ("layers", 4),
        ("batches", 6),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", nargs="+", choices=BARS, default=[*BARS])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    figures = {what: compared(what, options) for what in options.only}
    table = Table("", "padded, tokens/s", "so, tokens/s", "ratio", "bar", "share of T that is real")
    for what, one in figures.items():
        rates = one["tokens_per_second"]
        row = [what, f"{rates['padded']:,.0f}", f"{rates[what]:,.0f}", f"{one['ratio']:.2f}x", f"{one['bar']:.1f}x"]
        table.add_row(*row, f"{one['filled']:.0%}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return figures


if __name__ == "__main__":
    main()
