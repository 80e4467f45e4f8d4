"""Speed of sampling: our engine compared with transformers' generate and Tunix's sampler.

    python benchmarks/rollout.py --workload W1 W2 --trl-python ../trl/bin/python --tunix-python ../tunix/bin/python
    python benchmarks/rollout.py --workload --skewed
    python benchmarks/rollout.py --workload --prompt 1024 --samples 16

All projects have the same weights (float32) and prompts, and sample the same number of tokens at temperature 1. They
are warmed up, then timed in turn. The share of the matrix limit is the time of only the products with the weights,
relative to the time of the rollout: at the rate of this machine for these shapes, measured in the same run, and at its
best rate for a large square product.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console
from side_by_side import (
    OURS,
    WORKLOADS,
    Worker,
    Workload,
    alternating,
    machine,
    median_of,
    note_on,
    parser,
    peers,
    shown,
    versions_of,
    workers,
    written,
)

SLOTS = 16


def compared(workload: Workload, pythons: Mapping[str, str], repetitions: int) -> dict[str, Any]:
    """The figures of one workload: one entry per project, and the machine's rates."""
    length = workload.completion_tokens
    with (
        workers("rollout", workload, pythons) as projects,
        workers("matrices", workload, {OURS: pythons[OURS]}) as others,
    ):
        for worker in projects.values():
            for warm in (1, length):
                worker.lap(completion_tokens=warm)
            worker.lap(completion_tokens=length)
        cold = {name: worker.laps[1]["seconds"] for name, worker in projects.items()}
        for worker in projects.values():
            worker.laps.clear()
        request = {"rows": workload.prompts * workload.samples, "times": max(1, length // 4), "side": 2048}
        for _ in range(repetitions):  # the machine's rate is measured between the laps, since it changes with the load
            alternating([*projects.values()], {"completion_tokens": length}, 1)
            others[OURS].lap(**request)
        whole = {name: list(worker.laps) for name, worker in projects.items()}
        alternating([*projects.values()], {"completion_tokens": 1}, repetitions)
        first = {name: worker.laps[repetitions:] for name, worker in projects.items()}
        for name, laps in whole.items():
            if any(lap["tokens"] != workload.tokens for lap in laps):
                raise RuntimeError(f"{name} sampled {laps[0]['tokens']} tokens and not {workload.tokens}")
        rates = others[OURS].laps
        return {
            "versions": versions_of(projects),
            "flops": rates[0]["flops_per_token"] * workload.tokens,
            "rate_at_shape": median_of(rates, "at_shape"),
            "rate_square": median_of(rates, "square"),
            "projects": {
                name: {
                    "seconds": median_of(whole[name]),
                    "all_seconds": [lap["seconds"] for lap in whole[name]],
                    "ratio": statistics.median(
                        lap["seconds"] / ours["seconds"] for lap, ours in zip(whole[name], whole[OURS], strict=True)
                    ),
                    "cpu_seconds": median_of(whole[name], "cpu_seconds"),
                    "first_token": median_of(first[name]),
                    "first_call": cold[name],
                    "peak_memory": whole[name][-1]["peak_memory"],
                }
                for name in projects
            },
        }


def print_compared(console: Console, name: str, workload: Workload, found: Mapping[str, Any]) -> None:
    """The table of one workload."""
    rows = []
    for project, one in found["projects"].items():
        rate = found["flops"] / one["seconds"]
        rows.append(
            {
                name: project,
                "s": f"{one['seconds']:.2f}",
                "tokens/s": f"{workload.tokens / one['seconds']:,.0f}",
                "of ours": f"{one['ratio']:.2f}x",
                "CPU s": f"{one['cpu_seconds']:.2f}",
                "1st token": f"{one['first_token'] * 1e3:.0f} ms",
                "1st call": f"{one['first_call']:.1f} s",
                "MiB": f"{one['peak_memory'] / 2**20:,.0f}",
                "of limit": f"{rate / found['rate_at_shape']:.0%} / {rate / found['rate_square']:.0%}",
            }
        )
    shown(console, f"{name}: {workload.prompts} x {workload.samples} completions", rows, note_on(found))


def skewed_lengths(requests: int, short: int, long: int, share: float) -> list[int]:
    """Lengths of requests in random order: most short, some long."""
    drawn = np.random.default_rng(0).random(requests) < share
    return np.where(drawn, long, short).tolist()


def skewed(workload: Workload, python: str, options: argparse.Namespace) -> dict[str, Any]:
    """The same engine with slots, and in batches of as many rows, on requests of very different lengths."""
    lengths = skewed_lengths(options.requests, options.short, options.long, options.long_share)
    workload = replace(workload, prompts=options.requests // workload.samples, completion_tokens=max(lengths))
    with (
        workers("skewed", workload, {OURS: python}) as with_slots,
        workers("skewed", workload, {OURS: python}) as without,
    ):
        cases = {True: with_slots[OURS], False: without[OURS]}
        request = {"lengths": lengths, "slots": options.slots, "seed": 0}
        for repetition in range(options.repetitions + 1):
            for in_slots, worker in cases.items():
                worker.lap(**request, in_slots=in_slots)
                if repetition == 0:
                    worker.laps.clear()
        pairs = zip(cases[False].laps, cases[True].laps, strict=True)
        return {
            "lengths": lengths,
            "ratio": statistics.median(one["seconds"] / other["seconds"] for one, other in pairs),
            "cases": {
                name: {
                    key: median_of(worker.laps, key)
                    for key in ("seconds", "tokens", "utilisation", "calls", "peak_memory")
                }
                for name, worker in (("in batches", cases[False]), ("in slots", cases[True]))
            },
        }


def print_skewed(console: Console, name: str, found: Mapping[str, Any], slots: int) -> None:
    """The table of decoding with slots and without."""
    rows = [
        {
            name: case,
            "seconds": f"{one['seconds']:.2f}",
            "tokens/s": f"{one['tokens'] / one['seconds']:,.0f}",
            "slots in use": f"{one['utilisation']:.0%}",
            "decoding steps": f"{one['calls']:.0f}",
            "peak memory": f"{one['peak_memory'] / 2**20:,.0f} MiB",
        }
        for case, one in found["cases"].items()
    ]
    lengths = found["lengths"]
    title = f"{name}: {len(lengths)} requests of {min(lengths)} or {max(lengths)} tokens, {slots} at a time"
    shown(console, title, rows, f"throughput in slots is {found['ratio']:.2f}x that in batches")


def prefill(workload: Workload, python: str, prompt: int, samples: int, repetitions: int) -> dict[str, Any]:
    """A long prompt prefilled once for its samples, and once for each of them."""
    workload = replace(workload, prompts=1, prompt_length=prompt, samples=samples, completion_tokens=2)
    with workers("prefill", workload, {OURS: python}) as shared, workers("prefill", workload, {OURS: python}) as single:
        cases: dict[str, tuple[Worker, bool]] = {
            "one a prompt": (shared[OURS], True),
            "one a sample": (single[OURS], False),
        }
        for repetition in range(repetitions + 1):
            for worker, together in cases.values():
                worker.lap(shared=together)
                if repetition == 0:
                    worker.laps.clear()
        names = ("seconds", "flops", "cache_bytes", "peak_memory")
        return {case: {name: median_of(worker.laps, name) for name in names} for case, (worker, _) in cases.items()}


def print_prefill(console: Console, name: str, found: Mapping[str, Any], prompt: int, samples: int) -> None:
    """The table of the shared prefill."""
    rows = [
        {
            name: case,
            "first tokens after": f"{one['seconds'] * 1e3:.0f} ms",
            "compiled": f"{one['flops'] / 1e9:.1f} GFLOP",
            "prompt cache": f"{one['cache_bytes'] / 2**20:.1f} MiB",
            "peak memory": f"{one['peak_memory'] / 2**20:,.0f} MiB",
        }
        for case, one in found.items()
    ]
    shown(console, f"{name}: prefill of a prompt of {prompt} tokens with {samples} samples", rows)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line, measure, print."""
    made = parser(__doc__)
    made.add_argument(
        "--skewed", action="store_true", help="completions of very different lengths, with slots and without"
    )
    made.add_argument("--requests", type=int, default=128, help="of --skewed (default: 128)")
    made.add_argument("--slots", type=int, default=SLOTS, help=f"of --skewed (default: {SLOTS})")
    made.add_argument("--short", type=int, default=20, help="most lengths of --skewed (default: 20)")
    made.add_argument("--long", type=int, default=200, help="the other lengths of --skewed (default: 200)")
    made.add_argument("--long-share", type=float, default=0.1, help="share of long ones (default: 0.1)")
    made.add_argument("--prompt", type=int, default=None, help="time the prefill of a prompt of this length")
    made.add_argument("--samples", type=int, default=16, help="completions of that prompt (default: 16)")
    made.add_argument("--of", choices=WORKLOADS, default="W1", help="model of --skewed and --prompt (default: W1)")
    options = made.parse_args(arguments)
    console = Console()
    figures: dict[str, Any] = {"machine": machine()}
    console.print("{date}, {cores} cores, load {load}, Python {python}".format(**figures["machine"]))
    pythons = peers(options, console)
    for name in options.workload:
        figures[name] = compared(WORKLOADS[name], pythons, options.repetitions)
        print_compared(console, name, WORKLOADS[name], figures[name])
    model = WORKLOADS[options.of]
    if options.skewed:
        figures["skewed"] = skewed(model, pythons[OURS], options)
        print_skewed(console, options.of, figures["skewed"], options.slots)
    if options.prompt:
        figures["prefill"] = prefill(model, pythons[OURS], options.prompt, options.samples, options.repetitions)
        print_prefill(console, options.of, figures["prefill"], options.prompt, options.samples)
    written(options.json, figures)
    return figures


if __name__ == "__main__":
    main()
