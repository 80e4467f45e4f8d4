"""Options of the commands that read and write models; apart from their functions, which import jax."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_model_files(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Options of `jaxrl score`, `jaxrl import` and `jaxrl export`."""
    score = command(
        "score", "model_files:show_score", "Log-probabilities of given texts or token ids, as JSON.", json_output=False
    )
    score.add_argument("path", metavar="MODEL", help="a run, a checkpoint, or a Hugging Face model directory")
    score.add_argument(
        "--file", required=True, metavar="JSONL", help="lines with prompt and completion, text, or tokens"
    )
    score.add_argument("--temperature", type=float, default=1.0, help="of the softmax (default 1)")
    score.add_argument("--batch", type=int, default=8, help="sequences scored together")
    score.add_argument("--dtype", choices=["float32", "bfloat16"], help="of a model directory (default: as stored)")

    imported = command(
        "import", "model_files:show_import", "Check a Hugging Face model directory, and write it in orbax's layout."
    )
    imported.add_argument("path", metavar="DIR", help="a directory, or owner/name of a repository")
    imported.add_argument(
        "out", nargs="?", metavar="OUT", help="new directory that model.path takes, for fast restores"
    )
    imported.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the parameters (default: as stored)")
    imported.add_argument("--strict", action="store_true", help="refuse weights that are NaN or infinite")

    export = command(
        "export", "model_files:show_export", "Write a run's policy as a directory that transformers loads."
    )
    export.add_argument("path", metavar="RUN_OR_CHECKPOINT", help="a run directory, or one of its checkpoints")
    export.add_argument("out", metavar="DIR", help="new directory")
    export.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the stored tensors (default: the run's)")
    export.add_argument(
        "--network", metavar="NAME", help="in the place of the policy a reward model, for ...ForSequenceClassification"
    )
    export.add_argument("--adapters", action="store_true", help="the adapters of section lora alone, for PEFT")


def add_merge(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Options of `jaxrl merge`."""
    merge = command(
        "merge", "merge_models:show_merge", "One model out of several of one architecture, for transformers to load."
    )
    merge.add_argument("models", nargs="+", metavar="MODEL", help="runs, checkpoints or Hugging Face model directories")
    merge.add_argument("--out", required=True, metavar="DIR", help="new directory")
    merge.add_argument(
        "--method",
        choices=["average", "slerp", "task", "ties", "dare"],
        default="average",
        help="average; slerp (an arc between two); or changes from --base: task (scaled and added; above 1 "
        "extrapolates), ties (without those that contradict), dare (a random part of them, made larger)",
    )
    merge.add_argument(
        "--weights", metavar="W,W", help="one a model (default equal, or 1); of slerp t, of ties the scale of the sum"
    )
    merge.add_argument("--base", metavar="MODEL", help="what the models were fine-tuned from")
    merge.add_argument("--share", type=float, help="of a tensor's changes: kept by ties (0.2), dropped by dare (0.9)")
    merge.add_argument("--seed", type=int, default=0, help="of what dare drops (default 0)")


def add_pairs(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Options of `jaxrl pairs`."""
    pairs = command(
        "pairs", "scored_pairs:show_pairs", "How a run's reward model orders pairs: accuracy, calibration, by source."
    )
    pairs.add_argument("path", metavar="RUN_OR_CHECKPOINT", help="a run directory, or one of its checkpoints")
    pairs.add_argument("--file", required=True, metavar="PAIRS", help="of prompt, chosen and rejected; any format")
    pairs.add_argument("--network", default="reward", help="which one of the run (default reward)")
    pairs.add_argument("--by", metavar="COLUMN", help="of the file: a row of the table for each of its values")
    pairs.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=COLUMN",
        help="what the file calls a name; may be repeated",
    )
    pairs.add_argument("--drop", action="store_true", help="leave out ties and equal sides, which are errors else")
    pairs.add_argument("--batch", type=int, default=16, help="sequences scored together")
    cleaned = pairs.add_argument_group("wrong labels")
    cleaned.add_argument("--cleaned", metavar="FILE", help="write the pairs, turned, smoothed and with margins")
    cleaned.add_argument("--others", nargs="+", default=[], metavar="RUN", help="further runs whose scores count")
    cleaned.add_argument("--flip", type=float, default=0.1, help="largest share that is turned (default 0.1)")
    cleaned.add_argument("--smooth", type=float, default=0.3, help="share up to which pairs are smoothed (default 0.3)")
