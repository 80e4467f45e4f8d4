"""Demonstrations of curricula and rollout plans: claims of papers on small problems, three seeds each.

    python benchmarks/demonstrations/plans.py                 # all of them
    python benchmarks/demonstrations/plans.py unsolved sec    # these; --seeds 0 1 2 --steps 60

Each writes docs/demonstrations/NAME.json and NAME.svg and prints its table;
docs/demonstrations/plans.md has the results.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import curves
import jax
import numpy as np
import optax
from charts import drawn

from jaxrl_llm import advantages, cli, data, losses, models, rewards, shipped
from jaxrl_llm.config import read_tree
from jaxrl_llm.data.tasks.countdown import reward as countdown_reward
from jaxrl_llm.data.tasks.items import record
from jaxrl_llm.experience import Prompts
from jaxrl_llm.rewards.verifiers.text_answers import extract_answer
from jaxrl_llm.rollout import plans
from jaxrl_llm.rollout.generation import generate
from jaxrl_llm.rows import Written, demonstrations
from jaxrl_llm.training import Resources, Rollout, make_train_step

OUT = Path(__file__).parents[2] / "docs" / "demonstrations"
Panels = dict[str, dict[str, list[list[float]]]]

# ---- problems that the policy does not solve ------------------------------------------------------------------------

PROMPT, COMPLETION, SAMPLES, HARD = 30, 14, 8, 64


def countdown_problems(count: int, seed: int) -> list[dict[str, Any]]:
    """Countdown problems with three numbers, also with the answer in the prompt."""
    task = data.tasks.task("countdown", scratchpad=False, largest_number=10, largest_target=30)
    items = [record(item, number) for number, item in enumerate(task.generate(level=3, count=count, seed=seed))]
    return [one | {"privileged": f"{one['body']}={one['answer']}"} for one in items]


class Bench:
    """A small policy, trained on prompts with and without the answer, and the problems that it never solves."""

    def __init__(self, seed: int, supervised_steps: int):
        self.seed, self.tokenizer = seed, data.CharacterTokenizer()
        self.model = models.transformer(
            models.TransformerConfig(self.tokenizer.vocabulary_size, width=64, layers=2, heads=4, kv_heads=2)
        )
        problems = countdown_problems(3000, 100 + seed)
        told = [one | {"item_id": one["item_id"] + 3000, "body": one["privileged"]} for one in problems]
        batches = data.supervised_batches(
            [*problems, *told],
            self.tokenizer,
            sequences_per_step=64,
            max_prompt_tokens=PROMPT,
            max_completion_tokens=COMPLETION,
            seed=seed,
            scratchpad=False,
        )
        schedule = optax.cosine_decay_schedule(3e-3, supervised_steps, 0.1)
        step = make_train_step(
            self.model, optax.adam(schedule), source=Written(64), losses=[losses.negative_log_likelihood]
        )
        state = step.init(jax.random.key(seed))
        for number in range(supervised_steps):
            state, _ = step(state, written=demonstrations(batches[number]))
        self.params = jax.device_get(state.params)
        self._generate = jax.jit(
            lambda params, prompts, first: generate(
                self.model,
                params,
                prompts,
                jax.random.key(7),
                0,
                samples_per_prompt=16,
                max_completion_tokens=COMPLETION,
                eos_ids=self.tokenizer.eos_ids,
                pad_id=self.tokenizer.pad_id,
                first_sample=first,
            )
        )
        fresh = countdown_problems(512, 900 + seed)
        rates = np.concatenate([self.solved(self.params, fresh[start : start + 64]) for start in range(0, 512, 64)])
        never = [one for one, rate in zip(fresh, rates, strict=True) if rate == 0]
        print(f"seed {seed}: pass@1 {rates.mean():.3f}, never of 16: {len(never)} of 512", flush=True)
        self.hard = [one | {"item_id": number} for number, one in enumerate(never[:HARD])]
        self.told = self.solved(self.params, [one | {"body": one["privileged"]} for one in self.hard], self.hard)
        print(f"seed {seed}: of those, told the answer: {self.told.mean():.3f}", flush=True)

    def batches(self, problems: Sequence[dict[str, Any]], count: int) -> Any:
        """Prompts of problems with their references, and prompts with the answer."""
        return data.prompt_batches(
            problems,
            self.tokenizer,
            prompts_per_step=count,
            max_prompt_tokens=PROMPT,
            max_answer_tokens=COMPLETION,
            seed=self.seed,
            max_demonstration_tokens=COMPLETION,
            scratchpad=False,
            prompt_columns=("privileged",),
        )

    def solved(self, params: Any, problems: Sequence[dict[str, Any]], judged: Any = None, first: int = 0) -> np.ndarray:
        """Share of right answers among 16 samples, by problem, in order."""
        rows = data.evaluation_batches(
            list(problems),
            self.tokenizer,
            prompts_per_batch=64,
            max_prompt_tokens=PROMPT,
            max_answer_tokens=COMPLETION,
        )
        found = []
        for batch in rows:
            asked = batch.prompts
            asked = Prompts(asked.tokens, asked.length, asked.prompt_id, asked.answer_tokens, asked.answer_length)
            made = jax.device_get(self._generate(params, asked, first))
            texts = [
                self.tokenizer.decode(row[:length].tolist())
                for row, length in zip(made.tokens, made.length, strict=True)
            ]
            found += [extract_answer(text) for text in texts][: 16 * int(batch.weight.sum())]
        bodies = [one["body"] for one in (judged or problems)]
        right = [countdown_reward(bodies[number // 16], answer) >= 1 for number, answer in enumerate(found)]
        return np.asarray(right, float).reshape(-1, 16).mean(1)

    def trained(self, plan: Any, samples: int, extra: Sequence[Any], steps: int, every: int) -> list[list[float]]:
        """[pass@1, share of problems solved in 16 samples] on the hard problems, every `every` steps."""
        step = make_train_step(
            self.model,
            optax.adam(1e-3),
            source=Rollout(samples, COMPLETION, self.tokenizer.eos_ids, self.tokenizer.pad_id, plan=plan),
            rewards=[rewards.countdown],
            credit=[("advantages", advantages.group_normalized)],
            losses=[losses.clipped_surrogate, *extra],
            resources=Resources(decode=self.tokenizer.decode, encode=self.tokenizer.encode),
        )
        state = step.init(jax.random.key(self.seed), jax.tree.map(jax.numpy.array, self.params))
        batches, seen = self.batches(self.hard, 32), []
        for number in range(steps + 1):
            if number % every == 0:
                rate = self.solved(state.params, self.hard, first=1000 * (number + 1))
                seen.append([float(rate.mean()), float((rate > 0).mean())])
            if number < steps:
                state, _ = step(state, batches[number].prompts, batches[number].items)
        return seen


def unsolved(seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Countdown problems that the policy never solves: GRPO, prefixes of demonstrations, explanations."""
    every = max(1, steps // 6)
    sizes = {"samples_per_prompt": SAMPLES, "max_completion_tokens": COMPLETION, "pad_id": 0}
    inside = plans.plain(samples_per_prompt=SAMPLES - 1)
    shown = plans.demonstration_prefix(inside, total_steps=steps, branches=1, **sizes)
    explained = plans.helped(
        plans.plain(samples_per_prompt=SAMPLES), samples_per_prompt=SAMPLES + 1, branches=1, learned="written"
    )
    likelihood = losses.stored_likelihood, 0.04
    sums = lambda logprobs, written_mask: losses.stored_likelihood(  # noqa: E731
        logprobs, written_mask, aggregation="seq_mean_token_sum"
    )
    variants = {
        "GRPO": (None, SAMPLES, []),
        "prefix sampling": (shown, SAMPLES, []),
        "self-explanation": (explained, SAMPLES + 1, [(sums, likelihood[1])]),
    }
    panels: Panels = {"pass@1": {}, "solved in 16 samples": {}}
    for seed in seeds:
        bench = Bench(seed, min(600, 20 * steps))
        for name, (plan, samples, extra) in variants.items():
            seen = np.array(bench.trained(plan, samples, extra, steps, every))
            jax.clear_caches()
            for place, panel in enumerate(panels):
                panels[panel].setdefault(name, []).append(seen[:, place].tolist())
            print(name, seed, seen[:: max(1, len(seen) // 4)].round(3).tolist(), flush=True)
    return {"x": list(range(0, steps + 1, every)), "xlabel": "step", "panels": panels}


# ---- runs of recipes ------------------------------------------------------------------------------------------------


def trained(
    name: str,
    variants: dict[str, dict[str, Any]],
    of: Callable[[list[dict[str, Any]], Path], dict[str, Any]],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Runs of each variant and seed, and the values that `of` computes from their metrics and directories."""
    cache, panels, numbers = curves.cache_directory(), {}, {}
    for seed in seeds:
        for variant, tree in variants.items():
            start = curves.warm_started(tree, cache)
            directory = cache / "demonstrations" / f"{name}-{variant.replace(' ', '-')}-{seed}"
            shutil.rmtree(directory, ignore_errors=True)
            curves.ran(start | {"seed": seed}, directory)
            lines = curves.lines_of(directory)
            jax.clear_caches()
            found = of(lines, directory)
            for panel, values in found["panels"].items():
                panels.setdefault(panel, {}).setdefault(variant, []).append(values)
            for number, value in found.get("numbers", {}).items():
                numbers.setdefault(number, {}).setdefault(variant, []).append(value)
            print(name, variant, seed, found, flush=True)
    return {"panels": panels, "numbers": numbers}


def evaluated(directory: Path, suite: dict[str, dict[str, Any]]) -> dict[str, float]:
    """pass@1 of the newest checkpoint of a run in each evaluation of a suite."""
    file, told = directory / "suite.yaml", io.StringIO()
    file.write_text(json.dumps({"evaluations": suite}))
    with contextlib.redirect_stdout(told):
        cli.main(["eval", str(directory), "--k", "1", "--samples", "4", "--json", "--suite", str(file)])
    return {name: found["pass@1"] for name, found in json.loads(told.getvalue())["evaluations"].items()}


def curve(lines: list[dict[str, Any]], metric: str) -> list[float]:
    """Means of a metric over equal parts of a run."""
    return [float("nan") if value is None else value for value in curves.binned(lines, metric)]


def sec(seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Shares of SEC's arms during the run, and final accuracy on the hardest level compared with equal shares."""
    tree = curves.small(read_tree(shipped.recipe_path("sec")), steps)
    even = json.loads(json.dumps(tree))
    even["data"].pop("selection")
    hardest = {"pass@1 on four digits": {"task": "addition", "levels": [4], "problems": 128}}

    def of(lines: list[dict[str, Any]], directory: Path) -> dict[str, Any]:
        shares = {name: curve(lines, name) for name in lines[-1] if name.startswith("selection/chance/")}
        shares["right answers in training"] = curve(lines, "correct_share")
        return {"panels": shares, "numbers": evaluated(directory, hardest)}

    return trained("sec", {"SEC": tree, "even shares": even}, of, seeds) | {"steps": steps}


def one_prompt(seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Held-out accuracy during training on a single prompt."""
    tree = curves.small(read_tree(shipped.recipe_path("one_shot_rlvr")), steps)
    tree["evaluation"] |= {"every_steps": max(1, steps // 6)}

    def of(lines: list[dict[str, Any]], directory: Path) -> dict[str, Any]:
        held = [line["validation/pass@1"] for line in lines if "validation/pass@1" in line]
        return {"panels": {"held-out pass@1": held}}

    return trained("one_prompt", {"one prompt": tree}, of, seeds) | {"steps": steps}


def faults(seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """A calculator that fails in one call of five: errors per episode and accuracy, with and without CLEANER."""
    tree = read_tree(shipped.recipe_path("cleaner"))
    tree["task"] |= {"train_items": 2000, "validation_items": 64, "test_items": 64, "levels": [1]}
    tree["model"] = curves.MODEL
    tree["warm_start"] |= {"steps": 300, "probe_every_steps": 20}
    tree["training"] |= {"steps": steps, "prompts_per_step": 16, "warmup_steps": 5}
    tree["rollout"] |= {"max_completion_tokens": 56}
    tree |= {"evaluation": curves.EVALUATION | {"every_steps": 0}, "checkpoints": {"every_steps": 100_000, "keep": 1}}
    tree["reporting"] = {"samples_every_steps": 0, "report": False, "loggers": []}
    plain = json.loads(json.dumps(tree))
    plain["rollout"].pop("plan")

    def of(lines: list[dict[str, Any]], directory: Path) -> dict[str, Any]:
        names = {"errors an episode": "episode/tool_errors_per_episode", "right answers": "correct_share"}
        return {"panels": {panel: curve(lines, metric) for panel, metric in names.items()}}

    return trained("faults", {"CLEANER": tree, "without": plain}, of, seeds) | {"steps": steps}


def compose(seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Accuracy on compositions of three held-out functions, after RL on one, and on compositions of two, of others."""
    tree = curves_of_compositions(steps)
    variants = {f"RL on depth {depth}": json.loads(json.dumps(tree)) for depth in (1, 2)}
    for depth, one in zip((1, 2), variants.values(), strict=True):
        one["stages"][-1]["task"]["levels"] = [depth]

    def of(lines: list[dict[str, Any]], directory: Path) -> dict[str, Any]:
        last = [line for line in lines if "correct_share" in line]
        suite = {
            f"pass@1 at depth {depth}, functions {who}": {
                "task": "composition",
                "levels": [depth],
                "options": {"functions": who},
                "problems": 64,
            }
            for depth in (2, 3)
            for who in ("KLMN", "OPQ")
        }
        right = curve(last, "correct_share")
        return {"panels": {"right answers in training": right}, "numbers": evaluated(directory, suite)}

    return trained("compose", variants, of, seeds) | {"steps": steps}


def curves_of_compositions(steps: int) -> dict[str, Any]:
    """The shipped recipe at the small size."""
    tree = read_tree(shipped.recipe_path("compose"))
    tree["model"] = curves.MODEL
    tree["task"] |= {"validation_items": 64, "test_items": 64}
    # With twice as many supervised steps nearly all pairs are right before RL.
    tree["stages"][0]["training"]["steps"] = 800
    tree["stages"][-1]["training"] = tree["stages"][-1].get("training", {}) | {"steps": steps, "prompts_per_step": 24}
    tree |= {"evaluation": curves.EVALUATION | {"every_steps": 0}, "checkpoints": {"every_steps": 100_000, "keep": 1}}
    tree["reporting"] = {"samples_every_steps": 0, "report": False, "loggers": []}
    return tree


DEMONSTRATIONS = {one.__name__: one for one in (unsolved, faults, sec, compose, one_prompt)}


def table(found: dict[str, Any]) -> str:
    """A Markdown table of the first and last value of each curve and of single numbers: mean over seeds and range."""
    rows = ["| | | start | end |", "|---|---|---|---|"]
    for panel, of in found["panels"].items():
        for variant, seeds in of.items():
            values = np.array(seeds, float)
            last = values[:, -max(1, values.shape[1] // 5) :].mean(1)
            start, end = values[:, 0].mean(), f"{last.mean():.3g} ({last.min():.3g} to {last.max():.3g})"
            rows.append(f"| {panel} | {variant} | {start:.3g} | {end} |")
    for name, of in found.get("numbers", {}).items():
        rows += [f"| {name} | {v} | | {np.mean(x):.3g} ({min(x):.3g} to {max(x):.3g}) |" for v, x in of.items()]
    return "\n".join(rows)


def added(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Results with the curves and numbers of further seeds appended."""
    for part in ("panels", "numbers"):
        for panel, of in found.get(part, {}).items():
            for variant, values in of.items():
                before.setdefault(part, {}).setdefault(panel, {}).setdefault(variant, []).extend(values)
    return before


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*DEMONSTRATIONS, []], help="which; without any, all")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--add", action="store_true", help="append to the results of earlier seeds")
    parser.add_argument("--steps", type=int, default=60, help="of the runs that train")
    parser.add_argument("--output", type=Path, default=OUT)
    options = parser.parse_args(given)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.names or DEMONSTRATIONS:
        found, file = DEMONSTRATIONS[name](options.seeds, options.steps), options.output / f"{name}.json"
        if options.add and file.exists():
            found = added(json.loads(file.read_text()), found)
        file.write_text(json.dumps(found) + "\n")
        drawn(found, options.output / f"{name}.svg")
        print(f"{name}\n{table(found)}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
