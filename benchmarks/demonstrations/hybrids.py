"""Three claims about combinations of supervision and reinforcement, on three seeds; docs/hybrids.md has the results.

    python benchmarks/demonstrations/hybrids.py --json docs/demonstrations/hybrids.json --plot docs/demonstrations
    python benchmarks/demonstrations/hybrids.py --only distillation --seeds 1

distillation   a teacher of four layers, a student of two: steps to an accuracy, on-policy and by supervision
relift         demonstrations used by ReLIFT, compared with supervision on the same prompts
forgetting     accuracy on an old task while a new one is trained by supervision, and by reinforcement

A run takes about a minute on one core. Accuracies are of sampled answers (temperature 1) to 256 held-out problems.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

import jax
import numpy as np
import optax
from charts import drawn
from rich.console import Console
from rich.table import Table

from jaxrl_llm import advantages, data, losses, rewards
from jaxrl_llm.data.tasks import task
from jaxrl_llm.losses import divergence
from jaxrl_llm.models import TransformerConfig, transformer
from jaxrl_llm.rollout.generation import generate
from jaxrl_llm.rows import Hardest, Written, demonstrations, written_rows
from jaxrl_llm.signatures import call, renamed
from jaxrl_llm.training import Network, Resources, Rollout, make_train_step

TOKENIZER = data.CharacterTokenizer()
SAMPLING = {"eos_ids": TOKENIZER.eos_ids, "pad_id": TOKENIZER.pad_id}
HELD_OUT, BATCH = 256, 32


def model_of(layers: int, width: int) -> Any:
    """A transformer with the character vocabulary."""
    return transformer(TransformerConfig(TOKENIZER.vocabulary_size, width=width, layers=layers, heads=4, kv_heads=2))


def adam(rate: float) -> optax.GradientTransformation:
    """AdamW with gradients clipped to norm 1."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.0))


class Problems:
    """Problems of some levels of a task: batches of prompts and demonstrations, and accuracy on held-out problems."""

    def __init__(
        self, name: str, levels: Sequence[int], width: tuple[int, int], *, seed: int, count: int = 4000, **options
    ):
        family, (self.prompt, self.completion) = task(name, **options), width

        def draw(split: str, n: int) -> list[Any]:
            each = n // len(levels)
            return [i for level in levels for i in family.generate(level=level, count=each, seed=seed, split=split)]

        self.train, held_out = draw("train", count), draw("validation", HELD_OUT)
        self.seed = seed
        self.held_out = self.prompts(held_out, len(held_out))[0].prompts

    def prompts(self, items: Sequence[Any] | None = None, size: int = BATCH) -> Any:
        """Batches of prompts, with their demonstrations."""
        return data.prompt_batches(
            self.train if items is None else items,
            TOKENIZER,
            prompts_per_step=size,
            max_prompt_tokens=self.prompt,
            max_answer_tokens=self.completion,
            max_demonstration_tokens=self.completion,
            seed=self.seed,
        )

    def demonstrations(self, size: int = BATCH) -> Callable[[int], Any]:
        """step -> rows of reference completions."""
        batches = data.supervised_batches(
            self.train,
            TOKENIZER,
            sequences_per_step=size,
            max_prompt_tokens=self.prompt,
            max_completion_tokens=self.completion,
            seed=self.seed,
        )
        return lambda step: demonstrations(batches[step])

    def accuracy(self, model: Any) -> Callable[[Any], float]:
        """params -> share of right answers to the held-out problems."""

        @jax.jit
        def right(params):
            rows = generate(
                model, params, self.held_out, jax.random.key(7), 0, samples_per_prompt=1,
                max_completion_tokens=self.completion, **SAMPLING,
            )  # fmt: skip
            return call(rewards.exact_answer, rows.known()).mean()

        return lambda params: float(right(params))


def supervised(model: Any, rate: float, rows: int = BATCH) -> Any:
    """A step of supervised training on demonstrations."""
    return make_train_step(model, adam(rate), source=Written(rows), losses=[losses.negative_log_likelihood])


def until(
    step: Any, state: Any, rows: Callable[[int], Any], accuracy: Callable, goal: float, most: int, every: int
) -> Any:
    """The state at which the accuracy first reaches a goal."""
    for number in range(most):
        state, _ = step(state, written=rows(number))
        if (number + 1) % every == 0 and accuracy(state.params) >= goal:
            break
    return state


def curve(step: Any, state: Any, given: Callable[[int], dict], measure: Callable, steps: int, every: int) -> list[Any]:
    """Measurements before training and every `every` steps."""
    found = [measure(state.params)]
    for number in range(steps):
        state, _ = step(state, **given(number))
        if (number + 1) % every == 0:
            found.append(measure(state.params))
    return found


def first_at(curve_of: Sequence[float], goal: float, every: int) -> int | None:
    """Steps until a curve reaches a goal."""
    return next((number * every for number, value in enumerate(curve_of) if value >= goal), None)


# ---- a teacher of four layers, a student of two ----------------------------------------------------------------------


def distillation(seed: int, *, steps: int = 120, goal: float = 0.5) -> dict[str, Any]:
    """Accuracy of a student by step: distilled on its own samples, and supervised on samples of the same teacher."""
    every, sums = 10, Problems("addition", [2], (9, 25), seed=seed)
    large, small = model_of(4, 64), model_of(2, 48)
    teach = supervised(large, 2e-3)
    of_teacher, of_student = sums.accuracy(large), sums.accuracy(small)
    teacher = until(teach, teach.init(jax.random.key(seed)), sums.demonstrations(), of_teacher, 0.97, 700, 50).params
    first = supervised(small, 2e-3)
    start = until(first, first.init(jax.random.key(seed + 50)), sums.demonstrations(), of_student, 0.3, 500, 10).params
    prompts = sums.prompts()
    found: dict[str, Any] = {"teacher": of_teacher(teacher)}

    @jax.jit
    def written(prompts, number):
        sizes = {"samples_per_prompt": 1, "max_completion_tokens": sums.completion, **SAMPLING}
        return generate(large, teacher, prompts, jax.random.key(seed), number, **sizes)

    def lesson(number: int) -> dict[str, Any]:
        r = written(prompts[number].prompts, number)
        same = (r.prompt_tokens, r.prompt_length, r.prompt_id, r.tokens, r.length)
        return {"written": written_rows(*same, answer_width=1, alone=True)}

    by_texts = supervised(small, 1e-3)
    found["supervised on the teacher's texts"] = curve(
        by_texts, by_texts.init(jax.random.key(0), start), lesson, of_student, steps, every
    )
    for name, generator in (("on-policy, reverse KL", "reverse_kl"), ("on-policy, Jensen-Shannon", "jensen_shannon")):
        compared = renamed(
            divergence(generator=generator, samples="vocabulary"), over_vocabulary="teacher_over_vocabulary"
        )
        step = make_train_step(
            small,
            adam(1e-3),
            source=Rollout(1, max_completion_tokens=sums.completion, **SAMPLING),
            rewards=[rewards.exact_answer],
            losses=[compared],
            resources=Resources(networks={"teacher": Network(origin="given", model=large)}),
        )
        state = step.init(jax.random.key(seed), start, {"teacher": teacher})
        given = lambda number: {"prompts": prompts[number].prompts}  # noqa: E731
        found[name] = curve(step, state, given, of_student, steps, every)
    found["steps to the goal"] = {n: first_at(c, goal, every) for n, c in found.items() if isinstance(c, list)}
    return found | {"every": every, "goal": goal}


# ---- ReLIFT ----------------------------------------------------------------------------------------------------------


def relift(seed: int, *, steps: int = 60) -> dict[str, Any]:
    """Accuracy on sums of three digits (a third is right at the start), and the number of demonstrations used."""
    every, groups, samples = 10, 8, 8
    sums, hard = (Problems("addition", levels, (11, 35), seed=seed) for levels in ([2, 3], [3]))
    model = model_of(2, 64)
    prompts, of_hard = sums.prompts(size=groups), hard.accuracy(model)
    first = supervised(model, 2e-3)
    start = until(first, first.init(jax.random.key(seed)), sums.demonstrations(), of_hard, 0.33, 900, 10).params
    sampler = Rollout(samples, max_completion_tokens=35, prompts_per_step=groups, **SAMPLING)
    store = Hardest(16, 64, samples, 11, 35)
    sampled = {
        "rewards": [rewards.exact_answer],
        "credit": [("advantages", partial(advantages.group_normalized, scale="none"))],
    }
    beside = [losses.policy_gradient, losses.stored_likelihood]
    ways = {
        "reinforcement": (sampler, [losses.policy_gradient], 3e-4),
        "ReLIFT": ([sampler, store], beside, 3e-4),
    }
    found: dict[str, Any] = {"every": every}
    for name, (source, terms, rate) in ways.items():
        step = make_train_step(model, adam(rate), source=source, losses=terms, **sampled)
        state, taken = step.init(jax.random.key(seed), start), []
        accuracies = [of_hard(state.params)]
        for number in range(steps):
            state, metrics = step(state, prompts[number].prompts)
            taken.append(float(metrics.get("demonstrations/learned", 0.0)))
            if (number + 1) % every == 0:
                accuracies.append(of_hard(state.params))
        found[name] = accuracies
        found[f"{name}, demonstrations"] = sum(taken)
    by_texts, rows = supervised(model, 1e-3, groups), sums.demonstrations(groups)
    state = by_texts.init(jax.random.key(0), start)
    found["supervised"] = curve(by_texts, state, lambda number: {"written": rows(number)}, of_hard, steps, every)
    found["supervised, demonstrations"] = float(groups * steps)
    return found | {"share": found["ReLIFT, demonstrations"] / (groups * steps)}


# ---- forgetting ------------------------------------------------------------------------------------------------------


def forgetting(seed: int, *, steps: int = 80, goal: float = 0.8) -> dict[str, Any]:
    """Accuracy on chains and on sums, while only sums are trained, after training on both."""
    every, width = 5, (14, 32)
    old = Problems("chain", [2], width, seed=seed, count=2000, direct_share=0.0)
    new, model = Problems("addition", [2], width, seed=seed, count=2000), model_of(2, 64)
    of_old, of_new = old.accuracy(model), new.accuracy(model)
    first = supervised(model, 2e-3)
    state = until(first, first.init(jax.random.key(seed)), old.demonstrations(), of_old, 0.9, 600, 20)
    chains, sums = old.demonstrations(), new.demonstrations()
    mixed = lambda number: sums(number) if number % 2 else chains(number)  # noqa: E731
    start = until(first, state, mixed, lambda p: of_new(p) if of_old(p) >= 0.9 else 0.0, 0.4, 600, 10).params
    measure = lambda params: (of_old(params), of_new(params))  # noqa: E731
    prompts = new.prompts(size=12)
    reinforced = make_train_step(
        model,
        adam(3e-4),
        source=Rollout(8, max_completion_tokens=width[1], **SAMPLING),
        rewards=[rewards.exact_answer],
        credit=[("advantages", advantages.group_normalized)],
        losses=[losses.clipped_surrogate],
    )
    ways = {
        "supervised": (supervised(model, 1e-3), lambda number: {"written": sums(number + 1000)}),
        "reinforcement": (reinforced, lambda number: {"prompts": prompts[number].prompts}),
    }
    found: dict[str, Any] = {"every": every, "goal": goal}
    for name, (step, given) in ways.items():
        found[name] = curve(step, step.init(jax.random.key(seed), start), given, measure, steps, every)
        at = next((pair for pair in found[name] if pair[1] >= goal), None)
        found[f"{name}, old task at the goal"] = None if at is None else at[0]
    return found


DEMONSTRATIONS = {"distillation": distillation, "relift": relift, "forgetting": forgetting}


def plotted(figures: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """One SVG for each demonstration."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, seeds in figures.items():
        lines = {
            key: np.asarray([seed[key] for seed in seeds], float) for key in seeds[0] if isinstance(seeds[0][key], list)
        }
        of_pairs = next(iter(lines.values())).ndim == 3
        panels = {
            title: {key: (one[..., place] if of_pairs else one).tolist() for key, one in lines.items()}
            for place, title in enumerate(("old task", "new task") if of_pairs else ("accuracy",))
        }
        points = next(iter(lines.values())).shape[1]
        x = (np.arange(points) * seeds[0]["every"]).tolist()
        drawn({"panels": panels, "x": x, "xlabel": "steps"}, folder / f"hybrids_{name}.svg")


def table_of(seeds: dict[str, dict[str, Any]]) -> Table:
    """The results of each seed; of a curve its last value."""
    names = [key for key in next(iter(seeds.values())) if key != "every"]
    table = Table("seed", *names)
    for seed, one in seeds.items():
        told = [one[key][-1] if isinstance(one[key], list) else one[key] for key in names]
        told = [", ".join(map(str, value.values())) if isinstance(value, dict) else value for value in told]
        table.add_row(seed, *[f"{value:.3g}" if isinstance(value, float) else str(value) for value in told])
    return table


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=DEMONSTRATIONS, default=[*DEMONSTRATIONS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--json", type=Path, help="results; seeds in this file are not run again")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    kept = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    console, steps = Console(), {} if options.steps is None else {"steps": options.steps}
    for name in options.only:
        of = kept.setdefault(name, {})
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            if str(seed) in of:
                continue
            started = time.monotonic()
            of[str(seed)] = DEMONSTRATIONS[name](seed, **steps)
            of[str(seed)]["seconds"] = round(time.monotonic() - started, 1)
            console.print(f"{name}, seed {seed}: {of[str(seed)]['seconds']:.0f} s")
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(kept, indent=1) + "\n")
        if of:
            console.print(table_of(of))
    if options.plot:
        plotted({name: [*of.values()] for name, of in kept.items() if of}, options.plot)
    return kept


if __name__ == "__main__":
    main()
