"""The cost of the likelihood of a reference answer in a step: after the thought, and after each turn.

    python benchmarks/likelihood.py --json likelihood.json

The same step (sampling, one policy-gradient update) runs without a view, with the reference answer scored after each
completion (VeriFree), with it scored after each of eight steps in one pass (IGPO), and with it scored after each of
them in a separate sequence. The forward pass of each case is also timed separately. Repetitions alternate between the
cases. Operations are those of the compiled program, in which a loop counts once; this cancels in differences.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_llm import advantages, losses, rewards
from jaxrl_llm.experience import Prompts
from jaxrl_llm.models import TransformerConfig, transformer
from jaxrl_llm.training import Resources, Rollout, make_train_step
from jaxrl_llm.training.scores import viewed
from jaxrl_llm.training.segments import shapes
from jaxrl_llm.training.step import given_work

WITHOUT, BEHIND, TURNS, APART = "without", "behind the thought", "behind each step", "behind each step, apart"
STEPS = 8


def even_steps(tokens):
    """Eight steps of equal size."""
    width = tokens.shape[1]
    return jnp.broadcast_to(jnp.arange(width) * STEPS // width, tokens.shape).astype(jnp.int32)


def thought_likelihood(answer_logprobs, answer_mask):
    return (answer_logprobs * answer_mask).sum(1)


def last_likelihood(answer_logprobs, answer_mask):
    return (answer_logprobs * answer_mask).sum((1, 2))


def odd_share(tokens):
    return (tokens % 2).astype(jnp.float32).mean(1)


def composed(case: str, options: argparse.Namespace) -> Any:
    """The step of a case."""
    model = transformer(
        TransformerConfig(options.vocabulary, width=options.width, layers=options.layers, heads=8, kv_heads=4)
    )
    if case == APART:
        model = model._replace(cut_cache=None)
    behind = partial(rewards.answer_after_thought, mark_id=3)
    turns = partial(rewards.answer_after_turns, max_turns=STEPS)
    views = {WITHOUT: {}, BEHIND: {"answer": behind}}.get(case, {"answer": turns})
    likelihood = [last_likelihood] if case in (TURNS, APART) else [thought_likelihood]
    return make_train_step(
        model,
        optax.adamw(1e-4),
        source=Rollout(options.samples, options.completion_tokens, eos_ids=(), pad_id=0),
        rewards=[odd_share],
        credit=[
            ("turn", even_steps),
            *([] if case == WITHOUT else [("metric/likelihood", one) for one in likelihood]),
            ("metric/steps", lambda turn: turn.max().astype(jnp.float32)),
            ("advantages", advantages.group_normalized),
        ],
        losses=[losses.policy_gradient],
        resources=Resources(views=views),
    )


def prompts_of(options: argparse.Namespace) -> Prompts:
    rng, count = np.random.default_rng(0), options.prompts
    drawn = lambda width: jnp.asarray(rng.integers(4, options.vocabulary, (count, width)), jnp.int32)  # noqa: E731
    return Prompts(
        tokens=drawn(options.prompt_tokens),
        length=jnp.full(count, options.prompt_tokens, jnp.int32),
        prompt_id=jnp.arange(count, dtype=jnp.int32),
        answer_tokens=drawn(options.answer_tokens),
        answer_length=jnp.full(count, options.answer_tokens, jnp.int32),
    )


def scored_alone(step: Any, rows: Any) -> Any:
    """The forward pass of a case: only `answer_logprobs` is computed."""
    c = step.composition
    return jax.jit(lambda state, rows: viewed(c, state, rows, {"answer_logprobs"}, own_samples=True)["answer_logprobs"])


def operations(step: Any, prompts: Prompts) -> float:
    """Operations of the whole step, which is one program."""
    state = jax.eval_shape(step.init, jax.random.key(0))
    ((program, work),) = shapes(step.segments, state, given_work(prompts, None))
    return jax.jit(program.run).lower(state, work).cost_analysis()["flops"]


def main(given: list[str] | None = None) -> list[dict[str, Any]]:
    """Print the table, and return its rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, size in (
        ("vocabulary", 8000),
        ("width", 128),
        ("layers", 4),
        ("prompts", 4),
        ("samples", 8),
        ("prompt-tokens", 32),
        ("completion-tokens", 96),
        ("answer-tokens", 8),
        ("repetitions", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(given)
    prompts, cases = prompts_of(options), (WITHOUT, BEHIND, TURNS, APART)
    steps = {case: composed(case, options) for case in cases}
    states = {case: step.init(jax.random.key(0)) for case, step in steps.items()}
    seconds: dict[str, list[float]] = {case: [] for case in (*cases, *(f"{case} alone" for case in cases[1:]))}
    alone: dict[str, Any] = {}
    work = {case: operations(step, prompts) for case, step in steps.items()}
    for repetition in range(options.repetitions + 1):
        for case in cases if repetition % 2 else cases[::-1]:
            began = time.perf_counter()
            states[case], _, rows = jax.block_until_ready(steps[case].run(states[case], prompts))
            if repetition:
                seconds[case].append(time.perf_counter() - began)
            if case == WITHOUT:
                continue
            bare = rows.replace(fields={"turn": rows["turn"]})
            made = alone.setdefault(case, scored_alone(steps[case], bare))
            if not repetition:
                lowered = made.lower(states[case], bare)
                work[f"{case} alone"] = lowered.cost_analysis()["flops"]
                jax.block_until_ready(made(states[case], bare))
                continue
            began = time.perf_counter()
            jax.block_until_ready(made(states[case], bare))
            seconds[f"{case} alone"].append(time.perf_counter() - began)
    table = []
    print("| step | seconds | adds s | own forward pass s | adds operations | of its own forward pass |")
    print("|---|---|---|---|---|---|")
    for case in cases:
        row: dict[str, Any] = {"case": case, "seconds": statistics.median(seconds[case])}
        told = ["", "", "", ""]
        if case != WITHOUT:
            row["adds"] = statistics.median(a - b for a, b in zip(seconds[case], seconds[WITHOUT], strict=True))
            row["alone"] = statistics.median(seconds[f"{case} alone"])
            row["operations"] = work[case] - work[WITHOUT]
            row["operations_alone"] = work[f"{case} alone"]
            share = row["operations"] / row["operations_alone"]
            told = [f"{row['adds']:.3f}", f"{row['alone']:.3f}", f"{row['operations'] / 1e9:.2f} G", f"{share:.2f}x"]
        table.append(row)
        print(f"| {case} | {row['seconds']:.3f} | {' | '.join(told)} |")
    if options.json:
        options.json.write_text(json.dumps(table, indent=2) + "\n")
    return table


if __name__ == "__main__":
    main()
