"""Profile of traced steps: seconds, operations and memory traffic of each phase, relative to the machine's maxima.

A trace has the times of each instruction of a compiled program. Its work is computed from the program's text and
counted for each run, so data-dependent loops are counted correctly.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.planning.ahead import PHASES
from jaxrl_llm.planning.hlo import Cost, Program, add_cost, costs
from jaxrl_llm.run.explain import programs_with_inputs
from jaxrl_llm.run.setup import Parts

# Instructions whose events contain those of others.
_AROUND = frozenset({"while", "conditional", "call"})


def phase_table(texts: Sequence[str], events: Mapping[tuple[str, str], tuple[int, float]], steps: int) -> list[dict]:
    """Time and work of each phase of a step.

    Args:
      texts: compiled programs.
      events: (module, instruction) -> (number of runs, total seconds).
      steps: that were traced.

    Returns:
      One row per phase, the longest first: phase, seconds, flops and bytes per step; `other` has all other
      instructions.
    """
    rows: dict[str, dict[str, float]] = defaultdict(lambda: {"seconds": 0.0, "flops": 0.0, "bytes": 0.0})
    for text in texts:
        program = Program(text)
        module = re.match(r"HloModule ([\w.\-]+)", text)
        _, belongs = costs(program, PHASES)
        for computation, body in program.computations.items():
            for one in body:
                count, seconds = events.get((module[1] if module else "", one.name), (0, 0.0))
                if not count or one.op in _AROUND:
                    continue
                work, row = Cost(), rows[belongs.get(one.name, "other")]
                add_cost(work, program, computation, one, 1.0, None)
                row["seconds"] += seconds / steps
                row["flops"] += work.flops * count / steps
                row["bytes"] += work.bytes * count / steps
    return sorted(({"phase": name, **row} for name, row in rows.items()), key=lambda row: -row["seconds"])


def traced_events(directory: Path) -> dict[tuple[str, str], tuple[int, float]]:
    """(module, instruction) -> (number of runs, total seconds) of the newest trace, over all devices.

    Raises:
      ValueError: where there is no trace.
    """
    files = sorted(directory.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ValueError(f"{directory} holds no trace (*.xplane.pb)")
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for key, seconds in _executions(jax.profiler.ProfileData.from_file(str(files[-1]))):
        count, total = found.get(key, (0, 0.0))
        found[key] = count + 1, total + seconds
    return found


def _executions(trace: Any) -> Iterator[tuple[tuple[str, str], float]]:
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                facts = dict(event.stats)
                if "hlo_op" in facts and not event.name.startswith("end: "):
                    yield (str(facts.get("hlo_module", "")), str(facts["hlo_op"])), event.duration_ns / 1e9


def ceilings(dtype: str = "float32", *, size: int = 1024, length: int = 1 << 25, repeats: int = 5) -> dict[str, float]:
    """Measured maxima of this machine: operations per second of a product, bytes per second of a sum.

    Args:
      dtype: of the product.
      size: rows and columns of its factors, which are random: some devices multiply constants faster.
      length: float32 numbers of the sum, each of which is read and written.
      repeats: number of repetitions, of which the fastest counts.
    """
    passes = 10  # in one program, so that the time of a call does not count

    def product(x: Any) -> Any:
        return jax.lax.fori_loop(0, passes, lambda _, y: (y @ x) * jnp.asarray(size**-0.5, x.dtype), x)

    def added(x: Any) -> Any:
        return jax.lax.fori_loop(0, passes, lambda _, y: y + 1.0, x)

    def fastest(function: Any, value: Any) -> float:
        call, times = jax.jit(function), []
        for _ in range(repeats + 1):  # the first compiles
            begun = time.perf_counter()
            call(value).block_until_ready()
            times.append(time.perf_counter() - begun)
        return min(times) / passes

    factor = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    moved = 2 * 4 * length / fastest(added, jnp.ones((length,), jnp.float32))
    return {"flops": 2 * size**3 / fastest(product, factor), "bytes": moved}


def profile(built: Parts, directory: Path, steps: int) -> dict[str, Any]:
    """The table of a traced run: phases with their shares of the measured ceilings.

    Args:
      built: the parts of the traced stage.
      directory: of the trace.
      steps: that were traced.

    Returns:
      `ceilings` and `phases`; a phase has phase, seconds, share, flops and bytes per second, and their shares of the
      ceilings.
    """
    texts = [program.lower(*given).compile().as_text() for _, program, given in programs_with_inputs(built)]
    most = ceilings(built.config.model.compute_dtype)
    rows = phase_table(texts, traced_events(directory), steps)
    total = sum(row["seconds"] for row in rows) or 1.0
    for row in rows:
        row["share"] = row["seconds"] / total
        for kind in ("flops", "bytes"):
            row[f"{kind}_per_second"] = row[kind] / row["seconds"] if row["seconds"] else 0.0
            row[f"{kind}_of_ceiling"] = row[f"{kind}_per_second"] / most[kind]
    return {"ceilings": most, "phases": rows}
