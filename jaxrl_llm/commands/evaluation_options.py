"""Options of `jaxrl eval`, `compare` and `report`; imported with the command line, so it imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Command = Callable[..., argparse.ArgumentParser]


def add_eval(command: Command) -> None:
    evaluate = command(
        "eval",
        "evaluate_checkpoint:evaluate_checkpoint",
        "Evaluate a model: pass@k, votes, calibration and more.",
    )
    evaluate.add_argument("path", metavar="MODEL", help="a run, a checkpoint, or a Hugging Face model directory")
    what = evaluate.add_argument_group("problems", "default: the run's")
    what.add_argument("--data", metavar="FILE", help="problems: JSONL, CSV, Parquet, a directory, tfds: or hf:")
    what.add_argument("--format", help="format of its lines: prompt, messages, gsm8k, math, aime, choice or code")
    what.add_argument(
        "--field", action="append", metavar="NAME=FIELD", help="name of a field in the file: answer=solution"
    )
    what.add_argument("--task", help="a built-in task")
    what.add_argument("--levels", help="comma-separated levels of the task")
    what.add_argument(
        "--split", choices=["test", "validation", "train"], help="split of the run or the task (default test)"
    )
    what.add_argument(
        "--problems", type=int, help="number of problems (default: evaluation.problems of the run, or all)"
    )
    what.add_argument("--suite", metavar="YAML", help="several evaluations; options given here apply to all of them")
    how = evaluate.add_argument_group("sampling")
    how.add_argument("--k", help="comma-separated k of pass@k and maj@k (default 1,8)")
    how.add_argument("--samples", type=int, help="sampled completions per problem (default: the largest k)")
    how.add_argument("--temperature", type=float, help="sampling temperature (default: the run's, or 1)")
    how.add_argument("--seed", type=int, help="random seed (default 0)")
    how.add_argument("--max-prompt-tokens", type=int, metavar="N", help="longest prompt (default: the run's)")
    how.add_argument(
        "--max-tokens",
        type=int,
        dest="max_completion_tokens",
        metavar="N",
        help="longest completion (default: the run's)",
    )
    how.add_argument("--prompt-format", metavar="TEXT", help="prompt with {body} in place of the problem")
    how.add_argument("--chat", action="store_true", help="apply the chat template of a model directory")
    how.add_argument("--guided-by", metavar="NETWORK", help="decode with the help of this value network of the run")
    how.add_argument(
        "--strength",
        type=float,
        default=3.0,
        metavar="X",
        help="strength of the guidance, nats per unit of value (default 3)",
    )
    how.add_argument(
        "--candidates",
        type=int,
        default=20,
        metavar="N",
        help="number of most likely tokens whose values are computed (default 20)",
    )
    how.add_argument(
        "--batch", type=int, metavar="N", help="completions decoded together; does not change the completions"
    )
    judged = evaluate.add_argument_group("judging")
    judged.add_argument("--grader", help="number, text, math, choice, code, or my_module:my_function")
    judged.add_argument(
        "--reward", action="append", default=[], metavar="NAME", help="another reward to compute for every sample"
    )
    judged.add_argument("--reference", metavar="MODEL", help="KL divergence from this policy, estimated on the samples")
    judged.add_argument("--by", metavar="COLUMNS", help="comma-separated columns to report separately: level,source")
    judged.add_argument(
        "--require",
        action="append",
        default=[],
        metavar="TEST",
        help="exit with status 1 unless this holds: 'pass@1>=0.9'",
    )
    evaluate.add_argument("--all", action="store_true", help="evaluate every checkpoint of the run")
    evaluate.add_argument(
        "--out",
        metavar="DIR",
        help="write one line per problem with all samples; an interrupted evaluation is continued",
    )
    _add_compare(command)


def _add_compare(command: Command) -> None:
    compare = command(
        "compare",
        "evaluate_checkpoint:compare_evaluations",
        "Compare two evaluations of the same problems by paired differences.",
    )
    compare.add_argument("first", metavar="A", help="a directory that eval --out wrote, or RUN/evaluations/before")
    compare.add_argument("second", metavar="B", help="another, of the same problems")
    compare.add_argument("--k", help="comma-separated k of pass@k and maj@k (default 1, 2, 4, ...)")


def add_report(command: Command) -> None:
    report = command("report", "reports:show_report_file", "Write an HTML report of one or several runs.")
    report.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directories; runs that differ only in the seed are averaged"
    )
    report.add_argument(
        "--out",
        metavar="FILE",
        help="default: report.html in the run directory, or in the current directory for several runs",
    )
    report.add_argument("--figures", metavar="DIR", help="write the charts as files instead (extra plot)")
    report.add_argument(
        "--format", default="svg", choices=["svg", "pdf", "png"], help="format of --figures (default svg)"
    )
