"""A generative judge that writes a reason before its verdict, trained by RL, compared with a scalar reward model.

    python benchmarks/demonstrations/verdicts.py                       # seeds 0, 1, 2
    python benchmarks/demonstrations/verdicts.py --seeds 0 --steps 25  # a quick run

Pairs are two claims about the sum of six digits modulo five. The right claim is easy to find with running sums, and
hard without. One transformer of two layers is trained on 512 worked examples until 70% of the verdicts are right, and
then four judges are trained from it on the same labelled pairs:

    scalar twin            a head on its last state, by Bradley-Terry
    verdict alone          it writes which claim is right, by RL
    reason, then verdict   it writes the running sums first; the reward is whether the verdict is right
    reason rewarded too    the same, plus half of the F1 of its sums against the right ones (RM-NLHF)

A seed takes two to three minutes on one core. Files: docs/demonstrations/verdicts.json and .svg.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from charts import drawn

from jaxrl_llm import advantages, losses, models
from jaxrl_llm.experience import Prompts
from jaxrl_llm.rollout.generation import generate
from jaxrl_llm.rows import Written, written_rows
from jaxrl_llm.training import Network, Resources, Reward, Rollout, make_train_step

OUT = Path(__file__).parents[2] / "docs" / "demonstrations"
PAD, EOS, BAR, FIRST, SECOND, ZERO, BASE, DIGITS = 0, 1, 2, 3, 4, 5, 5, 6
MODEL = models.transformer(models.TransformerConfig(ZERO + BASE, width=64, layers=2, heads=4, kv_heads=4))
PAIRS, SAMPLES, HELD_OUT = 32, 8, 1024


class Pairs(NamedTuple):
    """Two claims about the sum of digits: tokens of the digits, both claims, the running sums, the verdict."""

    digits: np.ndarray
    claims: np.ndarray
    sums: np.ndarray
    verdict: np.ndarray

    def __getitem__(self, chosen: Any) -> Pairs:  # type: ignore[override]
        return Pairs(*(part[chosen] for part in tuple(self)))


def pairs(rng: np.random.Generator, count: int) -> Pairs:
    """Pairs with one right claim, at random the first or the second."""
    digits = rng.integers(0, BASE, (count, DIGITS))
    sums = digits.cumsum(1) % BASE
    right, wrong = sums[:, -1], (sums[:, -1] + rng.integers(1, BASE, count)) % BASE
    second = rng.random(count) < 0.5
    claims = np.where(second[:, None], np.stack([wrong, right], 1), np.stack([right, wrong], 1))
    return Pairs(ZERO + digits, ZERO + claims, ZERO + sums[:, 1:], np.where(second, SECOND, FIRST))


def questions(of: Pairs, number: int = 0) -> Prompts:
    """Prompts of a generative judge: digits, both claims. The reference answer is the reason and the verdict."""
    count = len(of.verdict)
    asked = np.concatenate([of.digits, np.full((count, 1), BAR), of.claims], 1)
    answer = np.concatenate([of.sums, of.verdict[:, None]], 1)
    return Prompts(
        jnp.asarray(asked, jnp.int32),
        jnp.full(count, asked.shape[1], jnp.int32),
        jnp.arange(count, dtype=jnp.int32) + number,
        jnp.asarray(answer, jnp.int32),
        jnp.full(count, answer.shape[1], jnp.int32),
    )


def worked(of: Pairs, reason: bool) -> Any:
    """Reference judgements."""
    asked = questions(of)
    end = jnp.full((len(of.verdict), 1), EOS, jnp.int32)
    said = jnp.concatenate([asked.answer_tokens if reason else asked.answer_tokens[:, -1:], end], 1)
    length = jnp.full(len(said), said.shape[1], jnp.int32)
    return written_rows(asked.tokens, asked.length, asked.prompt_id, said, length, answer_width=1, alone=True)


def claimed(of: Pairs) -> Any:
    """Rows of the scalar twin: both claims as answers to the digits, with the right one preferred."""
    count = len(of.verdict)
    asked = np.concatenate([of.digits, np.full((count, 1), BAR)], 1).repeat(2, 0)
    said = np.stack([of.claims.reshape(-1), np.full(2 * count, EOS)], 1)
    better = np.stack([of.verdict == FIRST, of.verdict == SECOND], 1).reshape(-1)
    return written_rows(
        jnp.asarray(asked, jnp.int32),
        jnp.full(2 * count, asked.shape[1], jnp.int32),
        jnp.arange(2 * count, dtype=jnp.int32) // 2,
        jnp.asarray(said, jnp.int32),
        jnp.full(2 * count, 2, jnp.int32),
        answer_width=1,
        rows_per_group=2,
        alone=True,
        preferred=jnp.asarray(better, jnp.float32),
    )


def verdict_right(tokens: Any, length: Any, answer_tokens: Any) -> Any:
    """1 if the last token before the end of sequence is the right verdict."""
    last = jnp.take_along_axis(tokens, jnp.maximum(length - 2, 0)[:, None], axis=1)[:, 0]
    ended = jnp.take_along_axis(tokens, jnp.maximum(length - 1, 0)[:, None], axis=1)[:, 0] == EOS
    return ((last == answer_tokens[:, -1]) & ended).astype(jnp.float32)


def reason_right(tokens: Any, length: Any, answer_tokens: Any) -> Any:
    """F1 of the written running sums against the right ones, by position."""
    places = DIGITS - 1
    matches = (tokens[:, :places] == answer_tokens[:, :places]).sum(1)
    return 2 * matches / (jnp.clip(length - 2, 0, DIGITS) + places)


def adam(rate: float) -> optax.GradientTransformation:
    """Adam with gradients clipped to norm 1."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def supervised(reason: bool, examples: Pairs, test: Pairs, seed: int, *, goal: float, most: int) -> tuple[Any, int]:
    """(parameters after training on worked examples, number of steps); stops at accuracy `goal` or `most` steps."""
    step = make_train_step(MODEL, adam(2e-3), source=Written(64), losses=[losses.negative_log_likelihood])
    state, measure = step.init(jax.random.key(seed)), judged(test, DIGITS + 1 if reason else 2)
    rng, number = np.random.default_rng(seed), 0
    while number < most and (number % 10 or measure(state.params)["verdict"] < goal):
        state, _ = step(state, written=worked(examples[rng.integers(0, len(examples.verdict), 64)], reason))
        number += 1
    return jax.tree.map(np.asarray, state.params), number


def judged(test: Pairs, width: int) -> Callable[[Any], dict[str, float]]:
    """parameters -> shares of right verdicts and of right running sums, by greedy decoding, on held-out pairs."""
    asked = questions(test)

    @jax.jit
    def shares(params: Any) -> Any:
        rows = generate(
            MODEL, params, asked, jax.random.key(0), 0, samples_per_prompt=1, max_completion_tokens=width,
            eos_ids=(EOS,), pad_id=PAD, temperature=0.0,
        )  # fmt: skip
        facts = rows.tokens, rows.length, rows.answer_tokens
        return verdict_right(*facts).mean(), reason_right(*facts).mean() if width > DIGITS else jnp.nan

    return lambda params: dict(zip(("verdict", "reason"), map(float, shares(params)), strict=True))


def by_reinforcement(params: Any, order: Iterator[Pairs], test: Pairs, *, reason: float | None, steps: int) -> Any:
    """Shares of right verdicts and sums of a generative judge, every 25 steps.

    Args:
      params: initial parameters.
      order: pairs of each step.
      test: held-out pairs.
      reason: weight of the F1 of its sums in the reward; None for a judge without a reason.
      steps: updates, each on `PAIRS` pairs.
    """
    width = 2 if reason is None else DIGITS + 1
    rewards: list[Any] = [Reward(verdict_right, 1.0)]
    rewards += [Reward(reason_right, reason)] if reason else []
    step = make_train_step(
        MODEL,
        adam(5e-4),
        source=Rollout(SAMPLES, width, eos_ids=(EOS,), pad_id=PAD, prompts_per_step=PAIRS),
        rewards=rewards,
        credit=[("advantages", partial(advantages.group_normalized, scale="none"))],
        losses=[losses.policy_gradient],
    )
    state, measure = step.init(jax.random.key(1), params), judged(test, width)
    found = [measure(state.params)]
    for number in range(1, steps + 1):
        state, _ = step(state, questions(next(order), number * PAIRS))
        found += [measure(state.params)] if number % 25 == 0 else []
    return found


def by_pairs(params: Any, order: Iterator[Pairs], test: Pairs, *, steps: int) -> Any:
    """Shares of pairs that a scalar head on the same transformer orders correctly, every 25 steps."""

    def step_of(rate: float, count: int) -> Any:
        head = Network(head=models.HeadConfig(), optimizer=adam(rate))
        resources = Resources(networks={"reward": head})
        source = Written(2 * count, 2, frozenset({"preferred"}))
        return make_train_step(MODEL, optax.sgd(0.0), source=source, losses=[losses.bradley_terry], resources=resources)

    step, asked = step_of(1e-3, PAIRS), step_of(0.0, HELD_OUT)
    state = step.init(jax.random.key(1), params)

    def measure(state: Any) -> dict[str, float]:
        reward = jax.tree.map(np.asarray, state.networks["reward"].params)
        numbers = asked(asked.init(jax.random.key(0), params, {"reward": reward}), written=claimed(test))[1]
        return {"verdict": float(numbers["preferred_share/bradley_terry"])}

    found = [measure(state)]
    for number in range(1, steps + 1):
        state, _ = step(state, written=claimed(next(order)))
        found += [measure(state)] if number % 25 == 0 else []
    return found


def one_seed(seed: int, *, steps: int) -> dict[str, Any]:
    """Curves of the four judges, trained on the same pairs in the same order."""
    rng = np.random.default_rng(seed)
    examples, test = pairs(rng, 512), pairs(np.random.default_rng(10_000 + seed), HELD_OUT)
    order = [pairs(rng, PAIRS) for _ in range(steps)]
    written, warm = supervised(True, examples, test, seed, goal=0.7, most=300)
    alone, _ = supervised(False, examples, test, seed, goal=1.0, most=warm)
    runs = {
        "scalar twin": by_pairs(written, iter(order), test, steps=steps),
        "verdict alone": by_reinforcement(alone, iter(order), test, reason=None, steps=steps),
        "reason, then verdict": by_reinforcement(written, iter(order), test, reason=0.0, steps=steps),
        "reason rewarded too": by_reinforcement(written, iter(order), test, reason=0.5, steps=steps),
    }
    decided = {name: [one["verdict"] for one in run] for name, run in runs.items()}
    summed = {name: [one["reason"] for one in run] for name, run in runs.items() if name.startswith("reason")}
    return {"pairs decided right": decided, "running sums right": summed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2", help="such as 0,1,2")
    parser.add_argument("--steps", type=int, default=200, help="updates of each judge, a multiple of 25")
    parser.add_argument("--output", type=Path, default=OUT)
    asked = parser.parse_args()
    found: dict[str, Any] = {"xlabel": "labelled pairs", "panels": {}}
    found["x"] = [number * 25 * PAIRS for number in range(asked.steps // 25 + 1)]
    for seed in map(int, asked.seeds.split(",")):
        start = time.monotonic()
        for panel, lines in one_seed(seed, steps=asked.steps).items():
            for name, values in lines.items():
                found["panels"].setdefault(panel, {}).setdefault(name, []).append(values)
                print(f"seed {seed}, {panel}, {name}: " + " ".join(f"{v:.3f}" for v in values), file=sys.stderr)
        print(f"seed {seed}: {time.monotonic() - start:.0f} s", file=sys.stderr)
        asked.output.mkdir(parents=True, exist_ok=True)
        (asked.output / "verdicts.json").write_text(json.dumps(found) + "\n")
        drawn(found, asked.output / "verdicts.svg")


if __name__ == "__main__":
    main()
