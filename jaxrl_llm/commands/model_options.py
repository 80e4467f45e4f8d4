"""Options of the commands that read and write models; separate from their functions, which import jax."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_model_files(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Options of `jaxrl score`, `jaxrl import` and `jaxrl export`."""
    score = command(
        "score",
        "model_files:show_score",
        "Print log-probabilities of given texts or token ids as JSON.",
        json_output=False,
    )
    score.add_argument("path", metavar="MODEL", help="a run, a checkpoint, or a Hugging Face model directory")
    score.add_argument(
        "--file", required=True, metavar="JSONL", help="lines with prompt and completion, text, or tokens"
    )
    score.add_argument(
        "--chat",
        action="store_true",
        help="apply the chat template of a model directory to prompts (a run applies its own format and template)",
    )
    score.add_argument("--temperature", type=float, default=1.0, help="temperature of the softmax (default 1)")
    score.add_argument("--batch", type=int, default=8, help="sequences scored together")
    score.add_argument(
        "--top", type=int, metavar="K", help="print the K most likely tokens at each position, as source.distributions"
    )
    score.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="dtype for a model directory (default: as stored)"
    )

    imported = command(
        "import", "model_files:show_import", "Check a Hugging Face model directory, and write it in orbax's layout."
    )
    imported.add_argument("path", metavar="DIR", help="a directory, or owner/name of a Hugging Face repository")
    imported.add_argument("out", nargs="?", metavar="OUT", help="new directory for model.path, with fast restores")
    imported.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="dtype of the parameters (default: as stored)"
    )
    imported.add_argument("--strict", action="store_true", help="refuse weights that are NaN or infinite")

    export = command(
        "export", "model_files:show_export", "Write a run's policy as a directory that transformers loads."
    )
    export.add_argument("path", metavar="RUN_OR_CHECKPOINT", help="a run directory, or one of its checkpoints")
    export.add_argument("out", metavar="DIR", help="new directory")
    export.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="dtype of the stored tensors (default: the run's)"
    )
    export.add_argument(
        "--network",
        metavar="NAME",
        help="export this reward model instead of the policy, for ...ForSequenceClassification",
    )
    export.add_argument("--adapters", action="store_true", help="export only the adapters of section lora, for PEFT")


def add_merge(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Options of `jaxrl merge`."""
    merge = command(
        "merge", "merge_models:show_merge", "Merge models of one architecture into a directory that transformers loads."
    )
    merge.add_argument("models", nargs="+", metavar="MODEL", help="runs, checkpoints or Hugging Face model directories")
    merge.add_argument("--out", required=True, metavar="DIR", help="new directory")
    merge.add_argument(
        "--method",
        choices=["average", "slerp", "task", "ties", "dare", "select"],
        default="average",
        help="average; slerp (spherical interpolation of two); or a method on changes from --base: task (scaled and "
        "added; above 1 extrapolates), ties (drops changes of minority sign), dare (drops at random, rescales), select "
        "(keeps the largest changes of one model)",
    )
    merge.add_argument(
        "--weights",
        metavar="W,W",
        help="one per model (default equal, or 1); slerp: t; ties and select: scale of the merged change",
    )
    merge.add_argument("--base", metavar="MODEL", help="the model that the others were fine-tuned from")
    merge.add_argument(
        "--share", type=float, help="share of a tensor's changes: kept by ties and select (0.2), dropped by dare (0.9)"
    )
    merge.add_argument("--seed", type=int, default=0, help="random seed of dare (default 0)")


def add_pairs(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Options of `jaxrl pairs`."""
    pairs = command(
        "pairs",
        "scored_pairs:show_pairs",
        "Evaluate a run's reward model on pairs: accuracy and calibration, by source.",
    )
    pairs.add_argument("path", metavar="RUN_OR_CHECKPOINT", help="a run directory, or one of its checkpoints")
    pairs.add_argument(
        "--file", required=True, metavar="PAIRS", help="file of pairs with prompt, chosen and rejected; any format"
    )
    pairs.add_argument("--network", default="reward", help="network of the run (default reward)")
    pairs.add_argument("--by", metavar="COLUMN", help="column of the file: one row of the table for each of its values")
    pairs.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=COLUMN",
        help="name of a column in the file; may be repeated",
    )
    pairs.add_argument("--drop", action="store_true", help="leave out ties and equal sides instead of refusing them")
    pairs.add_argument("--batch", type=int, default=16, help="sequences scored together")
    pairs.add_argument(
        "--reference",
        metavar="OUT",
        help="write the pairs with the log-probabilities of the policy, so that training on them needs no reference",
    )
    cleaned = pairs.add_argument_group("wrong labels")
    cleaned.add_argument("--cleaned", metavar="FILE", help="write the pairs with corrected labels and margins")
    cleaned.add_argument(
        "--others", nargs="+", default=[], metavar="RUN", help="other runs whose scores are averaged in"
    )
    cleaned.add_argument("--flip", type=float, default=0.1, help="largest share of pairs to flip (default 0.1)")
    cleaned.add_argument(
        "--smooth", type=float, default=0.3, help="share of pairs that are flipped or smoothed (default 0.3)"
    )
