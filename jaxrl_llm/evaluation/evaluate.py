"""Accuracy of a policy on held-out problems: greedy, pass@k and maj@k, by a grader that reads text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxrl_llm.data import evaluation_batches
from jaxrl_llm.data.encoding import Tokenizer
from jaxrl_llm.evaluation.grading import Grader
from jaxrl_llm.evaluation.pass_at_k import mean_pass_at_k
from jaxrl_llm.evaluation.voting import mean_majority_at_k
from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.rules import RULES, Rules, constrain_rows, decoding, laid_out
from jaxrl_llm.rollout import generate
from jaxrl_llm.rollout.weights import weights_for_decoding


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
) -> Callable[..., dict[str, float]]:
    """Build evaluate(params, items, key) -> metrics; the decoding program is compiled once and reused.

    Each problem is decoded once greedily and `samples_per_problem` times at `temperature`, in one program. The result
    holds `greedy` (accuracy of the greedy completion), `pass@k` (unbiased) and `maj@k` (k > 1) for each k, means over
    problems; and over the sampled completions `completion_tokens`, `truncated_share`; `problems` and
    `samples_per_problem` say what was counted.

    A sample's class in a majority vote is what `grade` says it votes for; right answers are one class.

    With a mesh, completions are spread over its devices, and parameters lie as `rules` says. Over several processes all
    call it, grade all completions, and return the same.

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

    def decode(params: PyTree, prompts, key: Array):
        experience = generate(
            model,
            weights_for_decoding(model, params),
            prompts,
            key,
            0,
            samples_per_prompt=rows,
            max_completion_tokens=max_completion_tokens,
            eos_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
            temperature=temperatures,
            constrain=constrain_rows,
        )
        return experience.tokens, experience.length, experience.truncated

    program = jax.jit(laid_out(decode, mesh, decoding(rules)))

    def evaluate(params: PyTree, items: Sequence[dict[str, Any]], key: Array) -> dict[str, float]:
        greedy, correct, answers, gold, lengths, truncated = [], [], [], [], [], []
        batches = evaluation_batches(
            items,
            tokenizer,
            prompts_per_batch=prompts_per_batch,
            max_prompt_tokens=max_prompt_tokens,
            max_answer_tokens=max_completion_tokens,
            overlong=overlong,
        )
        for batch in batches:
            prompts = hosts.placed_rows(batch.prompts, mesh, rules)
            tokens, length, cut = hosts.host_copy(program(params, prompts, key))
            for index in np.flatnonzero(batch.weight):
                item = batch.items[index]
                own = slice(index * rows, (index + 1) * rows)
                texts = [tokenizer.decode(row[:n].tolist()) for row, n in zip(tokens[own], length[own], strict=True)]
                solved, said = zip(*(grade(item, text) for text in texts), strict=True)
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
        return metrics | {
            "completion_tokens": float(np.mean(lengths)),
            "truncated_share": float(np.mean(truncated)),
            "problems": len(gold),
            "samples_per_problem": samples_per_problem,
        }

    return evaluate
