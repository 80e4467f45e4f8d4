"""The table of the files of runs and evaluations, with the meaning of each key.

docs/formats.md is generated from it, and tests check that it is complete. For metrics.jsonl see `metric_table`.
"""

from __future__ import annotations

from collections.abc import Mapping

COMPLETION = {
    "completion": "text, without end of sequence",
    "correct": "whether the grader accepts it",
    "answer": "its vote in a majority; null for none",
    "tokens": "tokens of it",
    "truncated": "a limit ended it",
    "logprob": "sum of the log-probabilities of its tokens, nats",
    "score": "score of the grader, if it returns one",
    "confidence": "stated confidence, if the grader returns one",
    "rewards": "each reward by its name",
    "reference_logprob": "the same sum under the reference; with `--reference`",
}
# What a page says of a file before its keys.
NOTES: Mapping[str, str] = {
    "samples.jsonl": "Empty if no stage samples, or if `reporting.samples_every_steps` is 0.",
}
FILES: Mapping[str, Mapping[str, str]] = {
    "samples.jsonl": {
        "step": "global step, counted over all stages",
        "prompt": "text of the prompt",
        "completion": "text of the completion",
        "answer": "reference answer",
        "truncated": "a limit ended it",
        "reward": "weighted sum of its rewards",
        "correct": "whether the first reward is at least 1; in conversations, the verdict of the environment",
        "rewards": "each reward by its name, before its weight; NaN where it does not apply",
        "tokens": "`text`, `advantage`, `logprob` and `entropy` of each of its first 1024 tokens",
    },
    "summary.json": {
        "name": "of the run",
        "before": "the last table, before training: accuracies on the test split, `problems`, `samples_per_problem`",
        "after": "the same after training",
        "seconds": "wall time by part, and `total`",
        "goodput": "useful share of the seconds of all starts, and the other seconds by cause",
        "early_stopping": "of each stage with `training.stop_when`: its values, and whether it ended the stage",
        "peak_memory_bytes": "of the process on the host",
        "completion_tokens_sampled": "tokens sampled in training",
        "warm_start_steps": "steps of the warm start",
        "steps": "configured steps (`training.steps`)",
        "skipped_updates": "updates skipped because of a non-finite gradient",
        "failures": "of each function of text with `value_on_failure`: the rows for which it failed, over all steps",
        "compilations": "programs that were compiled",
        "compilation_seconds": "how long that took",
        "programs_read": "compiled programs that were read from the cache",
        "config_hash": "hash of the config keys that decide numbers",
        "data": "fingerprint of each split",
        "devices": "names of the devices",
        "versions": "of Python and of packages",
    },
    "problems.jsonl": {
        "item_id": "index of the problem in its data",
        "prompt": "text of the prompt",
        "answer": "reference answer",
        "columns": "values of the columns of `--by` when it was written",
        "episodes": "[value, count] of each metric of its episodes; in conversations",
        "greedy": "the most likely completion",
        "samples": "the sampled completions",
    },
    "a completion of problems.jsonl": COMPLETION,
}
