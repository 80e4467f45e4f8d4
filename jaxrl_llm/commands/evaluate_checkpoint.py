"""`jaxrl eval`: a run or a checkpoint on problems of its own task."""

from __future__ import annotations

import argparse
import json

import jax
from rich.console import Console
from rich.table import Table

from jaxrl_llm.commands.arguments import require_positive
from jaxrl_llm.compilation_cache import enable_compilation_cache
from jaxrl_llm.evaluation import COUNTED, make_evaluate
from jaxrl_llm.run.batches import grader
from jaxrl_llm.run.problems import data_sets
from jaxrl_llm.run.restored import restored_run
from jaxrl_llm.run.setup import opened_parts
from jaxrl_llm.run.stages import spread


def evaluate_checkpoint(options: argparse.Namespace) -> None:
    """Evaluate and print the metrics."""
    try:
        ks = sorted({int(k) for k in options.k.split(",")})
    except ValueError:
        raise ValueError(f"--k is {options.k!r}; give whole numbers separated by commas, for example 1,8,32") from None
    require_positive(options, "samples", "problems")
    enable_compilation_cache()
    samples = options.samples or max(ks)
    built, policy = restored_run(options.path)
    config = built.config
    data = data_sets(config, [options.split])[options.split]
    problems = options.problems or min(config.evaluation.problems, len(data))
    if problems > len(data):
        raise ValueError(f"--problems is {problems}, but the {options.split} split has {len(data)} problems")
    with opened_parts(built) as ready:
        evaluate = make_evaluate(
            ready.model,
            grader(ready, data),
            ready.tokenizer,
            samples_per_problem=samples,
            k=ks,
            max_prompt_tokens=config.rollout.max_prompt_tokens,
            max_completion_tokens=config.rollout.max_completion_tokens,
            sequences_per_batch=config.evaluation.sequences_per_batch,
            temperature=config.evaluation.temperature if options.temperature is None else options.temperature,
            overlong=config.data.overlong_prompts,
            environment=ready.environment,
            call=ready.call,
            mesh=ready.step.composition.resources.placement.mesh,
            rules=ready.step.composition.resources.placement.rules,
        )
        chosen = [data[i] for i in spread(len(data), problems)]
        metrics = evaluate(policy.params, chosen, jax.random.key(options.seed))
    result = {"checkpoint": str(policy.source), "split": options.split} | metrics
    if options.json:
        print(json.dumps(result, indent=2))
        return
    table = Table(title=f"{config.name}: {options.split} split, {policy.source}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        share = name == "truncated_share" or not (name in COUNTED or name.endswith("_per_episode"))
        table.add_row(name, f"{value:.1%}" if share else f"{value:g}")
    Console().print(table)
