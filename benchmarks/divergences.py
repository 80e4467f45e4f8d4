"""The effect of a penalty on the diversity of a policy's answers: pass@1 and pass@k before and after training.

    python benchmarks/divergences.py --json divergences.json --plot divergences.png

Countdown problems have many right answers. For each seed one policy is warm-started until it is partly competent; from
it start GRPO without penalty, with the reverse KL of its own samples, and with the forward KL and Jensen-Shannon
divergence of stored answers to prompts that it already solved (DPH-RL, arXiv 2509.07430). In the last two the solved
prompts are not explored, so a control explores the same prompts and has no penalty: what differs from it
is owed to the divergence. All variants have the same model, data, seeds, step count and optimiser.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree
from rich.console import Console
from rich.table import Table

from jaxrl_llm.config import Config, parse_config, read_tree
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.evaluation import make_evaluate
from jaxrl_llm.run.batches import grader, prompt_batches
from jaxrl_llm.run.integrity import latest_checkpoint
from jaxrl_llm.run.problems import data_sets
from jaxrl_llm.run.setup import Parts, parts
from jaxrl_llm.run.stages import spread
from jaxrl_llm.run.stored_answers import StoredAnswers, stored_answers
from jaxrl_llm.run.stored_states import restore_params
from jaxrl_llm.run.train import train

COUNTDOWN = Path(__file__).parents[1] / "configs" / "countdown.yaml"
POLICY_LOSS = {"clipped_surrogate": {"clip_low": 0.2, "clip_high": 0.28}}
# Recipes store what was solved 4 times of 4. A policy that is right a quarter of the time has too few of those.
STORED = {"attempts": 4, "min_correct": 2}
# The coefficients are those of configs/methods: grpo, dph_f, dph_js.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "no penalty": None,
    "reverse KL": {"divergence": {"generator": "reverse_kl", "gradient": "score_function", "coefficient": 0.04}},
    "forward KL": {"rehearsal_divergence": {"generator": "forward_kl", "coefficient": 0.01}},
    "Jensen-Shannon": {
        "rehearsal_divergence": {"generator": "jensen_shannon", "value_limit": None, "coefficient": 0.2}
    },
    "unsolved only": {"rehearsal_divergence": {"coefficient": 0.0}},
}
BEFORE = "before"
COLOURS = dict(zip((BEFORE, *VARIANTS), ("black", "#c0392b", "#e08e0b", "#1f6fb4", "#2a9d5c", "#888888"), strict=True))
TINY = {
    "task": {"levels": [2], "train_items": 48, "validation_items": 4, "test_items": 4},
    "options": {"operators": "+", "largest_number": 9, "largest_target": 18},
    "model": {"width": 32, "layers": 1, "heads": 2, "kv_heads": 1},
    "warm_start": {"steps": 45, "sequences_per_step": 32, "learning_rate": 1e-2, "stop_at_accuracy": None},
    "training": {"prompts_per_step": 6, "warmup_steps": 0},
    "stored": {"min_correct": 4},  # so simple a task is soon solved
}


def config_of(options: argparse.Namespace, penalty: dict[str, Any] | None = None) -> Config:
    """The run of one variant: Countdown's config with the losses of the variant and nothing else on top."""
    tree = read_tree(COUNTDOWN)
    tree["losses"] = [POLICY_LOSS]
    tree["task"] |= {"train_items": 4000, "test_items": max(512, options.problems)}
    tree["training"] |= {"prompts_per_step": 48, "steps": options.steps}
    # Probes of the warm start; what is reported is measured by `evaluation`.
    tree["evaluation"] = {"problems": 1, "samples_per_problem": 8, "k": [1]}
    if options.quick:
        for section in ("task", "model", "warm_start", "training"):
            tree[section] |= TINY[section]
        tree["task"]["options"] |= TINY["options"]
    if penalty is not None:
        ((name, hyper),) = penalty.items()
        tree["losses"].append({name: hyper | {"coefficient": options.scale * hyper["coefficient"]}})
        if name == "rehearsal_divergence":  # one stored answer to six samples, as in the recipes
            rows = tree["training"]["prompts_per_step"] * tree["rollout"]["samples_per_prompt"]
            kept = STORED | (TINY["stored"] if options.quick else {}) | {"sequences_per_step": rows // 6}
            tree["source"] = ["sampler", {"solved_answers": kept}]
    return parse_config(tree, vocabulary_size=CharacterTokenizer().vocabulary_size)


def warm_started(built: Parts, seed: int, directory: Path) -> PyTree:
    """The policy from which all variants of a seed start; read back where an earlier run has left it."""
    config = replace(built.config, seed=seed, run_dir=str(directory / f"seed{seed}"))
    config = replace(config, training=replace(config.training, steps=0))
    train(config, resume=config.directory.exists(), console=Console(quiet=True))
    folder, step = latest_checkpoint(config.directory)
    return restore_params(folder, step, built.model.init(jax.random.key(0)))


def wanted_answers(built: Parts) -> dict[str, int] | None:
    """How the answers are chosen that are stored for a variant; None where none are."""
    return next((feed.stored for feed in built.feeds if feed.stored), None)


def reinforced(built: Parts, params: PyTree, stored: StoredAnswers | None) -> PyTree:
    """The policy after the steps of the config."""
    config = built.config
    key, source = jax.random.key(config.seed), data_sets(config, ["train"])["train"]
    asked, width = built.step.composition.written, config.rollout.max_completion_tokens
    if asked is None:
        stored = None
    explored = source if stored is None else [source[int(number)] for number in stored.explored]
    prompts = prompt_batches(built, explored)
    state = built.step.init(key, params)
    for index in range(config.training.steps):
        rows = None
        if stored is not None and asked is not None:
            rows = stored.batch(key, index, asked.rows, answer_width=width)
        state, _ = built.step(state, prompts[index].prompts, prompts[index].items, rows)
    return state.params


def benchmark(
    options: argparse.Namespace, directory: Path, console: Console, measured_before: set[tuple[int, str]]
) -> Iterator[dict[str, Any]]:
    """Accuracies of each seed before reinforcement and after each variant, one after the other; known ones left out."""
    # Programs depend on the variant and not on the seed: each is compiled once.
    variants = {name: parts(config_of(options, VARIANTS[name])) for name in options.variants}
    plain = parts(config_of(options))
    test = data_sets(plain.config, ["test"])["test"]
    evaluate = make_evaluate(
        plain.model,
        grader(plain, test),
        plain.tokenizer,
        samples_per_problem=options.samples,
        k=options.k,
        max_prompt_tokens=plain.config.rollout.max_prompt_tokens,
        max_completion_tokens=plain.config.rollout.max_completion_tokens,
    )
    items = [test[i] for i in spread(len(test), options.problems)]

    for seed in options.seeds:
        lacking = [name for name in (BEFORE, *variants) if (seed, name) not in measured_before]
        if not lacking:
            continue

        def measured(variant: str, params: PyTree, started: float, seed: int = seed) -> dict[str, Any]:
            accuracy = evaluate(params, items, jax.random.key(seed))
            row = {"seed": seed, "variant": variant, "seconds": time.monotonic() - started}
            low, high = (accuracy[f"pass@{k}"] for k in (options.k[0], options.k[-1]))
            console.print(
                f"seed {seed}, {variant}: pass@{options.k[0]} {low:.1%}, pass@{options.k[-1]} {high:.1%}"
                f" ({row['seconds']:.0f} s)"
            )
            return row | {name: value for name, value in accuracy.items() if name.startswith("pass@")}

        started = time.monotonic()
        params = warm_started(plain, seed, directory)
        if BEFORE in lacking:
            yield measured(BEFORE, params, started)
        seeded = {
            name: replace(built, config=replace(built.config, seed=seed))
            for name, built in variants.items()
            if name in lacking
        }
        storing = next((built for built in seeded.values() if wanted_answers(built)), None)
        stored = None
        if storing is not None and (wanted := wanted_answers(storing)) is not None:
            train_items = data_sets(plain.config, ["train"])["train"]
            stored = stored_answers(storing, params, train_items, jax.random.key(seed), **wanted)
            console.print(f"seed {seed}: {len(stored.explored)} of {len(train_items)} prompts are left to explore")
        for name, built in seeded.items():
            started = time.monotonic()
            yield measured(name, reinforced(built, params, stored), started)


def variants_of(rows: list[dict[str, Any]]) -> list[str]:
    """Before, then the variants that were run."""
    return [name for name in (BEFORE, *VARIANTS) if any(row["variant"] == name for row in rows)]


def over_seeds(rows: list[dict[str, Any]], variant: str, metric: str) -> list[float]:
    """A metric of a variant, seed by seed."""
    return [row[metric] for row in rows if row["variant"] == variant]


def table_of(rows: list[dict[str, Any]], ks: list[int]) -> Table:
    """Mean and range over seeds of the lowest and the highest k, and the change of each from the start."""
    table = Table(title="percent: mean over seeds (lowest–highest); change of the mean in points")
    table.add_column("variant")
    for k in (ks[0], ks[-1]):
        table.add_column(f"pass@{k}", justify="right", no_wrap=True)
        table.add_column("change", justify="right", no_wrap=True)
    for variant in variants_of(rows):
        cells = []
        for k in (ks[0], ks[-1]):
            values, start = (over_seeds(rows, name, f"pass@{k}") for name in (variant, BEFORE))
            cells.append(f"{statistics.mean(values):.1%} ({100 * min(values):.1f}–{100 * max(values):.1f})")
            change = 100 * (statistics.mean(values) - statistics.mean(start))
            cells.append("" if variant == BEFORE else f"{change:+.1f}")
        table.add_row(variant, *cells)
    return table


def plot(rows: list[dict[str, Any]], ks: list[int], path: Path) -> None:
    """pass@k over k, before and after, and what each seed won at the lowest k and lost at the highest."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (curves, changes) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for variant in variants_of(rows):
        colour = COLOURS[variant]
        seeds = [[100 * value for value in over_seeds(rows, variant, f"pass@{k}")] for k in ks]
        style = "--" if variant == BEFORE else "-"
        curves.plot(ks, [statistics.mean(s) for s in seeds], style, color=colour, marker="o", ms=4, label=variant)
        curves.fill_between(ks, [min(s) for s in seeds], [max(s) for s in seeds], color=colour, alpha=0.12, lw=0)
        if variant != BEFORE:
            start = [[100 * value for value in over_seeds(rows, BEFORE, f"pass@{k}")] for k in (ks[0], ks[-1])]
            won, lost = ([b - a for a, b in zip(start[end], seeds[end], strict=True)] for end in (0, -1))
            changes.scatter(won, lost, color=colour, alpha=0.45, s=30)
            changes.scatter(statistics.mean(won), statistics.mean(lost), color=colour, s=110, marker="D", label=variant)
    curves.set_xscale("log", base=2)
    curves.set_xticks(ks, [str(k) for k in ks])
    curves.set(xlabel="k", ylabel="pass@k, %", title="held-out problems; band: range over seeds")
    curves.legend(frameon=False, fontsize=9)
    changes.axhline(0, color="black", lw=0.8)
    changes.set(
        xlabel=f"change of pass@{ks[0]}, points",
        ylabel=f"change of pass@{ks[-1]}, points",
        title="from before to after; dot: one seed, diamond: mean",
    )
    for axes in (curves, changes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Parse the command line, run, print; the rows that --json writes are returned too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="reinforcement steps of a variant (default: 40)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--problems", type=int, default=128, help="test problems (default: 128)")
    parser.add_argument("--samples", type=int, default=64, help="samples of a problem (default: 64)")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="(default: 1 2 4 8 16 32)")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="(default: all)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every penalty's coefficient (default: 1)")
    parser.add_argument("--directory", type=Path, default=None, help="keep warm-started policies here and reuse them")
    parser.add_argument("--json", type=Path, default=None, help="write accuracies of every seed and variant here")
    parser.add_argument("--plot", type=Path, default=None, help="write a figure here (needs matplotlib)")
    parser.add_argument(
        "--read", type=Path, nargs="+", default=[], help="output of an earlier --json: run only the missing variants"
    )
    parser.add_argument("--quick", action="store_true", help="only test that all parts work: a tiny model, one seed")
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(steps=2, seeds=[0], problems=4, samples=8, k=[1, 8])
    options.k = sorted(options.k)
    for path in (options.json, options.plot):
        if path:  # a folder that is missing should not be found out at the end
            path.parent.mkdir(parents=True, exist_ok=True)
    console = Console()
    started = time.monotonic()
    rows = []
    for path in options.read:
        earlier = json.loads(path.read_text())
        for name in ("steps", "problems", "samples", "k", "scale", "quick"):
            if earlier["options"][name] != getattr(options, name):
                parser.error(
                    f"{path} was measured with {name} {earlier['options'][name]}; give the same, or leave it out"
                )
        rows += earlier["rows"]
    known = {(row["seed"], row["variant"]) for row in rows}
    with tempfile.TemporaryDirectory() as scratch:
        for row in benchmark(options, options.directory or Path(scratch), console, known):
            rows.append(row)
            if options.json:  # after each row: a run that is stopped leaves what it has measured
                written = {"options": vars(options), "rows": rows}
                options.json.write_text(json.dumps(written, indent=1, default=str))
    console.print(table_of(rows, options.k))
    console.print(f"{time.monotonic() - started:.0f} s")
    if options.plot:
        plot(rows, options.k, options.plot)
    return rows


if __name__ == "__main__":
    main()
