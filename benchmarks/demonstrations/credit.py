"""Demonstrations of credit within a completion, on small runs with three seeds; docs/credit.md has the results.

    python benchmarks/demonstrations/credit.py            # all demonstrations without results
    python benchmarks/demonstrations/credit.py turns      # these

gains          whether IGPO's gains identify the tool call that returns the answer, before training
contributions  contributions of moves in the grid as predicted by SPA-RL and LaRe, against the true ones
filler         a process reward model that overrates unnecessary steps, with the sum and with the min form
turns          EPO and MAPO against GRPO, on the grid
durations      slow episodes that a collection window loses, with and without RL-MLE's weights
likelihood     a reward without a verifier against the verifier, on modular chains

All arms of a demonstration start from the same warm-started policy and differ only in the settings below. Results are
written to docs/demonstrations/credit.json, with a plot of each.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import curves
import jax
import jax.numpy as jnp
from charts import drawn

from jaxrl_llm import rewards, shipped
from jaxrl_llm.compilation_cache import compilation_cache_directory
from jaxrl_llm.config import read_tree
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.experience import Source
from jaxrl_llm.statistics import at_turns

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "demonstrations"


curves.SMALL["calculator"] = {"task": {"levels": [1, 2]}, "prompt": 15, "stop": 0.3}
ID = CharacterTokenizer().id
# Use finished runs of the cache, to continue an interrupted demonstration.
KEEP = "--keep" in sys.argv


# ---- functions that recipes use by `python:` ------------------------------------------------------------------------


def gain_auroc(turn_answer_logprobs, tokens, turn, source, length, answer_tokens, answer_length, weight):
    """Area under the ROC curve, over all calls, of the gain as a predictor of whether the tool returned the answer.

    P(gain of a call that did > gain of one that did not) + P(both are equal) / 2.
    """
    said = jnp.exp(turn_answer_logprobs)
    gains, turns = said[:, 1:] - said[:, :-1], said.shape[1] - 1
    width = tokens.shape[1]
    inside = (jnp.arange(width) < length[:, None]) & (source == Source.OBSERVATION)
    mine = inside[:, None, :] & (turn[:, None, :] == jnp.arange(turns)[None, :, None])
    first, count = jnp.argmax(mine, axis=2), mine.sum(axis=2)
    place = jnp.arange(answer_tokens.shape[1])
    returned = jnp.take_along_axis(
        jnp.broadcast_to(tokens[:, None], (*first.shape, width)),
        jnp.minimum(first[..., None] + 1 + place, width - 1),
        2,
    )
    same = (returned == answer_tokens[:, None]) | (place >= answer_length[:, None])[:, None]
    brought = (same.all(axis=2) & (count == answer_length[:, None] + 2)).ravel()
    called = ((count > 0) & (weight > 0)[:, None]).ravel()
    yes, no, gain = called & brought, called & ~brought, gains.ravel()
    pairs = (yes[:, None] & no[None]).astype(jnp.float32)
    above = (gain[:, None] > gain[None]) + 0.5 * (gain[:, None] == gain[None])
    return (pairs * above).sum() / pairs.sum()


def contribution_correlations(contributions, turn_rewards, turn, mask, weight, solved):
    """Pearson correlations of contributions with the rewards of moves in the return, and with their progress only."""
    moves = contributions.shape[1]
    taken = at_turns(mask, turn, mask, moves)[1] & (weight > 0)[:, None]
    place = jnp.arange(moves)
    last = taken & (place == jnp.where(taken, place, -1).max(axis=1, keepdims=True))
    added = turn_rewards[:, :moves]
    count = taken.sum()

    def correlation(x, y):
        x, y = (jnp.where(taken, z - jnp.where(taken, z, 0.0).sum() / count, 0.0) for z in (x, y))
        return (x * y).sum() / jnp.sqrt((x * x).sum() * (y * y).sum() + 1e-12)

    return correlation(contributions, added), correlation(contributions, added - solved[:, None] * last)


def grid_factors(tokens, turn, length, answer_tokens, *, turns=10, size=4):
    """Hand-written features of each move: the observation, the letter, and the decrease of the distance to the goal
    without walls.
    """
    inside = jnp.arange(tokens.shape[1]) < length[:, None]
    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))

    def behind(mark, letters):
        found = inside & (before == ID(mark))
        named = tokens[..., None] == jnp.asarray([ID(letter) for letter in letters])
        mine = found[:, None, :] & (turn[:, None, :] == jnp.arange(turns)[None, :, None])
        return jnp.einsum("bst,btk->bsk", mine.astype(jnp.float32), named.astype(jnp.float32))

    answer, move = behind("<o>", ".x!"), behind("<a>", "UDLR")
    step = (answer[..., 0] + answer[..., 2])[..., None] * (move @ jnp.array([[-1.0, 0], [1, 0], [0, -1], [0, 1]]))

    def cell(letter):
        at = jnp.argmax(answer_tokens == ID(letter), axis=1)
        return jnp.stack([at // (size + 1), at % (size + 1)], axis=1).astype(jnp.float32)[:, None]

    after = cell("S") + jnp.cumsum(step, axis=1)
    left = lambda places: jnp.abs(cell("G") - places).sum(axis=2, keepdims=True)  # noqa: E731
    return jnp.concatenate([answer, move, left(after - step) - left(after)], axis=2)


def overrated(tokens, length, turn, demonstration_tokens, demonstration_length, *, max_turns=10, filler=0.6):
    """A process reward model that overrates steps: 1 for a right column, `filler` for every other step."""
    right = rewards.reference_progress(
        tokens, length, turn, demonstration_tokens, demonstration_length, max_turns=max_turns
    )
    return jnp.where(right > 0, 1.0, filler)


def steps_taken(turn, length):
    inside = jnp.arange(turn.shape[1]) < length[:, None]
    return jnp.where(inside, turn + 1, 0).max(axis=1).astype(jnp.float32)


def of_all_rows(turns, rewards):
    """(turns, reward) of all episodes, before the window removes rows."""
    return turns.astype(jnp.float32).mean(), rewards.mean()


# ---- runs -----------------------------------------------------------------------------------------------------------


def trained(
    name: str, arms: dict[str, dict[str, Any]], metrics: tuple[str, ...], seeds: int, *, steps: int = curves.STEPS
) -> dict[str, Any]:
    """Curves of recipes, {arm: {metric: [list of means for each seed]}}; all start from the first arm's warm start."""
    cache, found = curves.cache_directory(), {}
    trees = {arm: curves.small(tree, steps) for arm, tree in arms.items()}
    first = next(iter(trees.values()))
    start = curves.warm_started(first | {"rewards": _verifier(first)}, cache)
    for arm, tree in trees.items():
        tree = tree | {key: start[key] for key in ("warm_start", "init_from")}
        runs = []
        for seed in range(seeds):
            jax.clear_caches()
            began, directory = time.perf_counter(), cache / "runs" / f"{name}-{arm.replace(' ', '_')}-{seed}"
            if not (KEEP and (directory / "summary.json").exists()):
                shutil.rmtree(directory, ignore_errors=True)
                curves.ran(tree | {"seed": seed}, directory)
            runs.append(curves.lines_of(directory))
            shown = {
                metric: [round(line[metric], 3) for line in (runs[-1][0], runs[-1][-1])]
                for metric in metrics
                if metric in runs[-1][0]
            }
            print(f"{name}, {arm}, seed {seed}: {shown}, {time.perf_counter() - began:.0f} s", flush=True)
        bins = min(curves.BINS, steps)
        found[arm] = {metric: [curves.binned(lines, metric, bins) for lines in runs] for metric in metrics}
    return found


def _verifier(tree: dict[str, Any]) -> list[Any]:
    return ["episode_reward"] if "environment" in tree else ["exact_answer"]


def recipe(name: str, **changes: Any) -> dict[str, Any]:
    """A shipped recipe with changes."""
    return copy.deepcopy(read_tree(shipped.recipe_path(name))) | changes


def likelihood(seeds: int) -> dict[str, Any]:
    """VeriFree, and the same estimator with the verifier's 0 and 1."""
    free = recipe("verifree")
    verified = {key: value for key, value in free.items() if key not in ("views", "shows")} | {
        "rewards": ["exact_answer"],
        "credit": [{"advantages": "leave_one_out"}],
        "losses": [{"policy_gradient": {"aggregation": "seq_mean_token_sum"}}],
    }
    return trained("likelihood", {"verifier": verified, "likelihood": free}, ("correct_share",), seeds)


def turns(seeds: int) -> dict[str, Any]:
    """GRPO, EPO and MAPO on the grid."""
    grpo = recipe("mapo")
    grpo = grpo | {"credit": [{"advantages": "group_normalized"}], "environment": {}}
    arms = {"GRPO": grpo, "EPO": recipe("epo"), "MAPO": recipe("mapo")}
    arms["MAPO's reward, GRPO"] = recipe("mapo") | {"credit": [{"advantages": "group_normalized"}]}
    return trained("turns", arms, ("correct_share", "entropy_per_token"), seeds)


def durations(seeds: int) -> dict[str, Any]:
    """Collection with a window and RL-MLE's weights, with a window without weights, and without a window."""
    measured = {"[metric/turns, metric/share]": {"python": "credit:of_all_rows"}}
    tree = recipe("rl_mle")
    window, weights, *rest = tree["credit"]
    arms = {"window": [window, *rest], "window and weights": [window, weights, *rest], "all rows": rest}
    trees = {arm: tree | {"credit": [measured, *credit]} for arm, credit in arms.items()}
    return trained("durations", trees, ("metric/turns", "metric/share"), seeds)


def gains(seeds: int) -> dict[str, Any]:
    """IGPO; its first step has the gains of the initial policy."""
    igpo = recipe("igpo")
    igpo["credit"] = [*igpo["credit"], {"metric/gain_auroc": {"python": "credit:gain_auroc"}}]
    return trained("gains", {"IGPO": igpo}, ("correct_share", "metric/gain_auroc"), seeds, steps=STEPS["gains"])


def contributions(seeds: int) -> dict[str, Any]:
    """A network on the text (SPA-RL), and a small one on features (LaRe), both trained on returns only.

    With LaRe the policy is frozen, so that the contributions of moves do not change.
    """
    measured = {"[metric/with_return, metric/with_progress]": {"python": "credit:contribution_correlations"}}
    text = recipe("spa_rl", environment={"potential": True})
    text["credit"] = [text["credit"][0], measured, *text["credit"][1:]]
    factors = recipe("spa_rl", environment={"potential": True})
    factors["networks"] = {"value": factors["networks"]["value"]}
    factors["training"] = factors["training"] | {"freeze_policy_steps": curves.STEPS}
    factors["losses"] = factors["losses"][:2]
    factors["credit"] = [
        {"turn_factors": {"python": "credit:grid_factors"}},
        {"contributions": {"latent_rewards": {"factors": 8, "width": 64, "learning_rate": 3.0e-3, "updates": 32}}},
        measured,
        *factors["credit"][1:],
    ]
    metrics = ("metric/with_return", "metric/with_progress")
    return trained("contributions", {"LaRe": factors, "SPA-RL": text}, metrics, seeds)


def filler(seeds: int) -> dict[str, Any]:
    """The same scores of steps, summed or in the min form; the verifier is only logged."""
    tree = read_tree(shipped.recipe_path("clip_delta"))
    scored = [{"turn": "separated_turns"}, {"turn_rewards": {"python": "credit:overrated"}}]
    measured = {"metric/steps": {"python": "credit:steps_taken"}}
    shared = {
        "rewards": [{"exact_answer": {"weight": 0.0}}],
        "losses": [{"clipped_surrogate": {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "seq_mean_token_mean"}}],
        "rollout": tree["rollout"] | {"max_completion_tokens": 40},
    }
    sums = {"turn_mixed_normalized": {"alpha": 1.0, "gamma": 1.0}}
    least, checked = ({"min_form_advantages": {"verifier_coefficient": one}} for one in (0.0, 1.0))
    arms = {
        name: recipe("clip_delta", **shared, credit=[*scored, measured, {"advantages": advantages}])
        for name, advantages in (("sum", sums), ("min form", least), ("min form and verifier", checked))
    }
    return trained("filler", arms, ("metric/steps", "correct_share", "completion_tokens"), seeds)


STEPS = {"gains": 6}  # others have the number of steps of curves.py
DEMONSTRATIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "gains": gains,
    "contributions": contributions,
    "filler": filler,
    "turns": turns,
    "durations": durations,
    "likelihood": likelihood,
}


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(DEMONSTRATIONS)} (default: those without results)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--keep", action="store_true", help="use finished runs of an interrupted call")
    options = parser.parse_args(given)
    if unknown := [name for name in options.names if name not in DEMONSTRATIONS]:
        parser.error(f"{unknown[0]} is not a demonstration; there are {', '.join(DEMONSTRATIONS)}")
    if directory := compilation_cache_directory():
        jax.config.update("jax_compilation_cache_dir", str(directory))
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "credit.json"
    for name in options.names or DEMONSTRATIONS:
        results = json.loads(file.read_text()) if file.exists() else {}
        if not options.names and name in results:
            continue
        found = DEMONSTRATIONS[name](options.seeds)
        results = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(results | {name: found}, indent=1) + "\n")
        if any(isinstance(seed, list) for arm in found.values() for metric in arm.values() for seed in metric):
            panels = {metric: {arm: of[metric] for arm, of in found.items()} for metric in next(iter(found.values()))}
            drawn({"panels": panels, "steps": STEPS.get(name, curves.STEPS)}, options.output / f"credit_{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
