"""Shared parts of the comparisons with other projects: workloads, weights, and workers that are timed in turn.

Each project runs in its own long-lived process, with the interpreter of the environment where it is installed. Only one
worker runs at a time, and repetitions alternate (A B C A B C), so that other load on the machine affects all equally.
Compare ratios within one run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jaxrl_llm.models import TransformerConfig, save_model, transformer

ROOT = Path(__file__).parents[1]
WORKERS = Path(__file__).parent / "workers"
OURS, TRANSFORMERS, TUNIX = "jaxrl_llm", "transformers", "tunix"
SCRIPTS = {OURS: "with_jaxrl_llm.py", TRANSFORMERS: "with_transformers.py", TUNIX: "with_tunix.py"}
# No compilation cache, so that compilation is timed; no preallocation, since workers share the memory of a GPU.
COMPILES = {"JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
# Memory that the C library returns to the system is allocated again page by page, which is a fifth of torch's update.
KEEPS_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
ENVIRONMENTS = {OURS: COMPILES, TRANSFORMERS: KEEPS_MEMORY, TUNIX: COMPILES}


@dataclass(frozen=True)
class Workload:
    """A model of the Qwen3 architecture, and the sizes of a rollout and a training step.

    Attributes:
      vocabulary, width, layers, heads, kv_heads, head_width, mlp_width: sizes of the model.
      prompts, prompt_length: number and length of the prompts.
      samples: completions of each prompt.
      completion_tokens: length of each completion; none ends earlier.
      clip, kl, learning_rate: of the training step.
      dtype: of parameters, moments and products.
      settings: settings for single workers.
    """

    vocabulary: int = 4096
    width: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 64
    mlp_width: int = 768
    prompts: int = 8
    prompt_length: int = 32
    samples: int = 8
    completion_tokens: int = 64
    clip: float = 0.2
    kl: float = 0.04
    learning_rate: float = 1e-5
    dtype: str = "float32"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens that one rollout samples."""
        return self.prompts * self.samples * self.completion_tokens

    @property
    def config(self) -> TransformerConfig:
        """The model."""
        sizes = {
            name: getattr(self, name) for name in ("width", "layers", "heads", "kv_heads", "head_width", "mlp_width")
        }
        # The rotary base of Qwen3, which is fixed in Tunix.
        dtypes = {"parameter_dtype": self.dtype, "compute_dtype": self.dtype}
        return TransformerConfig(vocabulary_size=self.vocabulary, rope_base=1e6, **sizes, **dtypes)

    def described(self) -> dict[str, Any]:
        """The workload as JSON for workers, with the tokens of the prompts."""
        drawn = np.random.default_rng(0).integers(1, self.vocabulary, (self.prompts, self.prompt_length))
        return {**asdict(self), **self.settings, "prompt_tokens": drawn.tolist()}


WORKLOADS = {
    # The microbatch of our step fits the caches and the memory of a CPU.
    "W1": Workload(settings={"sequences_per_microbatch": 16}),
    "W2": Workload(
        width=512,
        layers=8,
        heads=8,
        kv_heads=4,
        mlp_width=1536,
        completion_tokens=128,
        settings={"sequences_per_microbatch": 8},
    ),
    # For a GPU: Qwen3-0.6B, all in bfloat16.
    "G1": Workload(
        vocabulary=151_936,
        width=1024,
        layers=28,
        heads=16,
        kv_heads=8,
        head_width=128,
        mlp_width=3072,
        prompts=16,
        prompt_length=128,
        completion_tokens=256,
        dtype="bfloat16",
        settings={"sequences_per_microbatch": 32, "trl_rows": 32},
    ),
    "tiny": Workload(
        vocabulary=64,
        width=16,
        layers=1,
        heads=2,
        kv_heads=1,
        head_width=8,
        mlp_width=32,
        prompts=2,
        prompt_length=4,
        samples=2,
        completion_tokens=4,
    ),
}


class Worker:
    """A process that does one job (see workers/laps.py).

    Attributes:
      ready: its first answer, when it is ready.
      laps: its answers, one per lap.
    """

    def __init__(
        self,
        project: str,
        what: str,
        workload: Workload,
        weights: Path,
        *,
        python: str = sys.executable,
    ):
        self.project, self.laps = project, []
        with_ours = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (`close` closes it)
        self._process = subprocess.Popen(
            [python, str(WORKERS / SCRIPTS[project]), what, json.dumps(workload.described()), str(weights)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **ENVIRONMENTS[project], **(with_ours if project == OURS else {})},
        )
        self.ready = self._answer()

    def lap(self, **request: Any) -> dict[str, Any]:
        """Run one lap, and return the answer with its seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        self.laps.append(self._answer())
        return self.laps[-1]

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise RuntimeError(f"the worker of {self.project} ended:\n{self._log.read()[-4000:]}")
        return json.loads(line)


def parser(description: str | None, repetitions: int = 5) -> argparse.ArgumentParser:
    """The shared arguments of the comparisons."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--workload", nargs="*", choices=WORKLOADS, default=["W1", "W2"], help="what to time (default: W1 W2)"
    )
    made.add_argument("--repetitions", type=int, default=repetitions, help=f"timed laps (default: {repetitions})")
    made.add_argument(
        "--trl-python",
        default=os.environ.get("TRL_PYTHON"),
        help="interpreter where TRL is installed (default: $TRL_PYTHON)",
    )
    made.add_argument(
        "--tunix-python",
        default=os.environ.get("TUNIX_PYTHON"),
        help="interpreter where Tunix is installed (default: $TUNIX_PYTHON)",
    )
    made.add_argument("--json", type=Path, default=None, help="also write the figures here")
    return made


def peers(options: argparse.Namespace, console: Console) -> dict[str, str]:
    """The interpreter of each compared project, ours first."""
    found = {OURS: sys.executable}
    asked = ((TRANSFORMERS, "trl", options.trl_python), (TUNIX, "tunix", options.tunix_python))
    for project, package, python in asked:
        if not python:
            console.print(f"{project} is omitted: give --{package}-python, an interpreter that can import {package}")
        elif subprocess.run([python, "-c", f"import {package}"], capture_output=True).returncode:
            console.print(f"{project} is left out: {python} cannot import {package}")
        else:
            found[project] = python
    return found


@contextmanager
def exported(workload: Workload) -> Iterator[Path]:
    """A directory with the weights of a workload in the format of transformers."""
    with tempfile.TemporaryDirectory() as directory:
        weights = Path(directory) / "weights"
        model = transformer(workload.config)
        save_model(weights, model.init(jax.random.key(0)), workload.config)
        yield weights


@contextmanager
def workers(what: str, workload: Workload, pythons: Mapping[str, str]) -> Iterator[dict[str, Worker]]:
    """A context with a ready worker for each project, all with the same weights."""
    with exported(workload) as weights, ExitStack() as stack:
        made = {}
        for project, python in pythons.items():
            made[project] = Worker(project, what, workload, weights, python=python)
            stack.callback(made[project].close)
        known = {project: worker.ready.get("prompt_logprob") for project, worker in made.items()}
        numbers = [number for number in known.values() if number is not None]
        if numbers and max(numbers) - min(numbers) > (1e-4 if workload.dtype == "float32" else 2e-2):
            raise RuntimeError(
                f"the workers do not have the same weights: log-probabilities of the prompts are {known}"
            )
        yield made


def alternating(workers: Sequence[Worker], request: Mapping[str, Any], repetitions: int) -> None:
    """Time workers in turn: A B C A B C."""
    for _ in range(repetitions):
        for worker in workers:
            worker.lap(**request)


def median_of(laps: Sequence[Mapping[str, Any]], name: str = "seconds") -> float:
    """The median of one number over laps."""
    return statistics.median(lap[name] for lap in laps)


def machine() -> dict[str, Any]:
    """Date, cores, load and versions of this machine."""
    return {
        "date": datetime.date.today().isoformat(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": sys.version.split()[0],
    }


def shown(console: Console, title: str, rows: Sequence[Mapping[str, str]], note: str = "") -> None:
    """A table; the first column names the rows."""
    table = Table(title=title, title_justify="left", caption=note or None, caption_justify="left", box=SIMPLE_HEAD)
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def note_on(found: Mapping[str, Any]) -> str:
    """A note with the machine's rates and the compared versions."""
    rates = [f"{found[name] / 1e9:.0f} GFLOP/s" for name in ("rate_at_shape", "rate_square")]
    packages = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    limit = f"{rates[0]} (products with the weights at the batch of the rollout) / {rates[1]} (a large square product)"
    return f"the limit is {limit}; {packages}"


def written(path: Path | None, figures: Any) -> None:
    """Write the figures as JSON."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n")


def versions_of(workers: Mapping[str, Worker]) -> dict[str, str]:
    """Versions of all compared projects, by package and project."""
    return {
        (name if name == project else f"{name} ({project})"): version
        for project, worker in workers.items()
        for name, version in worker.ready["versions"].items()
    }
