"""The command `jaxrl`: its sub-commands and their options, from train and eval to plan and doctor."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from jaxrl_llm import __version__
from jaxrl_llm.commands.config_keys import refuse_unknown_keys
from jaxrl_llm.commands.data_options import add_data
from jaxrl_llm.commands.evaluation_options import add_eval, add_report
from jaxrl_llm.commands.model_options import add_merge, add_model_files, add_pairs
from jaxrl_llm.commands.output import Lasting, interrupts_kept, message_of, unwrapped
from jaxrl_llm.shipped import config_path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status.

    0 done; 1 failed while running; 2 bad input; 75 a temporary failure of the machine, its storage or another process,
    after which the same command may be repeated; 130, 143, 129 ended by Ctrl-C, SIGTERM, SIGHUP; 141 the reader of the
    output closed the pipe.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # Overrides may follow options.
    if rest and (not hasattr(options, "config") or any("=" not in word or word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.config = [*options.config, *rest]
    # orbax and TFDS log internal warnings, and log every exception that they raise with its traceback.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if options.outlives_output:
        sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
    try:
        with interrupts_kept():
            status, why = _status(options)
        _leave_others(status, why)
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = _CLOSED
    finally:
        sys.stdout, sys.stderr = unwrapped(sys.stdout), unwrapped(sys.stderr)
    if status == _CLOSED:  # else the interpreter prints an error when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return status


_CLOSED = 141


def _status(options: argparse.Namespace) -> tuple[int, str | None]:
    """Run a sub-command: (exit status, message of the error); None for no error."""
    try:
        return options.command(options) or 0, None
    except KeyboardInterrupt as error:
        text = str(error) or "interrupted"
        print(f"\n{text}", file=sys.stderr)
        return 130, text
    except BaseException as error:
        if isinstance(error.__context__ if isinstance(error, SystemExit) else error, BrokenPipeError):  # rich exits
            return _CLOSED, "the reader of the output closed the pipe"
        if (ended := _foreseen(error, options)) is not None:
            return ended
        if _others() is None or isinstance(error, SystemExit):
            raise
        traceback.print_exc()  # the interpreter's own exit would wait for the others
        return 1, repr(error)


def _foreseen(error: BaseException, options: argparse.Namespace) -> tuple[int, str | None] | None:
    """Exit status and message for an expected kind of error; None for any other error."""
    if isinstance(error, _raised("run.stages", "Stopped")):
        print(error, file=sys.stderr)
        return (error.status if options.stopped_status is None else options.stopped_status), None  # type: ignore[attr-defined]
    failures = sys.modules.get("jaxrl_llm.run.failures")
    lost = (*_raised("parallel.peers", "ProcessLost"), *_raised("run.failures", "PassingError"))
    if isinstance(error, lost) or (failures is not None and failures.passing(error)):
        from jaxrl_llm.parallel.peers import LOST

        return _failed(error, options, LOST)
    kinds = {"run.nonfinite": "TrainingError", "rewards.host": "RewardError", "endpoints": "EndpointError"}
    kinds |= {"evaluation.grading": "GraderError", "run.failures": "StorageError"}
    failed = tuple(kind for place in kinds.items() for kind in _raised(*place))
    if isinstance(error, failed):
        return _failed(error, options, 1)
    if isinstance(error, (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)):
        return _failed(error, options, 2)
    if isinstance(error, OSError) and failures is not None and (clause := failures.storage_fault(error)):
        named = "the output" if error.filename is None else str(error.filename)
        text = f"{named[:200]}{'...' if len(named) > 200 else ''} cannot be used: {clause} ({error.strerror})"
        return _failed(OSError(text), options, 2 if error.errno == errno.ENAMETOOLONG else 1)
    return None


def _raised(module: str, name: str) -> tuple[type[Exception], ...]:
    """An exception class of a module of the package; empty if the module was not imported and so cannot have raised."""
    found = sys.modules.get(f"jaxrl_llm.{module}")
    return () if found is None else (getattr(found, name),)


def _failed(error: BaseException, options: argparse.Namespace, status: int) -> tuple[int, str]:
    if options.traceback:
        if _others() is None:
            raise error
        traceback.print_exception(error)
    print(f"error: {(text := message_of(error))}", file=sys.stderr)
    return status, text


def _others():
    """The connections to the other processes of a run, or None; does not import jax."""
    hosts = sys.modules.get("jaxrl_llm.parallel.hosts")
    return None if hosts is None else hosts.peers()


def _leave_others(status: int, why: str | None) -> None:
    if (others := _others()) is None:
        return
    if why is None:
        others.leave()
    else:
        from jaxrl_llm.parallel.peers import exit_now

        others.leave(status, why)
        exit_now(status)


# ---- options --------------------------------------------------------------------------------------------------------

Command = Callable[..., argparse.ArgumentParser]
_CONFIG = "a YAML file or the name of a recipe, and overrides"
_EXAMPLES = {
    "init": ("init train.jsonl --model models/Qwen3-0.6B", "init mine.jsonl --out configs/mine.yaml"),
    "train": ("train demo", "train configs/demo.yaml training.steps=50 run_dir=runs/short"),
    "eval": (
        "eval runs/demo --k 1,8,32 --by level",
        "eval runs/demo --data mine.jsonl --grader my_module:grade --out mine",
    ),
    "compare": ("compare evals/before evals/after", "compare runs/demo/evaluations/before runs/demo/evaluations/after"),
    "report": ("report runs/seed0 runs/seed1 --out compared.html", "report runs/demo --figures figures --format pdf"),
    "sample": ("sample runs/demo --prompt 'A:12+34' -n 4", "sample MODEL_DIR --chat --prompts prompts.jsonl --jsonl"),
    "score": ("score runs/demo --file lines.jsonl", "score MODEL_DIR --file lines.jsonl --dtype bfloat16"),
    "import": ("import MODEL_DIR", "import Qwen/Qwen3-0.6B models/qwen3 --dtype bfloat16"),
    "export": ("export runs/demo exported", "export runs/demo/checkpoints/270 exported --dtype bfloat16"),
    "merge": (
        "merge runs/a runs/b --out merged --weights 0.7,0.3",
        "merge runs/dpo --base MODEL_DIR --method task --weights 1.5 --out further",
    ),
    "pairs": ("pairs runs/reward_model --file held_out.jsonl", "pairs runs/rm --file pairs.parquet --by source --drop"),
    "ckpt list": ("ckpt list runs/demo", "ckpt list runs/demo --json"),
    "ckpt verify": ("ckpt verify runs/demo", "ckpt verify runs/demo/checkpoints/270"),
    "ckpt prune": ("ckpt prune runs/demo --keep 2", "ckpt prune runs/demo --keep 1 --keep-every 100"),
    "ckpt convert": ("ckpt convert runs/old runs/new", "ckpt convert runs/demo policy --only policy"),
    "replay": ("replay runs/demo/failed/step_000120.npz", "replay runs/demo/failed/step_000120.npz --json"),
    "tasks": ("tasks", "tasks countdown --level 3 --count 5"),
    "methods": ("methods --needs reference", "methods dapo"),
    "explain": ("explain grpo", "explain configs/demo.yaml rollout.samples_per_prompt=16 --verbose"),
    "plan": (
        "plan configs/plans/qwen3_8b.yaml --topology v5p-256",
        "plan demo --topology cpu:8 --search training.prompts_per_step=64",
    ),
    "data": ("data mine.yaml", "data mine.yaml data.limit=100 --split test --count 5"),
    "doctor": ("doctor", "doctor --json"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxrl", description="Reinforcement fine-tuning of language models in JAX.")
    parser.add_argument("--version", action="version", version=f"jaxrl_llm {__version__}")
    parser.add_argument("--traceback", action="store_true", help="print the Python traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    plain = argparse.RawDescriptionHelpFormatter

    def examples(*names: str) -> str:
        return "\n".join(["examples:", *(f"  jaxrl {line}" for name in names for line in _EXAMPLES[name])])

    def commands_of(name: str, text: str) -> Any:
        shown = examples(*(each for each in _EXAMPLES if each.startswith(f"{name} ")))
        group = commands.add_parser(name, help=text, description=text, epilog=shown, formatter_class=plain)
        return group.add_subparsers(required=True, metavar="COMMAND", help="the action")

    def command(
        name: str, function: str, text: str, *, json_output: bool = True, within: Any = commands, group: str = ""
    ) -> argparse.ArgumentParser:
        epilog = examples(f"{group} {name}".strip())
        sub = within.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=plain)
        sub.set_defaults(command=_imported_late(function), outlives_output=False)
        if json_output:
            sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
            sub.add_argument("--wide", action="store_true", help="print all columns of tables, also on a narrow screen")
        return sub

    for add in (
        add_data,
        _add_train,
        add_eval,
        add_report,
        _add_sample,
        add_model_files,
        add_merge,
        add_pairs,
        _add_lists,
        _add_previews,
    ):
        add(command)
    _add_state(command, commands_of)
    command(
        "doctor",
        "inventory:show_machine",
        "Show devices, versions, memory and cached compiled programs of this machine.",
    )
    return parser


def _imported_late(path: str) -> Callable[[argparse.Namespace], int | None]:
    """`module:function` of commands/, imported at the call: importing jax takes seconds, and `--help` does not need
    it."""
    module, function = path.split(":")

    def call(options: argparse.Namespace) -> int | None:
        given = getattr(options, "config", None) or ()
        words = [word for word in given if "=" not in word]
        # Wrong names are reported before the slow imports.
        if words and not getattr(options, "resume", None):
            config_path(words[0])
        refuse_unknown_keys(word for word in given if "=" in word and not os.path.exists(word))
        return getattr(importlib.import_module(f"jaxrl_llm.commands.{module}"), function)(options)

    return call


def _add_train(command: Command) -> None:
    train = command("train", "start_training:start_training", "Train a policy from a config, or resume a run.")
    train.add_argument("config", nargs="*", metavar="CONFIG [section.key=value ...]", help=_CONFIG)
    train.add_argument("--resume", metavar="RUN", help="directory of the run to resume")
    train.add_argument(
        "--resume-if-started", action="store_true", help="resume run_dir if it was started, else start it"
    )
    train.add_argument(
        "--exact", action="store_true", help="refuse to resume if the newest checkpoint is damaged or missing"
    )
    train.add_argument(
        "--profile",
        metavar="FIRST:LAST",
        help="trace these steps (counted over all stages), and show the time of each phase",
    )
    train.add_argument(
        "--stopped-status",
        type=int,
        metavar="N",
        help="exit status after a stop by a signal (default 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP)",
    )
    train.add_argument(
        "--grace",
        type=float,
        metavar="SECONDS",
        help="end within this time after a signal: a step that takes longer is aborted (default: finish it)",
    )
    train.set_defaults(outlives_output=True)
    several = train.add_argument_group("several processes", "detected automatically on TPU, GKE, Slurm and Open MPI")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    several.add_argument("--processes", type=int, metavar="N", help="number of processes of the run")
    several.add_argument("--process-id", type=int, metavar="I", help="number of this process, from 0")
    several.add_argument(
        "--start-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long to wait for the others (default 600)",
    )


def _add_sample(command: Command) -> None:
    sample = command(
        "sample",
        "sample:sample",
        "Sample completions from a run, a checkpoint or a model directory. Without a prompt option, each line of the "
        "terminal or of standard input is a prompt.",
    )
    sample.add_argument("path", metavar="MODEL", help="a run, a checkpoint, or a Hugging Face model directory")
    sample.add_argument("--prompt", action="append", default=[], help="text of a prompt; may be repeated")
    sample.add_argument(
        "--prompts", metavar="FILE", help="one text per line; or JSONL with prompt, messages (chat) or token_ids"
    )
    sample.add_argument(
        "--token-ids",
        action="append",
        default=[],
        metavar="IDS",
        help="token ids of a prompt, such as '1 2 3'; may be repeated",
    )
    sample.add_argument("-n", "--samples", type=int, default=1, help="completions of each prompt")
    sample.add_argument("--greedy", action="store_true", help="the most likely token at each position")
    sample.add_argument("--temperature", type=float, default=1.0, help="sampling temperature (default 1)")
    sample.add_argument("--top-k", type=int, help="sample from the k most probable tokens only")
    sample.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the most probable tokens whose probabilities sum to this"
    )
    sample.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="sample from tokens with at least this share of the largest probability",
    )
    sample.add_argument("--repetition-penalty", type=float, default=1.0, help="penalty on earlier tokens; 1 is none")
    sample.add_argument("--min-tokens", type=int, default=0, help="shortest completion")
    sample.add_argument("--stop", action="append", default=[], help="text that ends a completion; may be repeated")
    sample.add_argument("--max-tokens", type=int, help="longest completion (default: the run's, or 256)")
    sample.add_argument("--chat", action="store_true", help="apply the chat template of a model directory")
    sample.add_argument("--batch", type=int, default=8, help="prompts sampled together (default 8)")
    sample.add_argument("--jsonl", action="store_true", help="print a line of JSON for each completion, batch by batch")
    sample.add_argument("--seed", type=int, default=0, help="random seed (default 0)")


def _add_state(command: Command, commands_of: Callable) -> None:
    kinds = commands_of("ckpt", "List, verify, prune or convert the checkpoints of a run.")

    def on_path(name: str, function: str, text: str, **defaults: object) -> argparse.ArgumentParser:
        sub = command(name, f"state:{function}", text, within=kinds, group="ckpt")
        sub.add_argument("path", metavar="RUN_OR_CHECKPOINT", help="a run directory, or one of its checkpoints")
        sub.set_defaults(**defaults)
        return sub

    on_path("list", "show_checkpoints", "List the checkpoints of a run.", verify=False)
    on_path("verify", "show_checkpoints", "Read checkpoints and compare them with their digests.", verify=True)
    prune = on_path("prune", "prune_checkpoints", "Delete old checkpoints; the newest good one is always kept.")
    prune.add_argument("--keep", type=int, required=True, metavar="N", help="number of newest checkpoints to keep")
    prune.add_argument("--keep-every", type=int, metavar="STEPS", help="also keep checkpoints at multiples of this")
    convert = on_path(
        "convert", "convert_checkpoint", "Rewrite a checkpoint, with digests if an earlier version had none."
    )
    convert.add_argument("out", metavar="OUT", help="new run directory")
    convert.add_argument("--only", metavar="NETWORK", help="write only the parameters of this network, such as policy")
    replay = command("replay", "state:show_replay", "Show which rows of a failed step produce non-finite numbers.")
    replay.add_argument("file", metavar="FILE", help="RUN/failed/step_N.npz")


def _add_lists(command: Command) -> None:
    tasks = command("tasks", "inventory:show_tasks", "List the built-in tasks, or show examples of one.")
    tasks.add_argument("name", nargs="?", help="show examples of this task")
    tasks.add_argument("--level", type=int, help="level of the examples (default: the lowest)")
    tasks.add_argument("--count", type=int, default=3, help="number of examples")

    methods = command(
        "methods",
        "methods:show_methods",
        "List the shipped recipes of published methods, or show one recipe or function in full.",
    )
    methods.add_argument("name", nargs="?", help="a recipe or a function")
    methods.add_argument(
        "--certainty",
        choices=["verified", "recalled", "reconstructed"],
        help="certainty that the implementation matches the paper",
    )
    methods.add_argument("--stage", metavar="WORD", help="recipes whose stage contains this, such as advantage")
    methods.add_argument("--needs", metavar="WORD", help="recipes that need this, such as reference")
    methods.add_argument("--paper", metavar="WORD", help="recipes whose paper title contains this")
    methods.add_argument("--arxiv", metavar="NUMBER", help="recipes whose arXiv number contains this")
    methods.add_argument("--functions", action="store_true", help="list functions instead of recipes")
    methods.add_argument(
        "--room", choices=["reward", "advantage", "selection", "loss", "schedule"], help="functions of one room"
    )


def _add_previews(command: Command) -> None:
    explain = command(
        "explain", "previews:show_step", "Show the composed step of a config: parts, shapes, sizes, work."
    )
    explain.add_argument("config", nargs="+", metavar="CONFIG [section.key=value ...]", help=_CONFIG)
    explain.add_argument(
        "--verbose", action="store_true", help="also show needs, hyper-parameters, shapes, widths and compiled programs"
    )

    plan = command(
        "plan", "previews:show_plan", "Compute memory and time of a run on a machine that need not be present."
    )
    plan.add_argument("config", nargs="+", metavar="CONFIG [section.key=value ...]", help=_CONFIG)
    plan.add_argument(
        "--topology", required=True, metavar="NAME", help="such as v5e:16x16, v5p-256, 2*v5e:4x4, gpu:8xH100, cpu:8"
    )
    plan.add_argument("--search", action="store_true", help="try mesh layouts, rank them, and plan the best")
    plan.add_argument("--estimate", action="store_true", help="compile nothing: estimate everything from sizes")


if __name__ == "__main__":
    sys.exit(main())
