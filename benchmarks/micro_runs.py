"""Micro-runs of all recipes, compared bit for bit: whether a change of the engine changes a number.

    python benchmarks/micro_runs.py before.json                           # on the old commit
    python benchmarks/micro_runs.py after.json --against before.json      # on the new one: a table, and status 1

Every recipe of configs/methods with a paper, and the other configs that train a model from random parameters, are run
by `jaxrl train` at micro size: one layer of width 16, a supervised warm start, three reinforcement steps, evaluation
before, during and after. The output has each metric of each step of both stages, the samples, the results of the
evaluations, a hash of each array of the last checkpoint, and the compiled programs by stage. Floats are written in
hexadecimal, so that equal text means equal bits. Measured times are omitted.

The output is written after each recipe; `--resume` runs the recipes that are missing or failed, `--only grpo ppo` runs
these. Numbers are comparable only on one machine, with the same versions of jax and the same `--optimised`. All uses of
the package are in one block below.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAXRL_COMPILATION_CACHE"] = "0"  # no programs of other processes, see `run_all`
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import argparse
import contextlib
import gc
import hashlib
import io
import json
import platform
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

CHECKOUT = Path(__file__).parents[1]
sys.path.insert(0, str(CHECKOUT))  # the package of this checkout, not an installed one
CONFIGS = CHECKOUT / "configs"
OTHERS = ("demo", "lengths", "competing_rewards", "countdown", "grid", "calculator", "bargaining", "self_correction")
STEPS, LEARNING_RATE = 3, 0.002
QUESTIONS = ("claims", "attempts")  # options of the task "chain"


class Micro(NamedTuple):
    """A micro task: its options, the longest prompt, completion and turn, and steps of the warm start.

    After the warm start some answers are right and some are wrong, so that advantages are not all zero.
    """

    options: dict[str, Any]
    prompt: int
    completion: int
    turn: int = 6
    warm_start: int = 64


MICRO = {
    "addition": Micro({"levels": [1], "options": {"scratchpad": False}}, 7, 6),
    "chain": Micro({"levels": [1], "options": {"direct_share": 0.5}}, 8, 12),
    "calculator": Micro({"levels": [1]}, 15, 32, turn=16, warm_start=240),
    "countdown": Micro({"levels": [2], "options": {"scratchpad": False, "largest_number": 9}}, 12, 8, warm_start=80),
    "grid": Micro({"levels": [1, 2], "options": {"size": 3}}, 22, 32),
    "function_calls": Micro({"levels": [1]}, 9, 22),
    "sorting": Micro({"levels": [3]}, 15, 12),
    "bargaining": Micro({"levels": [2]}, 9, 40),
    "self_correction": Micro({"levels": [1], "options": {"problem_options": {"scratchpad": False}}}, 7, 14),
}

# ---- uses of the package: adapt this block when its engine changes --------------------------------------------------


def config_tree(path: Path) -> dict[str, Any]:
    """A config as plain dictionaries, merged with the configs that it extends."""
    from jaxrl_llm.config import read_tree

    return read_tree(path)


def train(config: Path, run_directory: Path) -> None:
    """Run `jaxrl train` of a config in this process; raises RuntimeError with its error output."""
    from jaxrl_llm import cli

    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        status = cli.main(["train", str(config), f"run_dir={run_directory}", "--json"])
    if status != 0:
        raise RuntimeError(said.getvalue().strip()[-2000:])


def last_state(run_directory: Path) -> dict[str, Any]:
    """The newest checkpoint as nested dictionaries of arrays, read without the code of the package."""
    import orbax.checkpoint as ocp

    newest = max((path for path in (run_directory / "checkpoints").iterdir() if path.name.isdigit()), key=_number)
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(newest / "state")


def policy_of(state: dict[str, Any]) -> Any:
    """The policy's parameters in a result of `last_state`."""
    return state["networks"]["policy"]["params"]


# Files of a run directory, and the recorded fields of its summary.
METRICS, SAMPLES, SUMMARY = "metrics.jsonl", "samples.jsonl", "summary.json"
FROM_SUMMARY = ("before", "after", "completion_tokens_sampled", "warm_start_steps", "steps", "data")

# ---------------------------------------------------------------------------------------------------------------------


def _number(path: Path) -> int:
    return int(path.name)


def recipes() -> dict[str, Path]:
    """All configs to run, by name; those that are not recipes of methods have the prefix configs/."""
    found = {path.stem: path for path in sorted((CONFIGS / "methods").rglob("*.yaml"))}
    found = {name: path for name, path in found.items() if config_tree(path).get("about", {}).get("paper")}
    return found | {f"configs/{name}": CONFIGS / f"{name}.yaml" for name in OTHERS}


def small(path: Path, data_directory: Path) -> dict[str, Any]:
    """A config for a micro model: the same method with fewer and shorter samples."""
    tree = config_tree(path)
    rollout, training, task = tree["rollout"], tree["training"], tree["task"]["name"]
    micro = MICRO[task]
    question = {name: value for name, value in tree["task"].get("options", {}).items() if name in QUESTIONS}
    if question:  # of a judge or a critic: the prompt also has one or two results
        micro = micro._replace(options=micro.options | {"options": question}, prompt=micro.prompt + 4)
    samples = min(rollout["samples_per_prompt"], 4)
    cuts = min(training.get("minibatches_per_epoch", 1), 2)
    plan = rollout.get("plan") or {}
    hints = plan.get("prefixes", {}).get("texts", []) if isinstance(plan, dict) else []
    hint = max(map(len, hints), default=0)
    rollout |= {"samples_per_prompt": samples, "max_prompt_tokens": micro.prompt}
    rollout |= {"max_completion_tokens": micro.completion + hint}
    if "environment" in tree:
        tree["environment"]["max_turn_tokens"] = micro.turn
    training |= {"steps": STEPS, "prompts_per_step": 4, "minibatches_per_epoch": cuts}
    training |= {"learning_rate": LEARNING_RATE, "warmup_steps": 0}
    for stage in tree.get("stages", []):
        if "steps" in stage.get("training", {}):
            stage["training"]["steps"] = min(stage["training"]["steps"], STEPS)
    if training.get("freeze_policy_steps"):
        training["freeze_policy_steps"] = 1
    if training.get("alignment_every_steps"):
        training["alignment_every_steps"] = 2
    if rollout.get("slots"):
        rollout["slots"] = 8
    for entry in tree.get("source", []):
        for name, hyper in entry.items() if isinstance(entry, dict) else ():
            if "sequences_per_step" in hyper:
                hyper["sequences_per_step"] = samples * cuts
            if name == "solved_answers":  # the micro policy solves few prompts reliably
                hyper |= {"attempts": 1, "min_correct": 1}
    for entry in tree["credit"]:
        for method in entry.values():
            if isinstance(method, dict) and "sample_budgets" in method:
                method["sample_budgets"]["samples_per_prompt"] = samples
    return tree | {
        "task": {"name": task, "train_items": 64, "validation_items": 4, "test_items": 4} | micro.options,
        "data": {"directory": str(data_directory)},
        "model": {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1},
        "warm_start": {
            "steps": micro.warm_start,
            "sequences_per_step": 32,
            "learning_rate": 0.02,
            "warmup_steps": 2,
            "probe_every_steps": micro.warm_start // 2,
        },
        "rollout": rollout,
        "training": training,
        "evaluation": {"problems": 4, "samples_per_problem": 2, "k": [1, 2], "sequences_per_batch": 16}
        | {"every_steps": 2},
        "checkpoints": {"every_steps": 10_000, "keep": 1},
        "reporting": {"samples_every_steps": 1, "samples_per_report": 8},
    }


def hexadecimal(value: Any) -> Any:
    """The same value with each float as hexadecimal text, which is exact."""
    if isinstance(value, dict):
        return {name: hexadecimal(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [hexadecimal(entry) for entry in value]
    return value.hex() if isinstance(value, float) else value


def hashes(tree: Any) -> list[str]:
    """The sorted hashes of all arrays, independent of their places in the tree."""
    leaves = jax.tree.leaves(tree)
    plain = [jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves]
    return sorted(hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()[:16] for x in plain)


class Compilations:
    """The programs that are compiled during a run, each with the number of metric lines at that time."""

    def __init__(self):
        self.seen: list[tuple[int, str]] = []
        self.metrics: Path | None = None
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def follow(self, metrics: Path | None) -> None:
        """Record compilations of the run with this metrics file from now on; None stops recording."""
        self.seen, self.metrics = ([], metrics) if metrics else (self.seen, None)

    def _listen(self, event: str, _: float, fun_name: str = "?", **__: Any) -> None:
        if self.metrics is not None and event == "/jax/core/compile/backend_compile_duration":
            lines = self.metrics.read_bytes().count(b"\n") if self.metrics.exists() else 0
            self.seen.append((lines, fun_name))

    def found(self, warm_start_steps: int) -> dict[str, Any]:
        """Numbers of compilations before, at and after the first step, and the names of the programs."""
        last = warm_start_steps + STEPS

        def stage(lines: int) -> str:
            if lines < warm_start_steps:
                return "warm start"
            # Metrics of a step are written after the next step has started.
            return "first steps" if lines == warm_start_steps else "later steps" if lines < last else "afterwards"

        counted = Counter(stage(lines) for lines, _ in self.seen)
        names = {part: Counter(name for lines, name in self.seen if stage(lines) == part) for part in counted}
        return {
            "compilations": {"all": len(self.seen)} | counted,
            "programs": {part: dict(sorted(counts.items())) for part, counts in names.items()},
        }


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON objects."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def recorded(path: Path, folder: Path, data_directory: Path, compilations: Compilations) -> dict[str, Any]:
    """Run one recipe at micro size, and return everything that is compared."""
    config, run = folder / "config.yaml", folder / "run"
    config.write_text(yaml.safe_dump(small(path, data_directory), sort_keys=False))
    compilations.follow(run / METRICS)
    try:
        train(config, run)
    finally:
        compilations.follow(None)
    summary, state = json.loads((run / SUMMARY).read_text()), last_state(run)
    return {
        "metrics": hexadecimal(records(run / METRICS)),
        "samples": hexadecimal(records(run / SAMPLES)),
        "summary": hexadecimal({name: summary[name] for name in FROM_SUMMARY if name in summary}),
        "policy": hashes(policy_of(state)),
        "state": hashes(state),
        **compilations.found(summary["warm_start_steps"]),
    }


# ---- comparison -----------------------------------------------------------------------------------------------------

Difference = tuple[str, str, str, str]  # where, what, before, after
ABSENT = "—"


def shown(value: Any) -> str:
    """A recorded value for display, with hexadecimal floats as decimals of full precision."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return repr(float.fromhex(value)) if "0x" in value else value
    return str(value)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries, by path."""
    if not isinstance(value, dict):
        return {name: value}
    found: dict[str, Any] = {}
    for key, entry in value.items():
        found |= flat(entry, f"{name}.{key}" if name else str(key))
    return found


def differing(where: str, old: dict[str, Any], new: dict[str, Any]) -> list[Difference]:
    """Every name whose values differ, or that only one of the two has."""
    old, new = flat(old), flat(new)
    return [
        (where, name, shown(old.get(name, ABSENT)), shown(new.get(name, ABSENT)))
        for name in old | new
        if old.get(name, ABSENT) != new.get(name, ABSENT)
    ]


def differing_rows(kind: str, old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[Difference]:
    """Differences of the lines of a file."""
    found: list[Difference] = []
    if len(old) != len(new):
        found.append((kind, "number of lines", str(len(old)), str(len(new))))
    for index, (before, after) in enumerate(zip(old, new, strict=False)):
        line = f" line {index + 1}" if kind == SAMPLES else f", {after.get('stage', '')}"
        found += differing(f"{kind} step {after.get('step', '?')}{line}", before, after)
    return found


def differing_arrays(kind: str, old: list[str], new: list[str]) -> list[Difference]:
    """Numbers of arrays that only one of the two has."""
    before, after = Counter(old), Counter(new)
    lost, gained = (before - after).total(), (after - before).total()
    if not lost and not gained:
        return []
    only = f"{len(old)} arrays, {lost} of them only here", f"{len(new)} arrays, {gained} of them only here"
    return [("last checkpoint", kind, *only)]


def lasting(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without measurements of time and of the machine."""
    from jaxrl_llm.reporting.metric_table import OF_MACHINE

    return [
        {name: value for name, value in line.items() if name not in OF_MACHINE and not name.startswith("seconds/")}
        for line in lines
    ]


def compared(old: dict[str, Any], new: dict[str, Any]) -> list[Difference]:
    """All differences of two micro-runs of a recipe."""
    if "failed" in old or "failed" in new:
        of = [one.get("failed", "ran").strip().splitlines()[-1][:120] for one in (old, new)]
        return [("run", "failed", *of)]
    return [
        *differing_rows(METRICS, lasting(old["metrics"]), lasting(new["metrics"])),
        *differing_rows(SAMPLES, old["samples"], new["samples"]),
        *differing(SUMMARY, old["summary"], new["summary"]),
        *differing_arrays("policy", old["policy"], new["policy"]),
        *differing_arrays("state", old["state"], new["state"]),
        *differing("compilations", old["compilations"], new["compilations"]),
    ]


def compare(console: Console, old: dict[str, Any], new: dict[str, Any], names: list[str], most: int) -> int:
    """Print the differences of two results, and return the number of recipes that differ."""
    for name, value in old["settings"].items():
        if value != new["settings"].get(name):
            console.print(f"[bold]other settings[/]: {name} was {value}, and is {new['settings'].get(name)}")
    differ, same = 0, 0
    table = Table("recipe", "where", "what", "before", "after", title="differences")
    for name in names:
        if name not in old["runs"] or name not in new["runs"]:
            found = [("file", "recipe", *("there" if name in one["runs"] else ABSENT for one in (old, new)))]
        else:
            found = compared(old["runs"][name], new["runs"][name])
        differ, same = differ + bool(found), same + (not found)
        for index, row in enumerate(found[:most]):
            table.add_row("" if index else name, *map(escape, row))
        if len(found) > most:
            table.add_row("", "", f"and {len(found) - most} more")
        if found:
            table.add_section()
    if differ:
        console.print(table)
        _note_programs(console, old, new, names)
    console.print(f"{same} recipes without a difference, {differ} with one")
    return differ


def _note_programs(console: Console, old: dict[str, Any], new: dict[str, Any], names: list[str]) -> None:
    """Print which programs are compiled more or less often; renamed programs do not count as differences."""
    counts: Counter[tuple[str, str]] = Counter()
    for name in names:
        runs = [one["runs"].get(name, {}) for one in (old, new)]
        if all("compilations" in run for run in runs) and runs[0]["compilations"] != runs[1]["compilations"]:
            before, after = (flat_counts(run["programs"]) for run in runs)
            counts.update({("fewer", program): count for program, count in (before - after).items()})
            counts.update({("more", program): count for program, count in (after - before).items()})
    for (which, program), count in counts.most_common(40):
        console.print(f"  {count} {which} of {program}, over recipes whose compilations differ")


def flat_counts(programs: dict[str, dict[str, int]]) -> Counter[str]:
    """Numbers of compilations of each program, by stage and name."""
    return Counter({f"{stage}: {name}": count for stage, named in programs.items() for name, count in named.items()})


# ---- the command ----------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    known = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known.add_argument("output", type=Path, help="file that the results are written to")
    known.add_argument("--against", type=Path, help="an earlier output, to compare with")
    known.add_argument("--only", nargs="+", metavar="NAME", help="run only these; other configs are named configs/demo")
    known.add_argument("--resume", action="store_true", help="skip recipes that the output has, unless they failed")
    known.add_argument("--compare-only", action="store_true", help="compare an existing output without running")
    known.add_argument("--optimised", action="store_true", help="compile with optimisations, which takes much longer")
    known.add_argument("--most", type=int, default=12, help="most differences to print per recipe (default 12)")
    known.add_argument("--list", action="store_true", help="print the names of the recipes and stop")
    return known.parse_args()


def write(path: Path, result: dict[str, Any]) -> None:
    """Write atomically, so that an interruption keeps the last result."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def main() -> int:
    options, console = arguments(), Console(width=200 if not sys.stdout.isatty() else None)
    paths = recipes()
    if options.list:
        console.print("\n".join(paths))
        return 0
    if unknown := [name for name in options.only or () if name not in paths]:
        console.print(f"there is no recipe {unknown[0]!r}; --list names them")
        return 2
    names = options.only or list(paths)
    settings = {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "optimised": options.optimised,
    }
    result: dict[str, Any] = {"settings": settings, "runs": {}}
    if options.resume or options.compare_only:
        if options.output.exists():
            result = json.loads(options.output.read_text())
        if options.resume and result["settings"] != settings:
            console.print(f"{options.output} was written with other settings: {result['settings']}; now {settings}")
            return 2
    if not options.compare_only:
        jax.config.update("jax_disable_most_optimizations", not options.optimised)
        run_all(console, {name: paths[name] for name in names}, result, options)
    failed = [name for name in names if "failed" in result["runs"].get(name, {})]
    if failed:
        console.print(f"failed: {', '.join(failed)}")
    if options.against is None:
        return int(bool(failed))
    old = json.loads(options.against.read_text())
    if options.only is None:  # removed recipes are differences, too
        names = [*names, *(name for name in old["runs"] if name not in names)]
    return int(bool(compare(console, old, result, names, options.most)))


def run_all(console: Console, paths: dict[str, Path], result: dict[str, Any], options: argparse.Namespace) -> None:
    """Run the recipes one after another, and write each into `result` and its file."""
    import jaxrl_llm

    console.print(f"runs {Path(*jaxrl_llm.__path__)} at micro size")
    compilations, began = Compilations(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="micro_runs_") as temporary:
        # Recipes share the programs of warm start and evaluation, which are compiled once. Programs that are read from
        # this cache are counted as compiled, so the counts do not depend on earlier recipes.
        jax.config.update("jax_compilation_cache_dir", f"{temporary}/programs")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        for number, (name, path) in enumerate(paths.items(), start=1):
            if options.resume and "failed" not in result["runs"].get(name, {"failed": ""}):
                continue
            folder, started = Path(temporary) / str(number), time.monotonic()
            folder.mkdir()
            try:
                run = recorded(path, folder, Path(temporary) / "data", compilations)
                count = run["compilations"]
                right = [float.fromhex(line["correct_share"]) for line in run["metrics"] if "correct_share" in line]
                said = f"{count['all']} compilations, correct {' '.join(f'{share:.2f}' for share in right)}"
            except Exception as error:
                run = {"failed": str(error) if type(error) is RuntimeError else traceback.format_exc()[-2000:]}
                said = f"[red]failed[/]: {escape(run['failed'].strip().splitlines()[-1][:200])}"
            result["runs"][name] = run
            write(options.output, result)
            # Recipes do not share other programs; clearing them bounds memory.
            jax.clear_caches()
            gc.collect()
            console.print(f"{number}/{len(paths)} {name}: {time.monotonic() - started:.1f} s, {said}", highlight=False)
    console.print(f"{(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    sys.exit(main())
