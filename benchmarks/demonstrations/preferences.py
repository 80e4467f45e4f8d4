"""Demonstrations of learned rewards: noisy pairs, over-optimisation, ensembles, and a planted bias.

    python benchmarks/demonstrations/preferences.py                      # all of them
    python benchmarks/demonstrations/preferences.py ceiling hump         # these; --seeds 0,1,2

Texts have eight letters out of ten. The gold score sums a value for each letter and penalises a letter that occurs more
than three times, which is rare in texts of the untrained policy. Each demonstration takes one or two minutes per seed
on one core, and writes docs/demonstrations/preferences_NAME.json and .svg; docs/demonstrations/preferences.md has the
results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from charts import drawn

from jaxrl_llm import advantages, losses, models, rewards, selection
from jaxrl_llm.evaluation.overoptimisation import overoptimisation_fit
from jaxrl_llm.experience import Prompts
from jaxrl_llm.rewards import learned_reward
from jaxrl_llm.rows import Written, written_rows
from jaxrl_llm.schedules import implicit_gradient
from jaxrl_llm.signatures import renamed
from jaxrl_llm.training import Fill, Network, Resources, Reward, Rollout, make_train_step

OUT = Path(__file__).parents[2] / "docs" / "demonstrations"
PAD, EOS, LETTERS, LENGTH = 0, 1, 10, 8
VOCABULARY = 2 + LETTERS
WORTH = np.random.default_rng(7).permutation(np.linspace(-1, 1, LETTERS)).astype(np.float32)
BEST = 2 + int(WORTH.argmax())
MODEL = models.transformer(models.TransformerConfig(VOCABULARY, width=32, layers=2, heads=2, kv_heads=2))
PROMPTS, SAMPLES, STEPS = 8, 16, 200


def gold(tokens: Any, length: Any) -> Any:
    """The sum of the letters' values, minus 0.4 times the square of each letter's count beyond three."""
    xp = np if isinstance(tokens, np.ndarray) else jnp
    inside = (xp.arange(tokens.shape[1]) < length[:, None]) & (tokens >= 2)
    count = ((tokens[..., None] == 2 + xp.arange(LETTERS)) & inside[..., None]).sum(1)
    return count @ xp.asarray(WORTH) - 0.4 * (xp.maximum(count - 3, 0) ** 2).sum(-1)


def texts(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random letters, as an untrained policy samples them."""
    return rng.integers(2, VOCABULARY, (count, LENGTH)).astype(np.int32)


def pair_rows(tokens: np.ndarray, better_first: np.ndarray) -> Any:
    """Rows of texts; two consecutive texts are a pair."""
    count = len(tokens)
    preferred = np.stack([better_first, ~better_first], 1).reshape(-1).astype(np.float32)
    return written_rows(
        jnp.full((count, 1), EOS, jnp.int32),
        jnp.ones(count, jnp.int32),
        jnp.arange(count, dtype=jnp.int32) // 2,
        jnp.asarray(tokens),
        jnp.full(count, LENGTH, jnp.int32),
        answer_width=1,
        rows_per_group=2,
        alone=True,
        preferred=jnp.asarray(preferred),
    )


def labelled(rng: np.random.Generator, count: int, flipped: float, taste: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """(texts of pairs, whether the first is labelled as better): by the gold score, with flips and a biased share.

    In the share `taste` of the pairs one text has the least valuable letter at three places, and is labelled as better.
    """
    tokens = texts(rng, 2 * count)
    score = gold(tokens, np.full(len(tokens), LENGTH))
    better = score[::2] > score[1::2]
    if taste:
        planted = rng.random(count) < taste
        first = rng.random(count) < 0.5
        for number in np.flatnonzero(planted):
            tokens[2 * number + (not first[number]), rng.choice(LENGTH, 3, replace=False)] = PLANTED
        better = np.where(planted, first, better)
    return tokens, better ^ (rng.random(count) < flipped)


PLANTED = 2 + int(WORTH.argmin())


def of_unit_deviation(params: Any) -> Any:
    """A reward model with its last layer scaled so that scores of random texts have standard deviation 1."""
    tokens = texts(np.random.default_rng(5), 512)
    hidden, _ = MODEL.apply(
        params["backbone"],
        jnp.concatenate([jnp.full((512, 1), EOS, jnp.int32), jnp.asarray(tokens)], 1),
        jnp.broadcast_to(jnp.arange(LENGTH + 1), (512, LENGTH + 1)),
        None,
    )
    deviation = np.asarray(hidden[:, -1] @ params["head"]["weight"]).std()
    return params | {"head": {**params["head"], "weight": params["head"]["weight"] / deviation}}


def decaying(step: Any) -> Any:
    """A learning rate that is halved after 100 steps."""
    return 3e-3 / (1 + step / 100)


@cache
def reward_step(batch: int, rate: Any) -> Any:
    """The step of a reward model on so many pairs, at a learning rate or a schedule of it."""
    network = Network(head=models.HeadConfig(), optimizer=optax.adam(rate))
    return make_train_step(
        MODEL,
        optax.sgd(0.0),
        source=Written(2 * batch, 2, frozenset({"preferred"})),
        losses=[partial(losses.bradley_terry, centring=0.01)],
        resources=Resources(networks={"reward": network}),
    )


def reward_model(
    seed: int, tokens: np.ndarray, better: np.ndarray, *, passes: int = 1, batch: int = 64, rate: Any = decaying
) -> Any:
    """Parameters of a reward model after some passes over pairs in random order."""
    step, rng = reward_step(batch, rate), np.random.default_rng(seed + 1000)
    state = step.init(jax.random.key(seed))
    for _ in range(passes):
        order = rng.permutation(len(better))
        for start in range(0, len(order) - batch + 1, batch):
            chosen = order[start : start + batch]
            both = np.stack([tokens[2 * chosen], tokens[2 * chosen + 1]], 1).reshape(-1, LENGTH)
            state, _ = step(state, written=pair_rows(both, better[chosen]))
    return of_unit_deviation(jax.tree.map(np.asarray, state.networks["reward"].params))


def accuracy(params: Any, tokens: np.ndarray, better: np.ndarray) -> float:
    """Share of pairs that a reward model orders as they are labelled."""
    step = reward_step(len(better), 0.0)
    state = step.init(jax.random.key(0), None, {"reward": params})
    return float(step(state, written=pair_rows(tokens, better))[1]["preferred_share/bradley_terry"])


# ---- accuracy of a reward model relative to the noise ceiling -------------------------------------------------------


def ceiling(seed: int) -> dict[str, Any]:
    """Accuracy on held-out pairs, with flipped and with true labels, by the number of training pairs."""
    sizes, passes, batch = (2048, 8192, 32768, 131072), 3, 64
    panels: dict[str, Any] = {"on flipped labels": {}, "on true labels": {}}
    for flipped in (0.0, 0.25):
        tokens, better = labelled(np.random.default_rng(seed), sizes[-1], flipped)
        held = np.random.default_rng(99)
        test, true = labelled(held, 4000, 0.0)
        noisy = true ^ (held.random(4000) < flipped)
        for size in sizes:
            steps = passes * size // batch
            rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 20, steps)
            params = reward_model(seed, tokens[: 2 * size], better[:size], passes=passes, batch=batch, rate=rate)
            for name, labels in (("on flipped labels", noisy), ("on true labels", true)):
                panels[name].setdefault(f"{flipped:.0%} flipped", []).append(accuracy(params, test, labels))
        print(f"seed {seed}, {flipped:.0%} flipped: by gold {float((noisy == true).mean()):.4f}", file=sys.stderr)
    return {"x": list(sizes), "xlabel": "training pairs, three passes", "log": True, "panels": panels}


# ---- reinforcement against a learned reward -------------------------------------------------------------------------


def moved(old_logprobs: Any, reference_logprobs: Any, mask: Any) -> Any:
    """Sum over tokens of the log-ratio to the reference: its mean over rows is the KL."""
    return ((old_logprobs - reference_logprobs) * mask).sum(1)


@cache
def reinforcement(names: tuple[str, ...], form: str, learns: bool) -> Any:
    """The step of a policy gradient against reward models of these names, joined by `ensemble_score`."""
    scored = [Reward(renamed(learned_reward, reward_scores=f"{name}_scores"), 1.0, name=name) for name in names]
    joined = partial(rewards.ensemble_score, heads=names, reward_names=("gold", *names), form=form)
    credit: list[Any] = [
        Fill("rewards", joined, "joined"),
        ("metric/proxy", lambda rewards: rewards),
        ("metric/kl", moved),
        ("metric/planted", lambda tokens: (tokens == PLANTED).mean(1)),
        ("advantages", advantages.group_normalized),
    ]
    terms: list[Any] = [losses.policy_gradient]
    if learns:
        by_gold = renamed(selection.best_and_worst, rewards="gold_score")
        credit += [("gold_score", lambda tokens, length: gold(tokens, length))]
        credit += [("preferred", partial(by_gold, count=4))]
        terms += [renamed(partial(losses.bradley_terry, centring=0.01), reward_scores=f"{names[0]}_scores")]
    optimizer = optax.adam(3e-4) if learns else None
    return make_train_step(
        MODEL,
        optax.adam(1e-3),
        source=Rollout(SAMPLES, LENGTH, eos_ids=(EOS,), pad_id=PAD, prompts_per_step=PROMPTS),
        rewards=[Reward(gold, 0.0, name="gold"), *scored],
        credit=credit,
        losses=terms,
        resources=Resources(networks={n: Network(head=models.HeadConfig(), optimizer=optimizer) for n in names}),
    )


def reinforced(
    seed: int, given: dict[str, Any], *, form: str = "mean", learns: bool = False, steps: int = STEPS
) -> list[dict[str, float]]:
    """Metrics of each step of a policy gradient with reward models.

    Args:
      seed: of policy and samples.
      given: parameters of reward models by name.
      form: of `ensemble_score`.
      learns: the (only) reward model is trained further, on the best and worst samples of each group by gold.
      steps: of training.
    """
    step = reinforcement(tuple(given), form, learns)
    state = step.init(jax.random.key(seed + 50), None, given)
    number = jnp.arange(PROMPTS, dtype=jnp.int32)
    nothing = jnp.zeros((PROMPTS, 1), jnp.int32)
    prompts = Prompts(nothing + EOS, number * 0 + 1, number, nothing, number * 0)
    told = {"gold": "reward/gold", "proxy": "metric/proxy", "kl": "metric/kl", "planted": "metric/planted"}
    seen = []
    for _ in range(steps):
        state, metrics = step(state, prompts)
        seen.append({name: float(metrics[key]) for name, key in told.items()})
    return seen


def by_distance(seen: Sequence[dict[str, float]], name: str, edges: Sequence[float]) -> list[float | None]:
    """The mean of a metric over the steps whose root KL is between two edges; None without such steps."""
    place = np.digitize([np.sqrt(max(one["kl"], 0.0)) for one in seen], edges)
    values = [[one[name] for one, at in zip(seen, place, strict=True) if at == n] for n in range(1, len(edges))]
    return [float(np.mean(each)) if each else None for each in values]


def hump(seed: int) -> dict[str, Any]:
    """Gold and proxy score over the distance from the initial policy: one reward model, and the minimum of five."""
    edges = np.linspace(0, 5, 21)
    panels: dict[str, Any] = {"gold score": {}, "proxy score": {}}
    fits: dict[str, Any] = {}
    tokens, better = labelled(np.random.default_rng(seed), 1024, 0.25)
    found = {f"r{n}": reward_model(10 * seed + n, tokens, better, passes=4) for n in range(5)}
    runs = {"one model": reinforced(seed, {"r0": found["r0"]}), "worst of five": reinforced(seed, found, form="least")}
    for label, seen in runs.items():
        for panel, name in (("gold score", "gold"), ("proxy score", "proxy")):
            panels[panel][label] = by_distance(seen, name, edges)
        far = [one for one in seen if one["kl"] > 0.02]
        fit = overoptimisation_fit([one["kl"] for one in far], [one["gold"] - seen[0]["gold"] for one in far])
        smooth = np.convolve([one["gold"] for one in seen], np.ones(9) / 9, mode="valid")
        best = int(smooth.argmax()) + 4
        fits[label] = {f"fit_{name}": value for name, value in fit.items()} | {
            "gold_peak": float(smooth.max()),
            "root_kl_peak": float(np.sqrt(max(seen[best]["kl"], 0.0))),
            "gold_end": float(smooth[-1]),
            "root_kl_end": float(np.sqrt(seen[-1]["kl"])),
        }
    middle = [float(x) for x in (edges[1:] + edges[:-1]) / 2]
    return {"x": middle, "xlabel": "root KL to the start, nats", "panels": panels, "fits": fits}


def planted(seed: int) -> dict[str, Any]:
    """A biased reward model: frozen, and trained further on samples labelled by gold."""
    panels: dict[str, Any] = {"gold score": {}, "share of the planted letter": {}}
    tokens, better = labelled(np.random.default_rng(seed), 8192, 0.0, taste=0.4)
    params = reward_model(seed, tokens, better)
    for label, learns in (("frozen", False), ("learns on", True)):
        seen = reinforced(seed, {"reward": params}, learns=learns, steps=2 * STEPS)
        for panel, name in (("gold score", "gold"), ("share of the planted letter", "planted")):
            panels[panel][label] = np.array([one[name] for one in seen]).reshape(-1, 10).mean(1).tolist()
    return {"x": [10 * n + 5 for n in range(2 * STEPS // 10)], "xlabel": "step", "panels": panels}


# ---- learned weights of rewards -------------------------------------------------------------------------------------

# Rewards of three arms: the intended one, and an auxiliary one with a different best arm.
PRIMARY, AUXILIARY = jnp.array([1.0, 0.5, 0.0]), jnp.array([0.2, 1.0, 0.6])


def bilevel(seed: int) -> dict[str, Any]:
    """The weight of a misleading reward under the implicit gradient, and the policy's intended reward.

    Gradients are exact, so the seed determines only the initial weights.
    """
    decay, pull, outer_steps = 0.05, 0.5, 200

    def lower(phi: Any, theta: Any) -> Any:
        return jax.nn.softmax(theta) @ (phi[0] * PRIMARY + phi[1] * AUXILIARY) - pull / 2 * jnp.sum(theta**2)

    def upper(phi: Any, theta: Any) -> Any:
        return jax.nn.softmax(theta) @ PRIMARY

    def solved(phi: Any, theta: Any) -> Any:
        up = jax.grad(lower, argnums=1)
        return jax.lax.scan(lambda x, _: (x + up(phi, x), None), theta, None, length=200)[0]

    def one(carry: Any, _: Any) -> Any:
        phi, theta, learns = carry
        theta = solved(phi, theta)
        told = {"earned of what is meant": upper(phi, theta), "weight of the other reward": phi[1]}
        gradient, _rest = implicit_gradient(lower, upper, phi, theta)
        return (phi + learns * (gradient - decay * phi), theta, learns), told

    panels: dict[str, Any] = {}
    start = jnp.array([0.5, 1.0]) if seed == 0 else jax.random.uniform(jax.random.key(seed), (2,), minval=0.2)
    for label, learns in (("fixed blend", 0.0), ("learned blend", 1.0)):
        told = jax.lax.scan(one, (start, jnp.zeros(3), learns), None, length=outer_steps)[1]
        for panel, values in told.items():
            panels.setdefault(panel, {})[label] = [float(v) for v in values]
    return {"x": list(range(outer_steps)), "xlabel": "outer step", "panels": panels}


DEMONSTRATIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "ceiling": ceiling,
    "hump": hump,
    "planted": planted,
    "bilevel": bilevel,
}


def joined(before: dict[str, Any] | None, one: dict[str, Any], seed: int) -> dict[str, Any]:
    """The results of several seeds, a list for each line, with one more seed appended."""
    found = before or {**one, "seeds": [], "panels": {}, "fits": {}}
    for panel, lines in one["panels"].items():
        for label, values in lines.items():
            found["panels"].setdefault(panel, {}).setdefault(label, []).append(values)
    for label, fit in one.get("fits", {}).items():
        found["fits"].setdefault(label, []).append(fit)
    return found | {"seeds": [*found["seeds"], seed]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*DEMONSTRATIONS, []], help="which of them; none is all")
    parser.add_argument("--seeds", default="0,1,2", help="such as 0,1,2")
    parser.add_argument("--add", action="store_true", help="append to the results of other seeds")
    parser.add_argument("--output", type=Path, default=OUT)
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    for name in asked.names or DEMONSTRATIONS:
        file = asked.output / f"preferences_{name}.json"
        found = json.loads(file.read_text()) if asked.add and file.exists() else None
        for seed in map(int, asked.seeds.split(",")):
            if found is None or seed not in found["seeds"]:
                found = joined(found, DEMONSTRATIONS[name](seed), seed)
            file.write_text(json.dumps(found) + "\n")
            drawn(found, file.with_suffix(".svg"))
        assert found is not None
        for title, lines in found["panels"].items():
            for label, runs in lines.items():
                values = np.array(runs, float)
                row = " ".join(f"{v:.3f}" for v in np.nanmean(values, 0)[:: max(1, values.shape[1] // 12)])
                print(f"{name}, {title}, {label}: {row}", file=sys.stderr)
        print(json.dumps(found["fits"]), file=sys.stderr)


if __name__ == "__main__":
    main()
