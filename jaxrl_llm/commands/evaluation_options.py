"""Options of `jaxrl eval`, `compare` and `report`; imported with the command line, so it imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Command = Callable[..., argparse.ArgumentParser]


def add_eval(command: Command) -> None:
    evaluate = command(
        "eval",
        "evaluate_checkpoint:evaluate_checkpoint",
        "What a model's samples say: pass@k, votes, calibration and more.",
    )
    evaluate.add_argument("path", metavar="MODEL", help="a run, a checkpoint, or a Hugging Face model directory")
    what = evaluate.add_argument_group("problems", "default: those of the run")
    what.add_argument("--data", metavar="FILE", help="a JSONL file of problems")
    what.add_argument("--format", help="of its lines: prompt, messages, gsm8k, math, aime, choice or code")
    what.add_argument("--field", action="append", metavar="NAME=FIELD", help="which field holds what: answer=solution")
    what.add_argument("--task", help="a built-in task")
    what.add_argument("--levels", help="comma-separated, of the task")
    what.add_argument("--split", choices=["test", "validation", "train"], help="of the run or the task (default test)")
    what.add_argument("--problems", type=int, help="how many (default: evaluation.problems of the run, or all)")
    what.add_argument("--suite", metavar="YAML", help="several evaluations; options given here hold for all of them")
    how = evaluate.add_argument_group("sampling")
    how.add_argument("--k", help="comma-separated k of pass@k and maj@k (default 1,8)")
    how.add_argument("--samples", type=int, help="sampled completions a problem (default: the largest k)")
    how.add_argument("--temperature", type=float, help="of the samples (default: the run's, or 1)")
    how.add_argument("--seed", type=int, help="of the samples (default 0)")
    how.add_argument("--max-prompt-tokens", type=int, metavar="N", help="longest prompt (default: the run's)")
    how.add_argument(
        "--max-tokens",
        type=int,
        dest="max_completion_tokens",
        metavar="N",
        help="longest completion (default: the run's)",
    )
    how.add_argument("--prompt-format", metavar="TEXT", help="with {body} where the problem goes")
    how.add_argument("--chat", action="store_true", help="of a model directory: through its chat template")
    how.add_argument("--guided-by", metavar="NETWORK", help="a value network of the run: likely tokens by their worth")
    how.add_argument(
        "--strength", type=float, default=3.0, metavar="X", help="of that, nats a unit of value (default 3)"
    )
    how.add_argument("--candidates", type=int, default=20, metavar="N", help="tokens whose worth is asked (default 20)")
    how.add_argument("--batch", type=int, metavar="N", help="completions decoded together; changes no completion")
    judged = evaluate.add_argument_group("judging")
    judged.add_argument("--grader", help="number, text, math, choice, code, or my_module:my_function")
    judged.add_argument(
        "--reward", action="append", default=[], metavar="NAME", help="a further reward of every sample"
    )
    judged.add_argument("--reference", metavar="MODEL", help="KL divergence from this policy, estimated on the samples")
    judged.add_argument("--by", metavar="COLUMNS", help="comma-separated columns to report apart: level,source")
    judged.add_argument(
        "--require", action="append", default=[], metavar="TEST", help="exit with 1 unless it holds: 'pass@1>=0.9'"
    )
    evaluate.add_argument("--all", action="store_true", help="every checkpoint of the run")
    evaluate.add_argument("--out", metavar="DIR", help="one line a problem with all samples; goes on where it stopped")

    compare = command(
        "compare",
        "evaluate_checkpoint:compare_evaluations",
        "Paired differences of two evaluations of the same problems.",
    )
    compare.add_argument("first", metavar="A", help="a directory that eval --out wrote, or RUN/evaluations/before")
    compare.add_argument("second", metavar="B", help="another, of the same problems")
    compare.add_argument("--k", help="comma-separated k of pass@k and maj@k (default 1, 2, 4, ...)")


def add_report(command: Command) -> None:
    report = command("report", "reports:show_report_file", "One HTML file about a run, or several beside each other.")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run directories; those of several seeds are averaged")
    report.add_argument("--out", metavar="FILE", help="default: report.html in the run, or here for several")
    report.add_argument("--figures", metavar="DIR", help="write the charts into files instead (extra plot)")
    report.add_argument("--format", default="svg", choices=["svg", "pdf", "png"], help="of --figures; default: svg")
