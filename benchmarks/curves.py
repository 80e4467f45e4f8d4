"""Small runs of recipes that measure the metrics they are expected to change. docs/gallery.md shows the curves.

    python benchmarks/curves.py                       # every recipe whose curve is missing or of an older recipe
    python benchmarks/curves.py grpo dler --seeds 3   # these

A recipe is run as `jaxrl train` runs it, with its own functions and hyper-parameters, on its own task, but small: the
model, the length of the problems and the batch are those of `SMALL`, so that a run takes about a minute on one core.
All seeds and recipes of a task start from one warm-started policy, which is kept in the cache of the user. Recipes that
want judged completions get a right and a wrong answer of that policy to each problem, those that want a teacher get one
that was warm-started for longer, those that ask a judge get its stand-in. What is written, docs/curves/NAME.json, is
the mean of each metric over `BINS` parts of the run, for each seed; a run with stages of another kind before counts
from where what it shows is first measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from rich.console import Console

from jaxrl_llm import shipped
from jaxrl_llm.compilation_cache import compilation_cache_directory
from jaxrl_llm.config import parse_config, read_tree
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.run.train import train

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "examples"))
import curve_files
from judge_stand_in import StandIn

# The address that recipes with a judge name; they say how its stand-in is started.
JUDGE = "http://localhost:8000"
CURVES = Path(__file__).parents[1] / "docs" / "curves"
STEPS, SEQUENCES, BINS, SEEDS = 60, 256, 20, 3

MODEL = {"width": 64, "layers": 2, "heads": 4, "kv_heads": 2}
WARM = {"steps": 600, "sequences_per_step": 64, "learning_rate": 3e-3, "warmup_steps": 20, "probe_every_steps": 20}
# By task: its problems and the longest prompt if they differ from those of the recipe, limits of completions and what
# they become (a limit that cuts long thoughts has to cut some of these), and where the warm start ends.
SMALL: dict[str, dict[str, Any]] = {
    "addition": {"task": {"levels": [2]}, "prompt": 9, "stop": 0.42},
    "calculator": {"task": {"levels": [1, 2]}, "prompt": 15, "stop": 0.4},
    "chain": {"task": {"levels": [2, 3, 4]}, "prompt": 14, "completion": {44: 32, 30: 24}, "stop": 0.5},
    "countdown": {"task": {"levels": [3]}, "prompt": 16, "stop": 0.25},
    "grid": {"task": {"levels": [1, 2, 3]}, "prompt": 30, "stop": 0.4},
    "bargaining": {"task": {"levels": [2, 3]}, "prompt": 11, "stop": 0.4},
    "self_correction": {"task": {"levels": [2]}, "prompt": 9, "stop": 0.3},
    "composition": {"stop": 0.4},
    "sorting": {"stop": 0.4},
    "two_chains": {"stop": 0.4},
    "function_calls": {"stop": 0.4},
}
EVALUATION = {"problems": 64, "samples_per_problem": 8, "k": [1, 8], "sequences_per_batch": 512}
# Accuracies at which the warm start of a teacher ends, and of the weaker one of two.
TEACHER_STOP, ELDER_STOP = 0.8, 0.7
# Metrics that are plotted beside those that a recipe names.
ALWAYS = ("correct_share",)


def digest(tree: dict[str, Any]) -> str:
    """Sixteen hex digits over the settings of a recipe that affect numbers; its texts are left out."""
    kept = {name: value for name, value in tree.items() if name not in ("about", "name", "shows")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def small(tree: dict[str, Any], steps: int = STEPS, sequences: int = SEQUENCES) -> dict[str, Any]:
    """The same recipe, with the small model and batch of its task."""
    tree = json.loads(json.dumps(tree))
    if tree["task"]["name"] not in SMALL:
        raise ValueError(f"SMALL has no size for problems of {tree['task']['name']}; add one")
    rollout, training, size = tree["rollout"], tree["training"], SMALL[tree["task"]["name"]]
    given = [part["task"]["levels"] for part in (tree, *tree.get("stages", [])) if "levels" in part.get("task", {})]
    own_levels = tree["task"]["levels"] if max(map(len, given)) > 1 and "completion" not in size else None
    tree["task"] |= {"train_items": 4000, "validation_items": 64, "test_items": 64} | size.get("task", {})
    formatted = any(
        part.get("data", {}).keys() & {"templates", "privileged"} for part in (tree, *tree.get("stages", []))
    )
    if tree["task"]["name"] == "addition" and own_levels:  # recipes whose effect needs several levels
        tree["task"]["levels"] = own_levels
    elif "prompt" in size and not formatted:
        asked = tree["task"].get("options", {}).keys() & {"claims", "attempts"}  # a question behind the problem
        rollout["max_prompt_tokens"] = size["prompt"] + 4 * len(asked)
    for part in (rollout, *(stage["rollout"] for stage in tree.get("stages", []) if "rollout" in stage)):
        if (limit := part.get("max_completion_tokens")) in size.get("completion", {}):
            part["max_completion_tokens"] = size["completion"][limit]
    training["prompts_per_step"] = max(1, sequences // rollout["samples_per_prompt"])
    training |= {"warmup_steps": 5, "steps": steps}
    for entry in tree.get("source", []) if isinstance(tree.get("source"), list) else []:
        for hyper in entry.values() if isinstance(entry, dict) else ():
            if "sequences_per_step" in hyper:
                hyper["sequences_per_step"] = 32
    for stage in tree.get("stages", []):
        stage.setdefault("training", {}).setdefault("steps", steps // len(tree["stages"]))
    warm = WARM | {"stop_at_accuracy": size["stop"]} if tree["warm_start"]["steps"] else tree["warm_start"]
    own = tree["warm_start"].get("stop_at_accuracy")
    if tree["warm_start"]["steps"] and own is not None and abs(own - size["stop"]) > 0.14:
        warm["stop_at_accuracy"] = own  # a recipe that needs a policy that is right mostly, or hardly ever
    evaluated = any(metric.startswith("validation/") for metric in tree.get("shows", {}))
    return tree | {
        "model": MODEL,
        "warm_start": warm,
        "evaluation": EVALUATION | {"every_steps": max(1, steps // 3) if evaluated else 0},
        "checkpoints": {"every_steps": 100_000, "keep": 1},
        "reporting": {"samples_every_steps": 0, "report": False, "loggers": []},
    }


def warm_started(tree: dict[str, Any], cache: Path) -> dict[str, Any]:
    """The config that continues its warm start, which is run if it is not cached."""
    if not tree["warm_start"]["steps"]:
        return tree
    names = ("task", "model", "warm_start", "seed")
    first = {name: tree[name] for name in names if name in tree} | {"about": {}, "name": "warm start"}
    if templates := tree.get("data", {}).get("templates"):  # the policy has to know all forms of a prompt
        first["data"] = {"templates": templates}
    sizes = {name: tree["rollout"][name] for name in ("max_prompt_tokens", "max_completion_tokens")}
    run = cache / f"{tree['task']['name']}-{digest(first | sizes)}"
    if not (run / "summary.json").exists():
        made = run.with_name(f"{run.name}.{os.getpid()}")  # several processes may want it at once
        plain = {"rollout": {"samples_per_prompt": 8} | sizes, "training": {"steps": 0, "prompts_per_step": 8}}
        plain |= {"rewards": tree["rewards"] or ["exact_answer"], "losses": ["policy_gradient"]}
        plain |= {"credit": [{"advantages": "group_normalized"}], "environment": tree.get("environment", {})}
        others = {name: tree[name] for name in ("evaluation", "reporting")}
        ran(first | plain | others, made)
        try:
            made.rename(run)
        except OSError:
            shutil.rmtree(made)
    return tree | {"warm_start": {"steps": 0}, "init_from": {"path": str(run)}}


def supplied(tree: dict[str, Any], start: dict[str, Any], cache: Path) -> dict[str, Any]:
    """The recipe with the files and networks that its user has to supply."""
    start = json.loads(json.dumps(start))
    policies = {
        name: str(run)
        for name, network in tree.get("networks", {}).items()
        if (run := policy_of(network.get("path", ""), tree, cache))
    }
    for name, run in policies.items():
        start["networks"][name]["path"] = run
    if "base" in policies:  # the policy before its training is a network of the recipe
        start["init_from"] = {"path": policies["base"]}
    for part in (start, *start.get("stages", [])):
        sources = part.get("source")
        for source in sources if isinstance(sources, list) else [sources]:
            for kind, entry in source.items() if isinstance(source, dict) else ():
                if kind in curve_files.KINDS:
                    graded = kind == "pairs" and "margin_use" in json.dumps(tree["losses"])
                    run = policy_of("teacher" if kind == "distributions" else "base", tree, cache)
                    entry["file"] = str(curve_files.written(run, "graded_pairs" if graded else kind))
    return start


def policy_of(path: str, tree: dict[str, Any], cache: Path) -> Path | None:
    """The run of a policy that a recipe names: a teacher, one that is weaker, or the warm-started policy itself."""
    size = SMALL[tree["task"]["name"]]
    stops = {"teacher": TEACHER_STOP, "elder": ELDER_STOP, "base": size["stop"]}
    if path not in stops:
        return None
    warm = WARM | {"stop_at_accuracy": stops[path]} | ({} if path == "base" else {"steps": 3000})
    made = warm_started(tree | {"warm_start": warm, "networks": {}}, cache)
    return Path(made["init_from"]["path"])


def ran(tree: dict[str, Any], directory: Path) -> None:
    """Run a config."""
    config = parse_config(tree | {"run_dir": str(directory)}, vocabulary_size=CharacterTokenizer().vocabulary_size)
    train(config, console=Console(quiet=True))


def lines_of(directory: Path) -> list[dict[str, Any]]:
    """The metrics of a run's steps."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def binned(lines: list[dict[str, Any]], metric: str, bins: int = BINS) -> list[float | None]:
    """Means of a metric over equal parts of a run; None where a part does not have it."""
    parts = np.array_split(np.arange(len(lines)), bins)
    values = [[lines[i][metric] for i in part if metric in lines[i]] for part in parts]
    return [float(f"{np.mean(found):.4g}") if found else None for found in values]


def change(seeds: list[list[float | None]]) -> tuple[float, float]:
    """(mean over the first fifth of the runs, over the last) of the curves of a metric."""
    known = [[value for value in seed if value is not None] for seed in seeds]
    parts = [(seed[: max(1, len(seed) // 5)], seed[-max(1, len(seed) // 5) :]) for seed in known]
    return float(np.mean([np.mean(first) for first, _ in parts])), float(np.mean([np.mean(last) for _, last in parts]))


def agrees(seeds: list[list[float | None]], direction: str) -> bool:
    """Whether the curves of a metric go where a recipe says; what holds keeps three quarters of what it was."""
    first, last = change(seeds)
    return {"rises": last > first, "falls": last < first, "holds": last >= 0.75 * first}[direction]


def measured(
    name: str, seeds: int, cache: Path, *, steps: int = STEPS, sequences: int = SEQUENCES, again: bool = True
) -> dict[str, Any]:
    """The curves of a recipe.

    Args:
      name: of the recipe.
      seeds: runs, from seed 0.
      cache: where policies and runs are kept.
      steps, sequences: size of a run.
      again: take runs again that an interrupted measurement has finished.

    Returns:
      recipe, digest, steps, sequences, metrics: name -> for each seed the means of `BINS` parts of its run.
    """
    tree = small(read_tree(shipped.recipe_path(name)), steps, sequences)
    start, runs = supplied(tree, warm_started(tree, cache), cache), []
    runs_of = digest(start)  # without the port of a stand-in, so that finished runs are found again
    if JUDGE in json.dumps(start):
        start = json.loads(json.dumps(start).replace(JUDGE, StandIn().start().described()["url"]))
    for seed in range(seeds):
        directory = cache / "runs" / f"{name}-{seed}-{runs_of}"
        if again or not (directory / "summary.json").exists():
            shutil.rmtree(directory, ignore_errors=True)
            ran(start | {"seed": seed}, directory)
        runs.append(lines_of(directory))
    return recorded(name, runs, sequences)


def recorded(name: str, runs: list[list[dict[str, Any]]], sequences: int) -> dict[str, Any]:
    """What `measured` returns, from the metrics of runs."""
    whole = read_tree(shipped.recipe_path(name))
    shows = whole.get("shows", {})
    metrics = [one for one in dict.fromkeys((*shows, *ALWAYS)) if any(one in line for line in runs[0])]
    if missing := [one for one in shows if one not in metrics]:
        raise ValueError(f"it shows {missing[0]}, which its steps do not report; they report {sorted(runs[0][-1])}")
    runs = [lines[next(i for i, line in enumerate(lines) if line.keys() & {*metrics}) :] for lines in runs]
    return {
        "recipe": name,
        "digest": digest(whole),
        "steps": len(runs[0]),
        "sequences": sequences,
        "metrics": {metric: [binned(lines, metric) for lines in runs] for metric in metrics},
    }


def cache_directory() -> Path:
    """Where warm-started policies are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxrl_llm" / "curves"


def stale(name: str) -> bool:
    """Whether the curve of a recipe is missing, or of a recipe that has changed since."""
    path = CURVES / f"{name}.json"
    return not path.exists() or json.loads(path.read_text())["digest"] != digest(read_tree(shipped.recipe_path(name)))


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="recipes; without any, all whose curves are missing or stale")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, default=CURVES)
    options = parser.parse_args(given)
    from jaxrl_llm import catalogue

    if directory := compilation_cache_directory():
        jax.config.update("jax_compilation_cache_dir", str(directory))
    names = options.names or [one["name"] for one in catalogue.recipes() if stale(one["name"])]
    options.output.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in names:
        began = time.process_time()
        try:
            found = measured(name, options.seeds, cache_directory(), steps=options.steps, again=False)
        except Exception as error:  # a recipe that needs a file or a checkpoint of the user's own
            print(f"{name}: not measured: {str(error).splitlines()[0][:300]}", flush=True)
            failed += 1
            continue
        finally:
            jax.clear_caches()
        (options.output / f"{name}.json").write_text(json.dumps(found) + "\n")
        for finished in (cache_directory() / "runs").glob(f"{name}-[0-9]*"):
            shutil.rmtree(finished)
        moved = {
            metric: f"{change(seeds)[0]:.4g} -> {change(seeds)[1]:.4g}" for metric, seeds in found["metrics"].items()
        }
        print(f"{name}: {time.process_time() - began:.0f} s of CPU, {moved}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
