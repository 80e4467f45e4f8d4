"""The content of a run directory for a report: accuracies with intervals, samples, time, facts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jaxrl_llm.reporting.run_directory import read_records

MOST_TOKENS = 400  # coloured tokens of a sample


@dataclass(frozen=True)
class ReportedRun:
    """The content of a run directory.

    Attributes:
      name: its name in the report.
      path: the directory.
      config: its config.yaml.
      metrics, samples: records of its files.
      summary: its summary.json; empty while it is running.
      evaluations: records by "before" and "after".
      changed: settings that differ from the defaults.
    """

    name: str
    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    summary: dict[str, Any]
    evaluations: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    changed: Mapping[str, Any] = field(default_factory=dict)


def read_run(path: str | Path, *, name: str | None = None, changed: Mapping[str, Any] | None = None) -> ReportedRun:
    """The content of a run directory; the run may still be running.

    Raises:
      ValueError: for a directory without a run, or damaged records.
    """
    from jaxrl_llm.evaluation.record_files import PROBLEMS, read_problem_records

    path = Path(path)
    if not (path / "config.yaml").is_file():
        raise ValueError(f"{path} is not a run: it has no config.yaml; give the directory of a run")
    config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")) or {}
    held = path / "summary.json"
    evaluations = {}
    for when in ("before", "after"):
        file = path / "evaluations" / when / PROBLEMS
        if file.is_file() and file.stat().st_size:
            evaluations[when] = read_problem_records(file)
    return ReportedRun(
        name or path.name,
        path,
        config,
        read_records(path / "metrics.jsonl"),
        read_records(path / "samples.jsonl"),
        json.loads(held.read_text(encoding="utf-8")) if held.is_file() else {},
        evaluations,
        changed or {},
    )


def headlines(runs: Sequence[ReportedRun], groups: Sequence[str]) -> list[tuple[str, list[dict[str, Any]], str]]:
    """(name, rows, description of their intervals) of groups of seeds, and then of each run."""
    alone = {run.name: headline(run) for run in runs}
    found = []
    for group in dict.fromkeys(groups):
        members = [alone[run.name] for run, own in zip(runs, groups, strict=True) if own == group]
        if len(members) > 1 and all(members):
            found.append(
                (group, _over_seeds(members), f"mean over {len(members)} seeds, from the lowest to the highest")
            )
    paired = "held-out problems, 95% intervals over problems; the change is paired"
    return found + [
        (name, rows, paired if any(row["interval"] for row in rows) else "held-out problems")
        for name, rows in alone.items()
    ]


def _over_seeds(members: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    rows = []
    for row in members[0]:
        same = [other for each in members for other in each if other["name"] == row["name"]]
        entry = {"name": row["name"]}
        for what, around in (("before", "before_interval"), ("after", "after_interval"), ("difference", "interval")):
            values = [each[what] for each in same if each[what] is not None]
            entry[what] = float(np.mean(values)) if values else None
            entry[around] = [min(values), max(values)] if values else None
        rows.append(entry)
    return rows


def headline(run: ReportedRun) -> list[dict[str, Any]]:
    """Rows of accuracy before and after training, with 95% intervals if the run has evaluation records."""
    from jaxrl_llm.evaluation.comparison import compared
    from jaxrl_llm.evaluation.measures import measured

    before, after = run.summary.get("before", {}), run.summary.get("after", {})
    names = [name for name in {**before, **after} if name == "greedy" or "@" in name]
    k = sorted({int(name.partition("@")[2]) for name in names if name.startswith("pass@")})
    kept = {when: measured(records, k) for when, records in run.evaluations.items() if records and k}
    paired = {}
    if {"before", "after"} <= run.evaluations.keys() and k:
        paired = compared(run.evaluations["before"], run.evaluations["after"], k)["metrics"]
    return [
        {
            "name": name,
            "before": before.get(name),
            "after": after.get(name),
            "before_interval": kept.get("before", {}).get("intervals", {}).get(name),
            "after_interval": kept.get("after", {}).get("intervals", {}).get(name),
            "difference": after[name] - before[name] if name in before and name in after else None,
            "interval": paired.get(name, {}).get("interval"),
        }
        for name in names
    ]


def shown_samples(run: ReportedRun, most: int) -> list[dict[str, Any]]:
    """At most `most` evenly spaced samples of training and greedy completions of the evaluations."""
    samples = [{"run": run.name, "from": "training"} | sample for sample in run.samples]
    for when, records in run.evaluations.items():
        step = run.metrics[-1]["step"] if when == "after" else 0
        for record in _spread(records, most // 4):
            answer = record["greedy"]
            samples.append(
                {
                    "run": run.name,
                    "from": f"evaluation {when}",
                    "step": step,
                    "prompt": record["prompt"],
                    "completion": answer["completion"],
                    "answer": record["answer"],
                    "correct": answer["correct"],
                    "length": answer["tokens"],
                    "truncated": answer["truncated"],
                }
            )
    found = []
    for sample in _spread(samples, most):
        tokens = sample.get("tokens", {})
        cut = {name: values[:MOST_TOKENS] for name, values in tokens.items()}
        length = sample.get("length", len(tokens["text"]) if tokens else None)
        found.append(sample | {"length": length, "tokens": cut})
    return found


def _spread(values: Sequence[Any], most: int) -> list[Any]:
    places = np.linspace(0, len(values) - 1, min(len(values), max(most, 1))).round().astype(int)
    return [values[place] for place in places]


def seconds_by_part(run: ReportedRun) -> dict[str, float]:
    return {name: round(value, 1) for name, value in run.summary.get("seconds", {}).items() if name != "total"}


def facts(run: ReportedRun) -> dict[str, str]:
    """Facts of a run for a table: size, time, memory, machine, versions."""
    summary = run.summary
    facts = {"directory": str(run.path), "steps": str(run.metrics[-1]["step"])}
    if not summary:
        return facts | {"state": "running, or stopped"}
    seconds, tokens = summary.get("seconds", {}), summary.get("completion_tokens_sampled", 0)
    sampling = sum(value for name, value in seconds.items() if name not in ("total", "set-up", "warm start"))
    facts["time"] = f"{seconds.get('total', 0):,.0f} s"
    if goodput := summary.get("goodput"):
        starts = f", {goodput['starts']} starts" if goodput["starts"] > 1 else ""
        of = f"{goodput['useful_seconds']:,.0f} of {goodput['paid_seconds']:,.0f} s{starts}"
        facts["goodput"] = f"{goodput['share']:.0%}: {of}"
    facts["tokens sampled in training"] = f"{tokens:,}"
    if sampling:
        facts["tokens per second, including updates and evaluations"] = f"{tokens / sampling:,.0f}"
    if "peak_memory_bytes" in summary:
        facts["peak memory of the host"] = f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"
    if "compilations" in summary:
        facts["programs compiled"] = f"{summary['compilations']} in {summary.get('compilation_seconds', 0):.0f} s"
    devices = summary.get("devices", [])
    facts["devices"] = f"{len(devices)}: {', '.join(devices[:4])}"
    return facts | {name: str(value) for name, value in summary.get("versions", {}).items()}
