"""Demonstrations of rewards: claims of papers, tested with the functions of this library on small problems.

    python benchmarks/demonstrations/rewards.py                    # all of them
    python benchmarks/demonstrations/rewards.py tournament cycle   # these; --seeds 3 --steps 60

`tournament` and `cycle` are simulations of a few seconds. The others train small policies on tasks of the library, one
or two minutes per run on one core, from cached warm starts (see curves.py). Each writes docs/demonstrations/NAME.json
and NAME.svg and prints its table; docs/demonstrations/rewards.md has the results.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import curves
import jax
import jax.numpy as jnp
import numpy as np
import optax
from charts import drawn

from jaxrl_llm import advantages, losses, shipped
from jaxrl_llm.compilation_cache import compilation_cache_directory
from jaxrl_llm.config import read_tree
from jaxrl_llm.rewards.judges.tournaments import tournament_rewards

OUT = Path(__file__).parents[2] / "docs" / "demonstrations"
Curves = dict[str, list[list[float | None]]]

# ---- a noisy judge --------------------------------------------------------------------------------------------------

GROUP, GROUPS, LEVELS = 8, 400, 5
NOISE = (0.25, 0.5, 1.0, 2.0)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis; equal values have their mean rank."""
    return (values[..., :, None] > values[..., None, :]).sum(-1) + 0.5 * (
        (values[..., :, None] == values[..., None, :]).sum(-1) - 1
    )


def rank_correlation(found: np.ndarray, truth: np.ndarray) -> float:
    """Spearman's rank correlation of one group; 0 if all ranks are equal."""
    a, b = (ranks(x) - ranks(x).mean() for x in (found, truth))
    norm = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / norm) if norm > 0 else 0.0


def tournament(seeds: int, steps: int) -> dict[str, Any]:
    """Rank correlation of a noisy judge's ratings and tournaments with the true ranks, by noise and number of calls."""
    del steps
    found: dict[str, list[Any]] = {}
    calls: dict[str, int] = {}

    def rated(truth: np.ndarray, noise: float, rng: np.random.Generator, votes: int, fresh: bool) -> np.ndarray:
        errors = rng.normal(size=(votes if fresh else 1, GROUP)) * noise
        return np.clip(np.round((LEVELS + 1) / 2 + truth + errors), 1, LEVELS).mean(0)  # 1 to 5, 3 for the mean answer

    def played(truth: np.ndarray, noise: float, rng: np.random.Generator, pairs: Sequence[tuple[int, int]]) -> Any:
        points = []
        for i, j in pairs:  # each in both orders; the judge's bias for the first is 0.5
            gaps = truth[i] - truth[j] + rng.normal(size=2) * noise * np.sqrt(2) + np.array([0.5, -0.5])
            one = np.clip(np.round(5 + 2 * gaps), 0, 10).sum()
            points.append((float(one), 20.0 - float(one)))
        return points

    for noise in NOISE:
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            sums: dict[str, list[float]] = {}
            for _ in range(GROUPS):
                truth = rng.normal(size=GROUP)
                for name, votes, fresh in (
                    ("rating, 1 call", 1, True),
                    ("rating, 4 equal calls", 4, False),
                    ("rating, 4 calls", 4, True),
                ):
                    value = rank_correlation(rated(truth, noise, rng, votes, fresh), truth)
                    sums.setdefault(name, []).append(value)
                    calls[name] = votes * GROUP
                for scheme in ("anchor", "swiss", "single_elimination", "round_robin"):
                    reward, matches = tournament_rewards(GROUP, partial(played, truth, noise, rng), scheme=scheme)
                    sums.setdefault(scheme, []).append(rank_correlation(np.array(reward), truth))
                    calls[scheme] = 2 * matches
            for name, values in sums.items():
                found.setdefault(name, [[] for _ in range(seeds)])[seed].append(float(np.mean(values)))
    return {"x": list(NOISE), "xlabel": "noise of one call", "calls": calls, "panels": {"rank correlation": found}}


# ---- preferences in a cycle -----------------------------------------------------------------------------------------

BEATS = jnp.array([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]])  # rock, paper, scissors: row beats column
START = jnp.array([0.4, 0.0, 0.0])


def cycle(seeds: int, steps: int) -> dict[str, Any]:
    """Entropy of a policy over rock, paper and scissors under SPO and under Bradley-Terry rewards."""
    prompts, samples = 32, 8
    group = jnp.repeat(jnp.arange(prompts), samples)
    number, weight = jnp.tile(jnp.arange(samples), prompts), jnp.ones(prompts * samples)
    optimizer = optax.sgd(0.3)

    better, worse = (jnp.array(x) for x in zip(*((i, j) for i in range(3) for j in range(3) if i != j), strict=True))
    rows, pairs = jnp.stack([better, worse], 1).ravel(), jnp.repeat(jnp.arange(6), 2)
    preferred = jnp.tile(jnp.array([1.0, 0.0]), 6)

    def fitted(logits: Any) -> Any:
        """Scores of a Bradley-Terry model of all preferences between two samples of a policy."""
        p = jax.nn.softmax(logits)
        share = jnp.repeat(p[better] * p[worse] * BEATS[better, worse], 2)

        def loss(scores: Any) -> Any:
            total, count = losses.bradley_terry(scores[rows], pairs, preferred, share, centring=1e-3)[:2]
            return total / count

        return jax.lax.scan(lambda x, _: (x - 4.0 * jax.grad(loss)(x), None), jnp.zeros(3), None, length=60)[0]

    def rewards_of(kind: str, logits: Any, actions: Any, scores: Any) -> Any:
        if kind == "SPO":
            by_number = actions.reshape(prompts, samples)[group]
            return advantages.win_rate(BEATS[actions[:, None], by_number], number, group, weight)
        return (fitted(logits) if kind == "Bradley-Terry, refitted" else scores)[actions]

    def run(kind: str, seed: int) -> list[float]:
        key = jax.random.key(seed)
        scores = fitted(START)

        def update(carry: Any, step: Any) -> Any:
            logits, held = carry
            actions = jax.random.categorical(jax.random.fold_in(key, step), logits, shape=group.shape)
            reward = rewards_of(kind, logits, actions, scores)
            advantage = advantages.leave_one_out(reward, group, weight)[:, None]

            def objective(x: Any) -> Any:
                logprobs = jax.nn.log_softmax(x)[actions][:, None]
                total, count = losses.policy_gradient(logprobs, advantage, jnp.ones_like(logprobs))[:2]
                return total / count

            change, held = optimizer.update(jax.grad(objective)(logits), held)
            logits = optax.apply_updates(logits, change)
            p = jax.nn.softmax(logits)
            return (logits, held), -(p * jnp.log(p)).sum()

        _, entropy = jax.jit(lambda: jax.lax.scan(update, (START, optimizer.init(START)), jnp.arange(600)))()
        return np.asarray(entropy)[::20].tolist()

    del steps
    kinds = ("SPO", "Bradley-Terry, fitted once", "Bradley-Terry, refitted")
    panels = {"entropy, nats": {kind: [run(kind, seed) for seed in range(seeds)] for kind in kinds}}
    return {"x": list(range(0, 600, 20)), "xlabel": "update", "panels": panels}


# ---- runs -----------------------------------------------------------------------------------------------------------

CONFIDENCE = re.compile(r"<c>(\d{1,3})</c>")


def round_confidence(completion: str) -> float:
    """10 if the stated confidence is a multiple of ten, else 0."""
    found = CONFIDENCE.search(completion)
    return 10.0 if found and int(found[1]) % 10 == 0 else 0.0


def modest_confidence(completion: str) -> float:
    """0.01 for a stated confidence of 0, less for a higher one, 0 for none."""
    found = CONFIDENCE.search(completion)
    return 0.01 * (1 - min(int(found[1]), 100) / 100) if found else 0.0


def confidence_bins(confidence: Any, correct: Any, weight: Any) -> tuple[Any, ...]:
    """Share of rows, sum of confidence and sum of correctness in five bins; their pooled values give the ECE."""
    known = (weight > 0) & ~jnp.isnan(confidence)
    place = jnp.clip(jnp.floor(jnp.where(known, confidence, 0.0) * 5), 0, 4)
    inside = (place[None] == jnp.arange(5)[:, None]) * known
    sums = [(inside * jnp.where(known, x, 0.0)).mean(1) for x in (jnp.ones_like(correct), confidence, correct)]
    return tuple(jnp.concatenate(sums))


BINS = [f"metric/{what}{place}" for what in ("n", "c", "r") for place in range(5)]  # rows, confidence, right


def pooled_ece(lines: Sequence[dict[str, Any]]) -> float:
    """Expected calibration error of the rows of several steps."""
    rows, stated, right = np.array([[line[name] for name in BINS] for line in lines]).mean(0).reshape(3, 5)
    return float(np.abs(stated - right).sum() / max(rows.sum(), 1e-9))


def trained(
    name: str, variants: dict[str, dict[str, Any]], of: Callable[..., Curves], seeds: int, steps: int, **more: Any
):
    """Runs of each variant and seed, and the curves that `of` computes from their metrics, which are cached."""
    cache = curves.cache_directory()
    panels: dict[str, dict[str, Any]] = {}
    for variant, tree in variants.items():
        start = curves.warm_started(tree, cache)
        for seed in range(seeds):
            directory = cache / "demonstrations" / f"{name}-{re.sub('[^a-z]+', '-', variant.lower())}-{seed}"
            shutil.rmtree(directory, ignore_errors=True)
            curves.ran(start | {"seed": seed}, directory)
            lines = curves.lines_of(directory)
            for panel, values in of(lines).items():
                panels.setdefault(panel, {}).setdefault(variant, []).append(values)
                print(
                    name, variant, seed, panel, [round(v, 3) for v in values[:: max(1, len(values) // 5)]], flush=True
                )
    x = np.linspace(steps / (2 * curves.BINS), steps, curves.BINS).round(1).tolist()
    return {"x": x, "xlabel": "step", "panels": panels} | more


def recipe(name: str, steps: int, sequences: int = curves.SEQUENCES, **changes: Any) -> dict[str, Any]:
    """A shipped recipe or config with changes, at the small sizes of curves.py."""
    path = shipped.recipe_path(name)
    return curves.small(read_tree(path) | changes, steps, sequences)


def binned(lines: Sequence[dict[str, Any]], **names: str) -> Curves:
    """Curves by the names of their panels, from metrics."""
    return {panel: curves.binned(list(lines), metric) for panel, metric in names.items()}  # type: ignore[return-value]


def scales(seeds: int, steps: int) -> dict[str, Any]:
    """Three rewards with scales 1, 10 and 0.01: their sum normalised by group, and GDPO."""
    here = {"task": {"name": "addition", "levels": [2], "options": {"confidence": True, "scratchpad": False}}}
    rewards = ["exact_answer", *({"python": f"rewards:{one}"} for one in ("round_confidence", "modest_confidence"))]
    tree = recipe("rlcr", steps, **here, rewards=rewards)
    tree["rollout"] |= {"samples_per_prompt": 8, "temperature": 1.0, "max_completion_tokens": 16}
    tree["training"]["prompts_per_step"] = 32
    variants = {
        "sum": tree | {"credit": [{"advantages": "group_normalized"}]},
        "GDPO": tree | {"credit": [{"advantages": {"decoupled_normalized": {"scale": "batch"}}}]},
    }
    names = {
        "right answers (scale 1)": "reward/exact_answer",
        "multiples of ten (scale 10)": "reward/round_confidence",
        "modesty (scale 0.01)": "reward/modest_confidence",
    }
    return trained("scales", variants, lambda lines: binned(lines, **names), seeds, steps)


def confidence(seeds: int, steps: int) -> dict[str, Any]:
    """Correctness as the reward, and correctness with the Brier score of the stated confidence (RLCR)."""
    here = {"task": {"name": "addition", "levels": [2, 3], "options": {"confidence": True, "scratchpad": False}}}
    tree = recipe("rlcr", steps, **here)
    tree["task"]["levels"] = [2, 3]
    tree["rollout"] |= {"max_prompt_tokens": 11, "max_completion_tokens": 16, "temperature": 1.0}
    read = {"confidence": {"stated_confidence": {"opening": "<c>", "closing": "</c>", "scale": 100}}}
    told = {f"[{', '.join(BINS)}]": {"python": "rewards:confidence_bins"}}
    last = {"advantages": {"group_normalized": {"scale": "none"}}}
    variants = {
        "right answers": tree | {"credit": [read, told, last]},
        "RLCR": tree | {"credit": [read, told, {"rewards": "calibrated_correctness"}, last]},
    }

    def of(lines: list[dict[str, Any]]) -> Curves:
        parts = np.array_split(np.arange(len(lines)), curves.BINS)
        ece = [pooled_ece([lines[i] for i in part]) for part in parts]
        return binned(lines, **{"right answers": "correct_share"}) | {"expected calibration error": ece}  # type: ignore[return-value]

    return trained("confidence", variants, of, seeds, steps)


def farmed(seeds: int, steps: int) -> dict[str, Any]:
    """+0.1 for each of at most twelve turns with a calculator: added, only with a right answer, and without it."""
    tree = recipe("g_ra", steps, 64)
    tree["task"] |= {"levels": [1], "options": {"repeated": 0.5, "spare_calls": 11}}
    tree["environment"] |= {"error_penalty": 0.0, "most_operations": 1, "max_turn_tokens": 12}
    tree["rollout"] |= {"max_completion_tokens": 208, "temperature": 1.0}
    tree["warm_start"] |= {"stop_at_accuracy": 0.8, "sequences_per_step": 32, "probe_every_steps": 40}
    tree["training"] |= {"learning_rate": 1e-3}
    paid = [{"episode_reward": {"weight": 1.0}}, {"turn_count": {"weight": 0.1}}]
    watched = ["episode_reward", {"turn_count": {"weight": 0.0}}]
    gate = {"gated_sum": {"order": ["episode_reward", "turn_count"], "thresholds": [0.0], "weights": [1.0, 0.1]}}
    normalised = {"advantages": "group_normalized"}
    variants = {
        "plain sum": tree | {"rewards": paid, "credit": [normalised]},
        "gate": tree | {"rewards": paid, "credit": [{"rewards": gate}, normalised]},
        "right answers alone": tree | {"rewards": watched, "credit": [normalised]},
    }
    names = {"right answers": "correct_share", "turns": "reward/turn_count"}
    return trained("farmed", variants, lambda lines: binned(lines, **names), seeds, steps)


def votes(seeds: int, steps: int) -> dict[str, Any]:
    """Majority vote as the label (TTRL), and majority vote with novelty (EVOL-RL), without reference answers."""
    variants = {}
    for name, title in (("ttrl", "majority vote"), ("evol_rl", "EVOL-RL")):
        tree = recipe(name, steps, 256)
        tree["evaluation"] |= {"every_steps": max(1, steps // 10), "problems": 128}
        tree["task"] |= {"validation_items": 128}
        variants[title] = tree

    def of(lines: list[dict[str, Any]]) -> Curves:
        return {
            name: [line[metric] for line in lines if metric in line]
            for name, metric in (("pass@1", "validation/pass@1"), ("pass@8", "validation/pass@8"))
        }

    found = trained("votes", variants, of, seeds, steps)
    count = len(next(iter(found["panels"]["pass@1"].values()))[0])
    return found | {"x": np.linspace(steps / count, steps, count).tolist()}


STEPS = {"scales": 40, "confidence": 180, "farmed": 30, "votes": 80}
DEMONSTRATIONS = {one.__name__: one for one in (tournament, cycle, scales, confidence, votes, farmed)}


def table(found: dict[str, Any]) -> str:
    """A Markdown table of the first and last value of each curve: mean over seeds and range."""
    panels, rows = found["panels"], []
    for variant in next(iter(panels.values())):
        cells = []
        for by_variant in panels.values():
            values = np.array(by_variant[variant], float)
            first, last = values[:, 0], values[:, -max(1, values.shape[1] // 5) :].mean(1)
            cells.append(f"{first.mean():.3g} | {last.mean():.3g} ({last.min():.3g} to {last.max():.3g})")
        rows.append(f"| {variant} | {' | '.join(cells)} |")
    head = " | ".join(f"{panel}: start | end" for panel in panels)
    return "\n".join([f"| | {head} |", "|---" * (1 + 2 * len(panels)) + "|", *rows])


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*DEMONSTRATIONS, []], help="which; without any, all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="training steps (default: those of each demonstration)")
    parser.add_argument("--output", type=Path, default=OUT)
    options = parser.parse_args(given)
    options.output.mkdir(parents=True, exist_ok=True)
    if directory := compilation_cache_directory():
        jax.config.update("jax_compilation_cache_dir", str(directory))
    for name in options.names or DEMONSTRATIONS:
        found = DEMONSTRATIONS[name](options.seeds, options.steps or STEPS.get(name, 0))
        (options.output / f"{name}.json").write_text(json.dumps(found) + "\n")
        drawn(found, options.output / f"{name}.svg")
        print(f"{name}\n{table(found)}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
