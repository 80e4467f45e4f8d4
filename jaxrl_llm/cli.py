"""The command `jaxrl`: train, eval, sample, score, import, export, tasks, methods, explain, plan, doctor."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status.

    0 done, or stopped by a signal; 1 failed on the way; 2 bad input; 75 another process of the run was lost.
    """
    options = _parser().parse_args(arguments)
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax and TFDS report their inner affairs as warnings
    status, why = _status(options)
    _leave_others(status, why)
    return status


def _status(options: argparse.Namespace) -> tuple[int, str | None]:
    """How a sub-command ends: its exit status, and what went wrong; None for nothing."""
    from jaxrl_llm.parallel.peers import LOST, ProcessLost
    from jaxrl_llm.rewards import RewardError
    from jaxrl_llm.rollout.engine_http import EngineError
    from jaxrl_llm.run.stages import Stopped, TrainingError

    try:
        return options.command(options) or 0, None
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return options.stopped_status, None
    except ProcessLost as error:
        return _failed(error, options, LOST)
    except (TrainingError, RewardError, EngineError) as error:
        return _failed(error, options, 1)
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        return _failed(error, options, 2)
    except BaseException as error:
        if _others() is None or isinstance(error, SystemExit):
            raise
        traceback.print_exc()  # the interpreter's own exit would wait for the others
        return 1, repr(error)


def _failed(error: Exception, options: argparse.Namespace, status: int) -> tuple[int, str]:
    if options.traceback:
        if _others() is None:
            raise error
        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr)
    return status, str(error)


def _others():
    """The connections to the other processes of a run, if it has others; without importing jax for it."""
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxrl", description="Reinforcement fine-tuning of language models in JAX.")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable, text: str, *, json_output: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        if json_output:
            sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
        return sub

    train = command("train", _train, "Train a policy from a config, or go on with a run.")
    train.add_argument("config", nargs="*", metavar="CONFIG [section.key=value ...]", help="a YAML file and overrides")
    train.add_argument("--resume", metavar="RUN", help="directory of a run to go on with")
    train.add_argument(
        "--resume-if-started", action="store_true", help="go on with run_dir if it was started, else start it"
    )
    train.add_argument(
        "--stopped-status", type=int, default=0, metavar="N", help="exit status after a stop by a signal (default 0)"
    )
    several = train.add_argument_group("several processes", "TPU, GKE, Slurm and Open MPI say all of this themselves")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    several.add_argument("--processes", type=int, metavar="N", help="how many processes the run has")
    several.add_argument("--process-id", type=int, metavar="I", help="number of this one, from 0")
    several.add_argument(
        "--start-timeout", type=float, default=600.0, metavar="SECONDS", help="wait for the others (default 600)"
    )

    evaluate = command("eval", _eval, "Greedy accuracy, pass@k and maj@k of a run or a checkpoint.")
    evaluate.add_argument("path", metavar="RUN_OR_CHECKPOINT")
    evaluate.add_argument("--k", default="1,8", help="comma-separated k of pass@k and maj@k (default 1,8)")
    evaluate.add_argument("--samples", type=int, help="sampled completions a problem (default: the largest k)")
    evaluate.add_argument("--problems", type=int, help="problems (default: evaluation.problems of the run)")
    evaluate.add_argument("--split", default="test", choices=["test", "validation", "train"])
    evaluate.add_argument("--temperature", type=float, help="of the samples (default: the run's)")
    evaluate.add_argument("--seed", type=int, default=0)

    sample = command(
        "sample",
        _sample,
        "Completions from a run, a checkpoint or a model directory. Without a prompt, lines of the terminal (or of "
        "standard input) are prompts.",
    )
    sample.add_argument("path", metavar="MODEL", help="a run, a checkpoint, or a Hugging Face model directory")
    sample.add_argument("--prompt", action="append", default=[], help="text of a prompt; may be repeated")
    sample.add_argument(
        "--prompts", metavar="FILE", help="a text a line; or JSONL, with prompt, messages (chat) or token_ids"
    )
    sample.add_argument(
        "--token-ids",
        action="append",
        default=[],
        metavar="IDS",
        help="tokens of a prompt, such as '1 2 3'; may be repeated",
    )
    sample.add_argument("-n", "--samples", type=int, default=1, help="completions of each prompt")
    sample.add_argument("--greedy", action="store_true", help="the most likely token at each position")
    sample.add_argument("--temperature", type=float, default=1.0)
    sample.add_argument("--top-k", type=int, help="only the k most probable tokens")
    sample.add_argument("--top-p", type=float, default=1.0, help="only the most probable tokens that sum to this")
    sample.add_argument("--min-p", type=float, default=0.0, help="only tokens this share as probable as the likeliest")
    sample.add_argument("--repetition-penalty", type=float, default=1.0, help="of tokens that came before; 1 is none")
    sample.add_argument("--min-tokens", type=int, default=0, help="no end before so many tokens")
    sample.add_argument("--stop", action="append", default=[], help="text that ends a completion; may be repeated")
    sample.add_argument("--max-tokens", type=int, help="longest completion (default: the run's, or 256)")
    sample.add_argument("--chat", action="store_true", help="of a model directory: through its chat template")
    sample.add_argument("--batch", type=int, default=8, help="prompts sampled together (default 8)")
    sample.add_argument("--jsonl", action="store_true", help="print a line of JSON for each completion, batch by batch")
    sample.add_argument("--seed", type=int, default=0)

    score = command("score", _score, "Log-probabilities of given texts or token ids, as JSON.", json_output=False)
    score.add_argument("path", metavar="MODEL", help="a run, a checkpoint, or a Hugging Face model directory")
    score.add_argument(
        "--file", required=True, metavar="JSONL", help="lines with prompt and completion, text, or tokens"
    )
    score.add_argument("--temperature", type=float, default=1.0)
    score.add_argument("--batch", type=int, default=8, help="sequences scored together")
    score.add_argument("--dtype", choices=["float32", "bfloat16"], help="of a model directory (default: as stored)")

    imported = command("import", _import, "Check a Hugging Face model directory, and write it in orbax's layout.")
    imported.add_argument("path", metavar="DIR", help="a directory, or owner/name of a repository")
    imported.add_argument(
        "out", nargs="?", metavar="OUT", help="new directory that model.path takes, for fast restores"
    )
    imported.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the parameters (default: as stored)")

    export = command("export", _export, "Write a run's policy as a directory that transformers loads.")
    export.add_argument("path", metavar="RUN_OR_CHECKPOINT")
    export.add_argument("out", metavar="DIR", help="new directory")
    export.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the stored tensors (default: the run's)")

    tasks = command("tasks", _tasks, "The built-in tasks, or examples of one.")
    tasks.add_argument("name", nargs="?")
    tasks.add_argument("--level", type=int, help="of the examples (default: the lowest)")
    tasks.add_argument("--count", type=int, default=3, help="examples to show")

    methods = command("methods", _methods, "The shipped recipes of published methods, or one recipe or function whole.")
    methods.add_argument("name", nargs="?", help="a recipe or a function")
    methods.add_argument("--certainty", choices=["verified", "recalled", "reconstructed"])
    methods.add_argument("--stage", metavar="WORD", help="recipes whose stage has this in it, such as advantage")
    methods.add_argument("--needs", metavar="WORD", help="recipes that need this of the engine, such as reference")
    methods.add_argument("--paper", metavar="WORD", help="recipes whose paper's name has this in it")
    methods.add_argument("--arxiv", metavar="NUMBER", help="recipes whose arXiv number has this in it")
    methods.add_argument("--functions", action="store_true", help="the functions that recipes are made of")
    methods.add_argument(
        "--room", choices=["reward", "advantage", "selection", "loss", "schedule"], help="functions of one room"
    )

    explain = command("explain", _explain, "The composed step of a config: stages, shapes, sizes, work.")
    explain.add_argument("config", nargs="+", metavar="CONFIG [section.key=value ...]")

    plan = command("plan", _plan, "Whether a run fits a machine that need not be there, and where its time goes.")
    plan.add_argument("config", nargs="+", metavar="CONFIG [section.key=value ...]")
    plan.add_argument(
        "--topology", required=True, metavar="NAME", help="such as v5e:16x16, v5p-256, 2*v5e:4x4, gpu:8xH100, cpu:8"
    )
    plan.add_argument("--search", action="store_true", help="try mesh layouts, rank them, and plan the best")
    plan.add_argument("--estimate", action="store_true", help="compile nothing: work everything out from sizes")

    command("doctor", _doctor, "Devices, versions, memory and compiled programs of this machine.")
    return parser


def _load(words: Sequence[str]):
    from jaxrl_llm.catalogue import recipe_path
    from jaxrl_llm.config import ConfigError, load_config
    from jaxrl_llm.data import CharacterTokenizer

    if not words or ("=" in words[0] and not Path(words[0]).is_file()):
        raise ConfigError("no config given; write jaxrl train CONFIG.yaml [section.key=value ...], or --resume RUN")
    # A bare word is the name of a shipped recipe.
    path = recipe_path(words[0]) if words[0].isidentifier() and not Path(words[0]).exists() else words[0]
    return load_config(path, words[1:], vocabulary_size=CharacterTokenizer().vocabulary_size)


def _train(options: argparse.Namespace) -> None:
    import jax

    from jaxrl_llm.allocator import give_back_after_compiling
    from jaxrl_llm.compilation_cache import enable_compilation_cache
    from jaxrl_llm.config import ConfigError, as_tree
    from jaxrl_llm.parallel import hosts
    from jaxrl_llm.parallel.start import initialise, place_of_this_process
    from jaxrl_llm.run.train import train

    words = list(options.config)
    if options.resume:
        stored = Path(options.resume) / "config.yaml"
        if not stored.is_file():
            raise ConfigError(f"--resume {options.resume}: there is no config.yaml in it; give the directory of a run")
        if words and "=" not in words[0]:
            raise ConfigError(f"--resume takes the run's own config; leave out {words[0]!r} (overrides may follow)")
        words = [str(stored), *words, f"run_dir={json.dumps(options.resume)}"]
    config = _load(words)

    def decide() -> dict[str, bool]:
        started = (config.directory / "config.yaml").is_file()
        return {"resume": bool(options.resume) or (options.resume_if_started and started)}

    place = place_of_this_process(
        options.coordinator, options.processes, options.process_id, seconds=options.start_timeout
    )
    peers = initialise(place, as_tree(config), seconds=options.start_timeout, decide=decide)
    hosts.join(peers)
    console = Console(stderr=options.json, quiet=peers is not None and not hosts.is_main())
    if peers is None:
        enable_compilation_cache()
    else:  # whose homes may differ: only process 0 writes, and processes that wait for each other must all compile
        console.print(f"{peers.place.processes} processes ({peers.place.how}) are there and agree")
    if jax.default_backend() == "cpu":
        give_back_after_compiling()
    decided = decide() if peers is None else peers.decided
    summary = train(config, resume=decided["resume"], console=console)
    if options.json and not console.quiet:
        print(json.dumps(summary, indent=2))


def _positive(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def _eval(options: argparse.Namespace) -> None:
    import jax

    from jaxrl_llm.compilation_cache import enable_compilation_cache
    from jaxrl_llm.evaluation import COUNTED, make_evaluate
    from jaxrl_llm.run.restored import restored_run
    from jaxrl_llm.run.setup import data_sets, grader, opened_parts
    from jaxrl_llm.run.stages import spread

    try:
        ks = sorted({int(k) for k in options.k.split(",")})
    except ValueError:
        raise ValueError(f"--k is {options.k!r}; give whole numbers separated by commas, for example 1,8,32") from None
    _positive(options, "samples", "problems")
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


def _sample(options: argparse.Namespace) -> None:
    from jaxrl_llm.compilation_cache import enable_compilation_cache
    from jaxrl_llm.sample_command import sample

    _positive(options, "samples", "max_tokens", "batch")
    enable_compilation_cache()
    sample(options)


def _score(options: argparse.Namespace) -> None:
    from jaxrl_llm.compilation_cache import enable_compilation_cache
    from jaxrl_llm.model_commands import score_file

    _positive(options, "batch")
    enable_compilation_cache()
    lines = score_file(
        options.path, options.file, temperature=options.temperature, batch=options.batch, dtype=options.dtype
    )
    for line in lines:
        print(json.dumps(line))


def _import(options: argparse.Namespace) -> None:
    from jaxrl_llm.model_commands import import_model

    _report(options, import_model(options.path, options.out, dtype=options.dtype), f"import of {options.path}")


def _export(options: argparse.Namespace) -> None:
    from jaxrl_llm.model_commands import export_run

    _report(options, export_run(options.path, options.out, dtype=options.dtype), f"export of {options.path}")


def _report(options: argparse.Namespace, report: dict[str, Any], title: str) -> None:
    if options.json:
        print(json.dumps(report, indent=2))
        return
    _show(options, [{"what": key, "value": value} for key, value in report.items()], title)


def _tasks(options: argparse.Namespace) -> None:
    from jaxrl_llm.data import tasks

    if options.name is None:
        rows = []
        for name in tasks.names():
            task = tasks.task(name)
            rows.append(
                {
                    "name": name,
                    "levels": f"{task.levels[0]} to {task.levels[-1]}",
                    "reward": task.reward,
                    "options": dict(task.options),
                    "description": task.description,
                }
            )
        _show(options, rows, "tasks")
        return
    task = tasks.task(options.name)
    level = task.levels[0] if options.level is None else options.level
    rows = [
        {"prompt": item.body, "reference response": task.response(item)}
        for item in task.generate(level=level, count=options.count)
    ]
    _show(options, rows, f"{task.name}, level {level}: {task.description}")


def _methods(options: argparse.Namespace) -> None:
    from jaxrl_llm import catalogue

    functions = options.functions or options.room is not None
    chosen = {name: getattr(options, name) for name in ("stage", "needs", "paper", "arxiv")}
    given = [name for name, value in chosen.items() if value is not None]
    if options.name is not None and (given or options.certainty or options.room):
        raise ValueError(f"methods {options.name} shows one method; leave the filters out")
    if functions and given:
        raise ValueError(f"--{given[0]} chooses among recipes; leave out {'--room' if options.room else '--functions'}")
    if options.name is not None:
        recipe = not functions and catalogue.is_recipe(options.name)
        if recipe:
            entry = catalogue.described_recipe(options.name)
        else:
            entry = catalogue.described(options.name) | {"recipes": catalogue.recipes_with(options.name)}
        if options.json:
            print(json.dumps(entry, indent=2, default=str))
        elif recipe:
            _show_recipe(entry, also_function=options.name in {e["name"] for e in catalogue.methods()})
        else:
            _show_function(entry)
        return
    if functions:
        rows = [
            {key: entry[key] for key in ("name", "room", "reference", "needs", "certainty")}
            for entry in catalogue.methods()
            if options.room in (None, entry["room"]) and options.certainty in (None, entry["certainty"])
        ]
    else:
        chosen["need"] = chosen.pop("needs")
        rows = catalogue.selected(catalogue.recipes(), certainty=options.certainty, **chosen)
    if options.json:
        print(json.dumps(rows, indent=2))
    elif functions:
        _columns(rows, "functions; jaxrl methods NAME shows one whole")
    else:
        keys = ("name", "paper", "arxiv", "stage", "needs", "certainty")
        rows = [{key: row[key] for key in keys} | {"needs": catalogue.shortened(row["needs"])} for row in rows]
        _columns(rows, "recipes; jaxrl methods NAME shows one whole, jaxrl train NAME trains with it")


def _show_recipe(entry: dict[str, Any], *, also_function: bool) -> None:
    console = Console()
    console.print(Text(f"{entry['name']} (recipe)", style="bold"))
    address = f", https://arxiv.org/abs/{entry['arxiv']}" if entry["arxiv"] else ""
    console.print(Text(f"{entry['paper']}{address}"), soft_wrap=True)
    for key in ("stage", "certainty", "needs"):
        if entry[key]:
            console.print(Text(f"{key.capitalize()}: {_plain(entry[key])}"), soft_wrap=True)
    for function, blocks in entry["formulas"].items():
        console.print(Text(f"\n{function}", style="bold"))
        console.print(Text("\n\n".join(textwrap.indent(block, "    ") for block in blocks)), soft_wrap=True)
    console.print(Text(f"\n{entry['path']}", style="bold"), soft_wrap=True)
    console.print(Text(entry["yaml"].rstrip()), soft_wrap=True)
    if also_function:
        console.print(Text(f"\nA function has this name too: jaxrl methods --functions {entry['name']}"))


def _show_function(entry: dict[str, Any]) -> None:
    console = Console()
    console.print(Text(f"{entry['name']} ({entry['room']})", style="bold"))
    console.print(Text(entry["doc"]), soft_wrap=True)
    hyper = {key: value for key, value in entry["hyper_parameters"].items() if value is not None}
    console.print(Text(f"\nRecipe entry:  {entry['name']}: {json.dumps(hyper, default=str)}"), soft_wrap=True)
    if entry["recipes"]:
        console.print(Text(f"Used by:  {', '.join(entry['recipes'])}"))


def _columns(rows: Sequence[dict[str, Any]], title: str) -> None:
    """A table in which no word is broken but at an underscore, and with fewer columns on a narrow screen."""
    console = Console()
    cells = [{key: _plain(value) for key, value in row.items()} for row in rows]
    if console.width < 112:
        for row in cells:
            row["name"] = "\n".join(textwrap.wrap(row["name"].replace("_", "_ "), 21)).replace("_ ", "_")
            row["certainty"] = row["certainty"].replace("reconstructed", "reconstr.")
            if number := row.pop("arxiv", ""):
                row["paper"] += f"\n{number}"
            if room := row.pop("room", ""):
                row["name"] += f"\n({room})"
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for key, width in _widths(cells, console.width).items():
        table.add_column(key, width=width, overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row.values()))
    console.print(table)


def _widths(cells: Sequence[dict[str, str]], total: int) -> dict[str, int]:
    """Each column as wide as its longest word, and what is left to those that need the least to fit whole."""
    keys = list(cells[0]) if cells else []
    widths = {key: max(len(word) for row in cells for word in [*row[key].split(), key]) for key in keys}
    whole = {key: max(len(line) for row in cells for line in [*row[key].split("\n"), key]) for key in keys}
    left = total - sum(widths.values()) - 2 * len(keys)
    for key in sorted(keys, key=lambda key: whole[key] - widths[key]):
        more = max(0, min(whole[key] - widths[key], left))
        widths[key] += more
        left -= more
    return widths


def _explain(options: argparse.Namespace) -> None:
    from jaxrl_llm.compilation_cache import enable_compilation_cache
    from jaxrl_llm.run.explain import explanation
    from jaxrl_llm.run.setup import parts

    enable_compilation_cache()
    result = explanation(parts(_load(options.config)))
    if options.json:
        print(json.dumps(result, indent=2))
        return
    _show(options, result["stages"], "one step, in order ([x] is used when something provides it)")
    _show(options, [{"field": k, "shape": v} for k, v in result["shapes"].items()], "experience after a step")
    _show(options, [{"size": k, "value": f"{v:,}"} for k, v in result["sizes"].items()], "sizes")
    widths = [
        row | {key: "?" if row[key] is None else f"{row[key]:.1%}" for key in ("prompts", "batches")}
        for row in result["widths"]
    ]
    used = [row["stage"] for row in result["widths"] if row["batches"] != 0]
    counts = ", ".join(f"{used.count(stage)} in {stage}" for stage in dict.fromkeys(used))
    _show(options, widths, f"widths of prompts, in tokens; programs: {counts}")
    programs = [
        {key: f"{value:,.0f}" if isinstance(value, float | int) else value for key, value in program.items()}
        for program in result["programs"]
    ]
    _show(options, programs, "compiled programs (XLA's cost model; a loop body is counted once)")


def _plan(options: argparse.Namespace) -> int:
    from jaxrl_llm.planning.plan import plan, refusal, tables

    console = Console(stderr=True)
    with console.status("planning") as status:
        result = plan(
            _load(options.config),
            options.topology,
            compile_programs=not options.estimate,
            search=options.search,
            report=lambda line: status.update(line),
        )
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        if result["note"]:
            print(f"note: {result['note']}\n")
        for title, rows in tables(result):
            _show(options, rows, title)
        print(f"about {result['step_seconds']:,.1f} s a step at the peak rates of the machine")
    if (problem := refusal(result)) is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


def _doctor(options: argparse.Namespace) -> None:
    from jaxrl_llm.reporting.machine_report import machine_report

    report = machine_report()
    if options.json:
        print(json.dumps(report, indent=2))
        return
    for section, values in report.items():
        _show(options, [{"what": key, "value": value} for key, value in values.items()], section)


def _show(options: argparse.Namespace, rows: Sequence[dict[str, Any]], title: str) -> None:
    """A table, or JSON where it was asked for."""
    if options.json:
        print(json.dumps(rows, indent=2, default=str))
        return
    table = Table(title=Text(title), title_justify="left")
    for name in rows[0] if rows else ():
        # A name is for copying, so it is never broken.
        table.add_column(name, overflow="fold", no_wrap=name == "name")
    for row in rows:
        table.add_row(*(Text(_plain(value)) for value in row.values()))
    Console().print(table)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}={inner}" for key, inner in value.items())
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
