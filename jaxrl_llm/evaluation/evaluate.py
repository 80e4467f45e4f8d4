"""Accuracy of a policy on held-out problems: greedy, pass@k and maj@k, by a grader that reads text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxrl_llm.data import evaluation_batches
from jaxrl_llm.data.buckets import buckets
from jaxrl_llm.data.encoding import Tokenizer
from jaxrl_llm.evaluation.grading import Grader
from jaxrl_llm.evaluation.pass_at_k import mean_pass_at_k
from jaxrl_llm.evaluation.voting import mean_majority_at_k
from jaxrl_llm.experience import Experience, Prompts
from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.rules import RULES, Rules, constrain_rows, decoding, laid_out
from jaxrl_llm.rollout import (
    Environment,
    HostEnvironment,
    generate,
    generate_turns,
    host_generate_turns,
    host_turns,
    opened,
)
from jaxrl_llm.rollout.decoding_weights import weights_for_decoding
from jaxrl_llm.rollout.host_calls import Caller
from jaxrl_llm.rollout.turns import metrics_of

# Metrics of an evaluation that are no accuracies and no means over episodes.
COUNTED = frozenset({"completion_tokens", "truncated_share", "problems", "samples_per_problem"})


def make_evaluate(
    model: Model,
    grade: Grader,
    tokenizer: Tokenizer,
    *,
    samples_per_problem: int,
    k: Sequence[int],
    max_prompt_tokens: int,
    max_completion_tokens: int,
    sequences_per_batch: int = 1152,
    temperature: float = 1.0,
    overlong: Literal["error", "drop"] = "error",
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules = RULES,
    environment: Environment | HostEnvironment | None = None,
    call: Caller | None = None,
) -> Callable[..., dict[str, float]]:
    """Build evaluate(params, items, key) -> metrics; a decoding program for each width of `buckets` that is needed.

    Each problem is decoded once greedily and `samples_per_problem` times at `temperature`, in one program. The result
    holds `greedy` (accuracy of the greedy completion), `pass@k` (unbiased) and `maj@k` (k > 1) for each k, means over
    problems; and over the sampled completions `completion_tokens`, `truncated_share`; `problems` and
    `samples_per_problem` say what was counted.

    A sample's class in a majority vote is what `grade` says it votes for; right answers are one class.

    With a mesh, completions are spread over its devices, and parameters lie as `rules` says. Over several processes all
    call it, grade all completions, and return the same.

    Where an environment answers, a completion is a whole conversation; the environment says whether it was solved, and
    the means of its metrics over the sampled ones are reported too, with `turns_per_episode` and how episodes stopped.
    `call` is that of an environment in Python (`opened`); without it one is opened for each evaluation.

    A prompt that is too long is an error, or is left out of the count where `overlong` is "drop".

    Raises:
      ValueError: when a k exceeds the number of samples.
    """
    if max(k) > samples_per_problem or min(k) < 1:
        raise ValueError(
            f"k is {list(k)}, but there are {samples_per_problem} samples a problem; k must not exceed them"
        )
    rows = 1 + samples_per_problem
    prompts_per_batch = max(1, sequences_per_batch // rows)
    temperatures = jnp.asarray([0.0] + [temperature] * samples_per_problem)

    sizes: dict[str, Any] = {
        "samples_per_prompt": rows,
        "max_completion_tokens": max_completion_tokens,
        "eos_ids": tokenizer.eos_ids,
        "pad_id": tokenizer.pad_id,
        "temperature": temperatures,
    }

    @jax.jit
    def facts(experience: Experience, counted: Array):
        """What is counted: tokens, their number, whether they were cut, whether solved, sums and counts of metrics."""
        metrics = metrics_of(experience, jnp.repeat(counted, rows) * (jnp.arange(counted.shape[0] * rows) % rows > 0))
        ours = experience.tokens, experience.length, experience.truncated
        return *ours, experience.get("solved"), metrics

    if isinstance(environment, HostEnvironment):
        turns = host_turns(model, environment, encode=tokenizer.encode, decode=tokenizer.decode, **sizes)

        def decode(params: PyTree, batch: Any, key: Array, call: Any):  # `evaluate` opens the environment
            asked = (turns, params, batch.prompts, batch.items, key, 0, call)
            return facts(host_generate_turns(*asked, present=np.asarray(batch.weight) > 0), batch.weight)
    else:

        def sampled(params: PyTree, prompts: Prompts, counted: Array, key: Array):
            given = (model, weights_for_decoding(model, params), prompts, key, 0)
            if environment is not None:
                return facts(generate_turns(*given, environment, **sizes, constrain=constrain_rows), counted)
            return facts(generate(*given, **sizes, constrain=constrain_rows), counted)

        program = jax.jit(laid_out(sampled, mesh, decoding(rules)))

        def decode(params: PyTree, batch: Any, key: Array, call: Caller | None):
            return program(params, batch.prompts, batch.weight, key)

    def evaluate(params: PyTree, items: Sequence[dict[str, Any]], key: Array) -> dict[str, float]:
        with ExitStack() as stack:
            ready = call
            if isinstance(environment, HostEnvironment) and ready is None:
                ready = stack.enter_context(opened(environment))
            return measured(params, items, key, ready)

    def measured(params: PyTree, items: Sequence[dict[str, Any]], key: Array, call: Caller | None) -> dict[str, float]:
        greedy, correct, answers, gold, lengths, truncated = [], [], [], [], [], []
        sums: dict[str, np.ndarray] = {}
        batches = evaluation_batches(
            items,
            tokenizer,
            prompts_per_batch=prompts_per_batch,
            max_prompt_tokens=max_prompt_tokens,
            max_answer_tokens=max_completion_tokens,
            overlong=overlong,
            widths=buckets(max_prompt_tokens),
        )
        for batch in batches:
            batch = batch._replace(prompts=hosts.placed_rows(batch.prompts, mesh, rules))
            tokens, length, cut, solved_rows, pairs = hosts.host_copy(decode(params, batch, key, call))
            for name, pair in pairs.items():
                sums[name] = sums.get(name, np.zeros(2)) + np.asarray(pair)
            for index in np.flatnonzero(batch.weight):
                item = batch.items[index]
                own = slice(index * rows, (index + 1) * rows)
                texts = [tokenizer.decode(row[:n].tolist()) for row, n in zip(tokens[own], length[own], strict=True)]
                solved, said = zip(*(grade(item, text) for text in texts), strict=True)
                if solved_rows is not None:
                    solved, said = solved_rows[own] > 0, _votes(item["answer"], solved_rows[own], said)
                greedy.append(solved[0])
                correct.append(sum(solved[1:]))
                answers.append(said[1:])
                gold.append(item["answer"])
                lengths.extend(length[own][1:])
                truncated.extend(cut[own][1:])
        metrics = {"greedy": float(np.mean(greedy))}
        for each in k:
            metrics[f"pass@{each}"] = mean_pass_at_k(np.asarray(correct), samples_per_problem, each)
        for each in k:
            if each > 1:
                metrics[f"maj@{each}"] = mean_majority_at_k(answers, gold, each)
        metrics |= {name: float(total / max(count, 1.0)) for name, (total, count) in sums.items()}
        return metrics | {
            "completion_tokens": float(np.mean(lengths)),
            "truncated_share": float(np.mean(truncated)),
            "problems": len(gold),
            "samples_per_problem": samples_per_problem,
        }

    return evaluate


def _votes(gold: str, solved: np.ndarray, said: Sequence[str | None]) -> list[str | None]:
    """Answers that conversations vote for, where the environment is the judge of which are right."""
    return [gold if right else None if vote == gold else vote for right, vote in zip(solved > 0, said, strict=True)]
