"""THE table of the files that a run and an evaluation leave behind: what each key of their lines means.

docs/formats.md is made of it, and tests hold that what is written is in it. metrics.jsonl has a table of its own,
`metric_table`.
"""

from __future__ import annotations

from collections.abc import Mapping

COMPLETION = {
    "completion": "text, end of sequence included",
    "correct": "whether the grader takes it",
    "answer": "what it votes for in a majority; null for nothing",
    "tokens": "tokens of it",
    "truncated": "a limit ended it",
    "logprob": "sum of the log-probabilities of its tokens, nats",
    "score": "number of the grader, where it returns one",
    "confidence": "stated confidence, where the grader returns one",
    "rewards": "each reward by its name",
    "reference_logprob": "the same sum under the reference; with `--reference`",
}
FILES: Mapping[str, Mapping[str, str]] = {
    "samples.jsonl": {
        "step": "global step, counted over all stages",
        "prompt": "text of the prompt",
        "completion": "text of the completion",
        "answer": "reference answer",
        "truncated": "a limit ended it",
        "reward": "weighted sum of its rewards",
        "tokens": "`text`, `advantage`, `logprob` and `entropy` of each of its first 1024 tokens",
        "<reward>": "each reward by its name, before its weight; NaN where it does not apply",
    },
    "summary.json": {
        "name": "of the run",
        "before": "the last table, before training: accuracies on the test split, `problems`, `samples_per_problem`",
        "after": "the same after training",
        "seconds": "wall time by part, and `total`",
        "goodput": "share of the seconds of all starts that the result is made of, and what became of the others",
        "early_stopping": "of each stage with `training.stop_when`: what it has read, and whether it ended the stage",
        "peak_memory_bytes": "of the process on the host",
        "completion_tokens_sampled": "tokens that the policy wrote in training",
        "warm_start_steps": "steps of the warm start",
        "steps": "that were asked for (`training.steps`)",
        "skipped_updates": "updates left out, as their gradient was not finite",
        "compilations": "programs that were compiled",
        "compilation_seconds": "how long that took",
        "programs_read": "compiled programs that were read from the cache",
        "config_hash": "of what decides numbers in the config",
        "data": "fingerprint of each split",
        "devices": "names of the devices",
        "versions": "of Python and of packages",
    },
    "problems.jsonl": {
        "item_id": "number of the problem in its data",
        "prompt": "text of the prompt",
        "answer": "reference answer",
        "columns": "values of the columns that `--by` names",
        "episodes": "[value, count] of each metric of its episodes; in conversations",
        "greedy": "the most likely completion",
        "samples": "the sampled completions",
    },
    "a completion of problems.jsonl": COMPLETION,
}
