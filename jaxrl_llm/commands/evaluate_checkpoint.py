"""`jaxrl eval` and `jaxrl compare`: a model on problems, and two evaluations of the same problems."""

from __future__ import annotations

import argparse
import json
import math
import operator
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from jaxrl_llm.bounds import counted, natural, shown
from jaxrl_llm.commands.arguments import assignments, require_positive
from jaxrl_llm.compilation_cache import enable_compilation_cache
from jaxrl_llm.evaluation import measured
from jaxrl_llm.evaluation.comparison import compared, forgetting
from jaxrl_llm.evaluation.evaluate import column
from jaxrl_llm.evaluation.record_files import (
    PROBLEMS,
    RecordFile,
    items_fingerprint,
    params_fingerprint,
    read_problem_records,
    stored_samples,
)
from jaxrl_llm.evaluation.suites import Evaluation, evaluation_of, read_suite
from jaxrl_llm.run.evaluated import Prepared, evaluated, guided, prepared, with_environment

_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}
_REQUIREMENT = re.compile(r"([^<>=]+)(>=|<=|==|>|<)([^<>=]+)")
_COUNTS = ("completion_tokens", "problems", "samples_per_problem", "distinct_answers", "answer_entropy")
_PLAIN = (*_COUNTS, "negative_logprob", "kl_reference", "score")
# Options of the command that are also keys of an evaluation.
_KEYS = (
    *("data", "task", "split", "format", "grader", "prompt_format", "problems", "samples", "temperature", "seed"),
    *("max_prompt_tokens", "max_completion_tokens"),
)


def evaluate_checkpoint(options: argparse.Namespace) -> int:
    """Evaluate, write and print; status 1 if a requirement is not met."""
    evaluations = _evaluations(options)
    requirements = [_requirement(text, evaluations) for text in options.require]
    enable_compilation_cache()
    subject = evaluated(options.path, every=options.all, chat=options.chat)
    if options.guided_by is not None:
        how = {"strength": options.strength, "candidates": options.candidates}
        subject = guided(subject, options.path, options.guided_by, **how)
    with with_environment(subject, evaluations.values()) as ready:
        return _report(options, evaluations, requirements, ready)


def _report(
    options: argparse.Namespace, evaluations: Mapping[str, Evaluation], requirements: list, subject: Any
) -> int:
    """Measure every checkpoint, and print the results."""
    several, console = len(subject.checkpoints) > 1, Console(stderr=True)
    labels = [label for label, _ in subject.checkpoints]
    evaluations = {
        name: _with_stored_samples(one, [_directory(options, label * several, name) for label in labels])
        for name, one in evaluations.items()
    }
    ready = {
        name: prepared(one, subject, reference=options.reference, batch=options.batch)
        for name, one in evaluations.items()
    }
    for note in dict.fromkeys(note for each in ready.values() for note in each.notes):
        print(f"note: {note}", file=sys.stderr)
    results: dict[str, dict[str, Any]] = {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for label, read in subject.checkpoints:
            params, found = read(), {}
            for name, one in evaluations.items():
                out = _directory(options, label * several, name)
                bar = progress.add_task(" ".join(filter(None, [label * several, name or "problems"])))
                found[name] = _measured(
                    one, ready[name], params, out, lambda n, of, b=bar: progress.update(b, completed=n, total=of)
                )
            results[label] = _summary(options, subject, label, found)
    if options.out is not None and (several or len(evaluations) > 1):
        told = {"checkpoints": results} if several else next(iter(results.values()))
        (Path(options.out) / "summary.json").write_text(json.dumps(told, indent=2) + "\n")
    last = list(results.values())[-1]
    if options.json:
        print(json.dumps({"checkpoints": results} if several else last, indent=2))
    else:
        _show(results, evaluations)
    return _unmet(requirements, last, named=bool(next(iter(evaluations))))


def _directory(options: argparse.Namespace, label: str, name: str) -> Path | None:
    """The directory below `--out` of an evaluation of a checkpoint; empty names add none."""
    return None if options.out is None else Path(options.out, *filter(None, (label, name)))


def _with_stored_samples(one: Evaluation, directories: Sequence[Path | None]) -> Evaluation:
    """The evaluation with as many samples as the stored one that it continues, unless it names a number itself.

    Raises:
      ValueError: if they are too few for its k.
    """
    stored = {each: number for each in directories if each is not None and (number := stored_samples(each))}
    if one.samples is not None or not stored:
        return one
    directory, number = next(iter(stored.items()))
    if number < max(one.k):
        raise ValueError(
            f"--out {directory} holds an evaluation with samples {number}, too few for k {list(one.k)}; give --k with "
            f"numbers up to {number}, or another directory"
        )
    return replace(one, samples=number)


def _measured(one: Evaluation, ready: Prepared, params: PyTree, out: Path | None, progress: Any) -> dict[str, Any]:
    """The metrics of one evaluation of one checkpoint; existing records are reused."""
    file, records = None, []
    if out is not None:
        settings = ready.settings | {
            "parameters": params_fingerprint(params),
            "problems": items_fingerprint(ready.items),
        }
        file = RecordFile(out, settings)
        records = file.kept()
    for batch in ready.records(params, ready.items, jax.random.key(one.seed), len(records)):
        records += batch
        if file is not None:
            file.append(batch)
        progress(len(records), len(ready.items))
    if one.by:  # stored records may have been written with other columns
        items = {item["item_id"]: item for item in ready.items}
        records = [
            each | {"columns": {name: column(items[each["item_id"]], name) for name in one.by}} for each in records
        ]
    summary = measured(records, one.k, by=one.by)
    if file is not None:
        file.summarise(summary)
    return summary


def _summary(options: argparse.Namespace, subject: Any, label: str, found: dict[str, Any]) -> dict[str, Any]:
    source = subject.policy.source
    head = {
        "checkpoint": str(source if subject.built is None else source.parent / label),
        "split": options.split or "test",
    }
    return head | found[""] if "" in found else head | {"evaluations": found}


def _evaluations(options: argparse.Namespace) -> dict[str, Evaluation]:
    """The requested evaluations by name; without a suite, one with the name ""."""
    require_positive(options, "samples", "problems", "batch")
    given = {name: getattr(options, name) for name in _KEYS if getattr(options, name) is not None}
    if options.k is not None:
        given["k"] = _numbers(options.k)
    for name, value in (("by", options.by), ("levels", options.levels)):
        if value is not None:
            given[name] = [part.strip() for part in value.split(",")]
    if options.reward:
        given["rewards"] = [{"python": each} if ":" in each else each for each in options.reward]
    if options.field:
        given["fields"] = assignments(options.field, "--field")
    if options.suite is not None:
        return read_suite(options.suite, given)
    return {"": evaluation_of(given, "jaxrl eval")}


def _numbers(text: str) -> list[int]:
    """Whole numbers separated by commas, in order."""
    found = [natural(part.strip()) for part in text.split(",")]
    if None in found:
        raise ValueError(f"--k is {shown(text)}; give whole numbers separated by commas, for example 1,8,32")
    return sorted({number for number in found if number is not None})


# ---- requirements ---------------------------------------------------------------------------------------------------


def _requirement(text: str, evaluations: Mapping[str, Evaluation]) -> tuple[str, str, float]:
    """(metric, comparison, number) of a requirement."""
    match = _REQUIREMENT.fullmatch(text)
    name, sign = (match[1].strip(), match[2]) if match else ("", "")
    try:
        number = float(match[3]) if match else math.nan
    except ValueError:
        number = math.nan
    if not name or not math.isfinite(number):
        raise ValueError(f"--require is {text!r}; write a metric, >=, <=, >, < or ==, and a number: 'pass@1>=0.9'")
    part, _, metric = name.rpartition("/")
    if (
        part
        and part not in evaluations
        and not part.startswith(("reward", *(f"{each}/reward" for each in evaluations)))
    ):
        raise ValueError(
            f"--require {text!r} names the evaluation {part!r}; there are {', '.join(evaluations) or 'none'}"
        )
    asked = re.fullmatch(r"(?:pass|maj)@(\d+)", metric)
    for own, one in evaluations.items():
        if asked and part in ("", own) and int(asked[1]) not in one.k:
            raise ValueError(f"--require {text!r}: {metric} is not measured with k {list(one.k)}; add it to --k")
    return name, sign, number


def _unmet(requirements: Sequence[tuple[str, str, float]], result: Mapping[str, Any], *, named: bool) -> int:
    """1 if a requirement is not met, else 0; each violation is printed on standard error."""
    status = 0
    for name, sign, number in requirements:
        parts = result.get("evaluations", {"": result})
        own, _, metric = name.partition("/")
        chosen = {own: parts[own]} if named and own in parts else parts
        metric = metric if named and own in parts else name
        for label, values in chosen.items():
            value = _looked_up(values, metric)
            if value is None:
                known = [key for key, each in values.items() if isinstance(each, int | float)]
                raise ValueError(f"--require names {metric!r}, which was not measured; there are {', '.join(known)}")
            if not _OPERATORS[sign](value, number):
                where = f"{label}/" if label else ""
                print(f"not met: {where}{metric} is {value:.6g}, and {sign}{number:g} was required", file=sys.stderr)
                status = 1
    return status


def _looked_up(values: Any, name: str) -> float | None:
    """A number by its name, with dots for nested ones, such as calibration.likelihood.ece."""
    if name in values:
        return values[name] if isinstance(values[name], int | float) else None
    outer, dot, inner = name.partition(".")
    return _looked_up(values[outer], inner) if dot and isinstance(values.get(outer), Mapping) else None


# ---- tables ---------------------------------------------------------------------------------------------------------


def _show(results: Mapping[str, Any], evaluations: Mapping[str, Evaluation]) -> None:
    console = Console()
    last = list(results.values())[-1]
    if len(results) > 1:
        _show_checkpoints(console, results, evaluations)
    for name, values in last.get("evaluations", {"": last}).items():
        table = Table(title=": ".join(filter(None, (name, last["checkpoint"]))))
        for heading in ("metric", "value", "95% interval"):
            table.add_column(heading, justify="left" if heading == "metric" else "right", no_wrap=heading != "metric")
        for metric, value in values.items():
            if isinstance(value, int | float):
                low, high = values["intervals"].get(metric, (None, None))
                around = "" if low is None else f"{_form(metric, low)} to {_form(metric, high)}"
                table.add_row(metric, _form(metric, value), around)
        for kind, found in values["calibration"].items():
            for metric in ("ece", "brier", "auroc"):
                if found[metric] is not None:
                    table.add_row(f"{metric} ({kind})", f"{found[metric]:.3f}", "")
        console.print(table)
        for by, parts in values["by"].items():
            _show_parts(console, by, parts)


def _show_parts(console: Console, column: str, parts: Mapping[str, Any]) -> None:
    names = [name for name in next(iter(parts.values())) if name != "intervals"]
    for first in range(0, len(parts), 6):  # six columns fit a narrow screen
        shown = dict(list(parts.items())[first : first + 6])
        table = Table(title=f"by {column}")
        for heading in ("metric", *shown):
            table.add_column(heading, justify="left" if heading == "metric" else "right", no_wrap=heading == "metric")
        for name in names:
            table.add_row(name, *(_form(name, found[name]) for found in shown.values()))
        console.print(table)


def _show_checkpoints(console: Console, results: Mapping[str, Any], evaluations: Mapping[str, Evaluation]) -> None:
    """Print the accuracies of each checkpoint with the best one marked, and the forgetting."""
    history = [
        {name: parts["pass@1"] if "pass@1" in parts else parts["greedy"] for name, parts in found.items()}
        for found in (each.get("evaluations", {"": each}) for each in results.values())
    ]
    best = max(range(len(history)), key=lambda i: sum(history[i].values()))
    table = Table(title="checkpoints")
    for heading in ("step", *(f"{name} greedy, pass@1".strip() for name in evaluations), ""):
        table.add_column(heading, justify="right")
    for place, (label, each) in enumerate(results.items()):
        shown = [
            ", ".join(f"{parts[m]:.1%}" for m in ("greedy", "pass@1") if m in parts)
            for parts in each.get("evaluations", {"": each}).values()
        ]
        table.add_row(label, *shown, "best" if place == best else "")
    console.print(table)
    console.print(f"forgetting (best so far minus last, mean over evaluations): {forgetting(history):+.1%}")


def _form(name: str, value: float) -> str:
    plain = name in _PLAIN or name.startswith("reward/") or name.endswith("_per_episode")
    return f"{value:.4g}" if plain else f"{value:.1%}"


# ---- compare --------------------------------------------------------------------------------------------------------


def compare_evaluations(options: argparse.Namespace) -> None:
    """`jaxrl compare A B`: paired differences of all evaluations of both."""
    sides = [_evaluation_directories(Path(path)) for path in (options.first, options.second)]
    if sides[0].keys() != sides[1].keys():
        raise ValueError(
            f"{options.first} has the evaluations {', '.join(sides[0])} and {options.second} has "
            f"{', '.join(sides[1])}; compare two of the same suite, or give the directories of single evaluations"
        )
    ks = None if options.k is None else _numbers(options.k)
    found: dict[str, Any] = {
        name: compared(read_problem_records(path), read_problem_records(sides[1][name]), ks)
        for name, path in sides[0].items()
    }
    if len(found) > 1:
        history = [
            {name: each["metrics"]["pass@1"][side] for name, each in found.items()} for side in ("first", "second")
        ]
        found["forgetting"] = forgetting(history)
    if options.json:
        print(json.dumps(found.get("", found), indent=2))
        return
    console = Console()
    for name, each in found.items():
        if name == "forgetting":
            console.print(f"forgetting of pass@1, mean over evaluations: {each:+.1%}")
            continue
        table = Table(title=f"{name or 'difference'}: {counted(each['problems'], 'problem')}")
        for heading in ("metric", "first", "second", "difference", "95% interval", "p"):
            table.add_column(heading, justify="left" if heading == "metric" else "right")
        for metric, row in each["metrics"].items():
            low, high = (_form(metric, end) for end in row["interval"])
            p = f"{row['p']:.3g}" if "p" in row else ""
            shown = [_form(metric, row[side]) for side in ("first", "second", "difference")]
            table.add_row(metric, *shown, f"{low} to {high}", p)
        console.print(table)
        console.print(
            f"solved greedily only by the first: {each['only_first']}, only by the second: {each['only_second']}"
        )


def _evaluation_directories(path: Path) -> dict[str, Path]:
    """Evaluations under a path by name; a path that is itself an evaluation has the name ""."""
    if path.is_file() or (path / PROBLEMS).is_file():
        return {"": path}
    if (after := path / "evaluations" / "after" / PROBLEMS).is_file():  # a run
        return {"": after}
    found = {each.parent.name: each.parent for each in sorted(path.glob(f"*/{PROBLEMS}"))}
    if not found:
        raise ValueError(f"{path} holds no {PROBLEMS}; give a directory that jaxrl eval --out wrote, or a finished run")
    return found
