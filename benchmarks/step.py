"""Time of one step of GRPO: ours compared with TRL's GRPOTrainer and Tunix's GRPOLearner.

    python benchmarks/step.py --workload W1 W2 --trl-python ../trl/bin/python --tunix-python ../tunix/bin/python

A step is rollout, reward, reference log-probabilities, and one update with clip and KL. All projects have the same
weights (float32), prompts, reward, optimiser and coefficients, and sample completions of full length. They run in turn,
in their fastest settings. The time until the end of the first step, including compilation, is reported separately; one
more step is not timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from side_by_side import (
    OURS,
    TRANSFORMERS,
    WORKLOADS,
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


def step_flops(workload: Workload, flops_per_token: float) -> float:
    """Least operations of a step in products with the weights: each prompt once; each completion token sampled, scored
    by the reference, and differentiated (a forward pass, and a backward pass of twice its operations).
    """
    prompt = workload.prompts * workload.prompt_length
    return flops_per_token * (workload.tokens * (1 + 1 + 3) + prompt * (1 + 1 + 3))


def compared(workload: Workload, pythons: Mapping[str, str], repetitions: int) -> dict[str, Any]:
    """The figures of one workload: one entry per project, and the machine's rates."""
    with (
        workers("step", workload, pythons) as projects,
        workers("matrices", workload, {OURS: pythons[OURS]}) as others,
    ):
        alternating([*projects.values()], {}, 2)
        request = {"rows": workload.prompts * workload.samples, "times": max(1, workload.completion_tokens // 4)}
        for _ in range(repetitions):
            alternating([*projects.values()], {}, 1)
            others[OURS].lap(**request, side=2048)
        laps = {name: worker.laps[2:] for name, worker in projects.items()}
        for name, timed in laps.items():
            if any(lap["tokens"] != workload.tokens for lap in timed):
                raise RuntimeError(
                    f"{name} sampled {[lap['tokens'] for lap in timed]} tokens and not {workload.tokens}"
                )
        rates = others[OURS].laps
        return {
            "versions": versions_of(projects),
            "flops": step_flops(workload, rates[0]["flops_per_token"]),
            "rate_at_shape": median_of(rates, "at_shape"),
            "rate_square": median_of(rates, "square"),
            "projects": {
                name: {
                    "seconds": median_of(timed),
                    "all_seconds": [lap["seconds"] for lap in timed],
                    "ratio": statistics.median(
                        lap["seconds"] / ours["seconds"] for lap, ours in zip(timed, laps[OURS], strict=True)
                    ),
                    "cpu_seconds": median_of(timed, "cpu_seconds"),
                    "first_step": projects[name].laps[0]["seconds"],
                    "peak_memory": timed[-1]["peak_memory"],
                }
                for name, timed in laps.items()
            },
        }


def print_compared(console: Console, name: str, found: Mapping[str, Any]) -> None:
    """The table of one workload."""
    rows = []
    for project, one in found["projects"].items():
        rate = found["flops"] / one["seconds"]
        rows.append(
            {
                name: "TRL" if project == TRANSFORMERS else project,
                "s a step": f"{one['seconds']:.2f}",
                "of ours": f"{one['ratio']:.2f}x",
                "CPU s": f"{one['cpu_seconds']:.2f}",
                "1st step": f"{one['first_step']:.1f} s",
                "GiB": f"{one['peak_memory'] / 2**30:.2f}",
                "of limit": f"{rate / found['rate_at_shape']:.0%} / {rate / found['rate_square']:.0%}",
            }
        )
    shown(console, f"{name}: one step of GRPO", rows, note_on(found))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line, measure, print."""
    options = parser(__doc__).parse_args(arguments)
    console = Console()
    figures: dict[str, Any] = {"machine": machine()}
    console.print("{date}, {cores} cores, load {load}, Python {python}".format(**figures["machine"]))
    pythons = peers(options, console)
    for name in options.workload:
        figures[name] = compared(WORKLOADS[name], pythons, options.repetitions)
        print_compared(console, name, figures[name])
    written(options.json, figures)
    return figures


if __name__ == "__main__":
    main()
