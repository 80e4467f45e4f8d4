"""Demonstrations of rewards: what papers claim, tried with the functions of this library on small problems.

    python benchmarks/demonstrations/rewards.py                    # all of them
    python benchmarks/demonstrations/rewards.py cycle --seeds 5    # one

Both are simulations of seconds. Each writes docs/demonstrations/NAME.json and NAME.svg and prints its table;
docs/demonstrations/rewards.md says what was seen.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_llm import advantages, losses
from jaxrl_llm.reporting.figures import INCHES, STYLE
from jaxrl_llm.reporting.report import COLOURS
from jaxrl_llm.rewards.judges.tournaments import tournament_rewards

OUT = Path(__file__).parents[2] / "docs" / "demonstrations"

# ---- a noisy judge --------------------------------------------------------------------------------------------------

GROUP, GROUPS, LEVELS = 8, 400, 5
NOISE = (0.25, 0.5, 1.0, 2.0)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, equal values sharing their mean."""
    return (values[..., :, None] > values[..., None, :]).sum(-1) + 0.5 * (
        (values[..., :, None] == values[..., None, :]).sum(-1) - 1
    )


def rank_correlation(found: np.ndarray, truth: np.ndarray) -> float:
    """Spearman's rank correlation of one group; 0 where all are ranked alike."""
    a, b = (ranks(x) - ranks(x).mean() for x in (found, truth))
    norm = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / norm) if norm > 0 else 0.0


def tournament(seeds: int) -> dict[str, Any]:
    """Rank correlation with the truth of ratings and tournaments of one noisy judge, by its noise and its calls."""
    found: dict[str, list[Any]] = {}
    calls: dict[str, int] = {}

    def rated(truth: np.ndarray, noise: float, rng: np.random.Generator, votes: int, fresh: bool) -> np.ndarray:
        errors = rng.normal(size=(votes if fresh else 1, GROUP)) * noise
        return np.clip(np.round((LEVELS + 1) / 2 + truth + errors), 1, LEVELS).mean(0)  # 1 to 5, 3 for the mean answer

    def played(truth: np.ndarray, noise: float, rng: np.random.Generator, pairs: Sequence[tuple[int, int]]) -> Any:
        points = []
        for i, j in pairs:  # each in both orders; what stands first is liked by 0.5
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


def cycle(seeds: int) -> dict[str, Any]:
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

    kinds = ("SPO", "Bradley-Terry, fitted once", "Bradley-Terry, refitted")
    panels = {"entropy, nats": {kind: [run(kind, seed) for seed in range(seeds)] for kind in kinds}}
    return {"x": list(range(0, 600, 20)), "xlabel": "update", "panels": panels}


DEMONSTRATIONS = {one.__name__: one for one in (tournament, cycle)}


def drawn(found: dict[str, Any], file: Path) -> None:
    """One chart a panel: the mean over seeds of each variant, the band from the lowest to the highest."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = found["panels"]
    with rc_context(STYLE):
        figure = Figure(figsize=(INCHES[0] * len(panels), INCHES[1]), layout="constrained")
        for axes, (title, by_variant) in zip(
            np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True
        ):
            for number, (variant, seeds) in enumerate(by_variant.items()):
                values, colour = np.array(seeds, float), COLOURS[number % len(COLOURS)]
                x = found["x"][: values.shape[1]]
                axes.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
                axes.plot(x, values.mean(0), color=colour, label=variant)
            axes.set(title=title, xlabel=found["xlabel"])
        axes.legend()
        figure.savefig(file, metadata={"Date": None})


def table(found: dict[str, Any]) -> str:
    """First and last values of each curve, mean over seeds (lowest to highest), in Markdown."""
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
    parser.add_argument("--output", type=Path, default=OUT)
    options = parser.parse_args(given)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.names or DEMONSTRATIONS:
        found = DEMONSTRATIONS[name](options.seeds)
        (options.output / f"{name}.json").write_text(json.dumps(found) + "\n")
        drawn(found, options.output / f"{name}.svg")
        print(f"{name}\n{table(found)}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
