"""The report of one run or several: one HTML file that holds everything, for a browser without a network.

Plotly draws (its library travels in the file, compressed), jinja2 fills the page in. Needs the extra `report`.
"""

from __future__ import annotations

import base64
import fnmatch
import gzip
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from jaxrl_llm.reporting.alarms import alarms
from jaxrl_llm.reporting.run_directory import read_records

MOST_POINTS = 2000  # of a curve; neighbouring steps are averaged beyond
MOST_SAMPLES = 300
MOST_TOKENS = 400  # of a sample whose tokens are coloured
PER_SEED = ("seed", "run_dir", "name")


class Panel(NamedTuple):
    """One chart: metrics that belong together.

    Attributes:
      title: heading.
      metrics: patterns of their names.
      text: how it is read.
      log: the axis of values is logarithmic.
    """

    title: str
    metrics: tuple[str, ...]
    text: str
    log: bool = False


PANELS = (
    Panel("Reward", ("reward",), "Mean reward of a completion, what training maximises."),
    Panel("Right answers", ("correct_share", "pass@1*"), "Share of sampled completions that the first reward accepts."),
    Panel("Rewards apart", ("reward/*", "rewards/*"), "Each reward function by itself, before weights."),
    Panel("Validation", ("validation/*@*", "validation/greedy"), "Accuracy on problems that are not trained on."),
    Panel("KL divergence", ("kl_reference*", "kl_*"), "From the reference, and of one update, in nats."),
    Panel("Entropy", ("entropy*",), "Nats a token; near 0 all samples of a prompt are the same."),
    Panel("Length", ("completion_tokens*",), "Tokens of a completion."),
    Panel("Cut off", ("truncated_share*",), "Share of completions that reached the length limit."),
    Panel("Groups without signal", ("constant_group_share*", "kept_share*"), "Groups of equal rewards teach nothing."),
    Panel("Clipped", ("clip_share*",), "Share of tokens whose gradient is clipped away."),
    Panel("Gradient norm", ("gradient_norm*",), "Before clipping."),
    Panel("Loss", ("loss", "loss/*"), "What is minimised, and its terms; of a policy loss the value says little."),
    Panel("Advantages and ratios", ("advantage*", "ratio*"), "Size of the advantages; largest importance ratio."),
    Panel("Sampler and trainer", ("sampler_gap*",), "Difference of their log-probabilities of the same token.", True),
    Panel("Learning rate", ("learning_rate*",), "Of the optimiser."),
    Panel("Seconds", ("seconds*", "*_seconds"), "Of a step, by part."),
    Panel("Throughput", ("tokens_per_second*", "*per_second"), "Tokens a second."),
    Panel("Memory", ("*memory*", "*bytes*"), "Of a device."),
)


@dataclass(frozen=True)
class ReportedRun:
    """What a run directory says.

    Attributes:
      name: what the report calls it.
      path: the directory.
      config: its config.yaml.
      metrics, samples: records of its files.
      summary: its summary.json; empty while it goes on.
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
    """A run directory as a report reads it; the run may still go on.

    Raises:
      ValueError: for a directory without a run, or damaged records.
    """
    from jaxrl_llm.evaluation.record_files import PROBLEMS, read_problem_records

    path = Path(path)
    if not (path / "config.yaml").is_file():
        raise ValueError(f"{path} is no run: there is no config.yaml in it; give the directory of a run")
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


def write_report(runs: Sequence[ReportedRun], out: str | Path) -> Path:
    """Write the report of runs into one HTML file, whole or not at all.

    Args:
      runs: one or several; those whose configs differ in the seed alone are drawn as one curve with its spread.
      out: the file.

    Raises:
      ValueError: for no runs, a run without metrics, a file that cannot be written, or a package that is missing.
    """
    if not runs:
        raise ValueError("no run is given; name at least one run directory")
    for run in runs:
        if not run.metrics:
            raise ValueError(f"{run.path} has no metrics yet (metrics.jsonl is empty); wait for its first step")
    page = rendered(runs)
    out = Path(out)
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        raise ValueError(
            f"the report {out} cannot be written: {error.strerror}; name another file with --out"
        ) from None
    return out


def rendered(runs: Sequence[ReportedRun]) -> str:
    """The page as text."""
    jinja2 = _package("jinja2")
    groups = _groups(runs)
    drawn = panels(list(dict.fromkeys(name for run in runs for name in series(run))))
    data = {
        "runs": [
            {"name": run.name, "group": groups[i], "series": series(run), "stages": _stages(run)}
            for i, run in enumerate(runs)
        ],
        "groups": list(dict.fromkeys(groups)),
        "panels": [panel._asdict() for panel in drawn],
        "pass_at_k": [curve for run in runs for curve in _pass_curves(run)],
        "seconds": [{"name": run.name, "parts": _parts(run)} for run in runs if _parts(run)],
        "samples": [sample for run in runs for sample in shown_samples(run, MOST_SAMPLES // len(runs))],
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        title=", ".join(dict.fromkeys(run.name for run in runs)),
        runs=runs,
        headlines=[(run.name, headline(run)) for run in runs],
        alarms=[(run.name, sentence) for run in runs for sentence in alarms(run.metrics)],
        panels=drawn,
        data=_script(data),
        plotly=_plotly(),
        different=different_settings(runs),
        configs=[(run.name, yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)) for run in runs],
        facts=[(run.name, _facts(run)) for run in runs],
        has_pass_curve=bool(data["pass_at_k"]),
        has_seconds=bool(data["seconds"]),
    )


def headline(run: ReportedRun) -> list[dict[str, Any]]:
    """Rows of accuracy before and after, with 95% intervals where the run kept its evaluations."""
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


def panels(names: Sequence[str]) -> list[Panel]:
    """The charts of metrics that there are: each in the first panel that names it, the rest in panels of their own."""
    left, found = list(names), []
    for panel in PANELS:
        own = [name for pattern in panel.metrics for name in left if fnmatch.fnmatchcase(name, pattern)]
        own = list(dict.fromkeys(own))
        if own:
            found.append(panel._replace(metrics=tuple(own)))
            left = [name for name in left if name not in own]
    return found + [Panel(name, (name,), "") for name in left]


def series(run: ReportedRun) -> dict[str, list[list[float | None]]]:
    """[steps, values] of each metric; long ones averaged over neighbouring steps, what is not finite left out."""
    found: dict[str, tuple[list, list]] = {}
    for record in run.metrics:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                steps, values = found.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value if math.isfinite(value) else None)
    return {name: _thinned(*pair) for name, pair in found.items()}


def _thinned(steps: list[int], values: list[float | None]) -> list[list[Any]]:
    if len(steps) > MOST_POINTS:
        parts = np.array_split(np.arange(len(steps)), MOST_POINTS)
        known = np.asarray([math.nan if value is None else value for value in values])
        values = [None if np.isnan(known[part]).all() else float(np.nanmean(known[part])) for part in parts]
        steps = [steps[part[-1]] for part in parts]
    return [steps, [None if value is None else float(f"{value:.6g}") for value in values]]


def shown_samples(run: ReportedRun, most: int) -> list[dict[str, Any]]:
    """Samples of training, and the greedy completions of the evaluations, spread evenly over what there is."""
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
        correct = sample.get("correct", sample.get("reward", 0.0) >= 1.0)
        tokens = sample.get("tokens", {})
        cut = {name: values[:MOST_TOKENS] for name, values in tokens.items()}
        length = sample.get("length", len(tokens["text"]) if tokens else None)
        found.append(sample | {"correct": bool(correct), "length": length, "tokens": cut})
    return found


def _spread(values: Sequence[Any], most: int) -> list[Any]:
    places = np.linspace(0, len(values) - 1, min(len(values), max(most, 1))).round().astype(int)
    return [values[place] for place in places]


def different_settings(runs: Sequence[ReportedRun]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, with the value in each."""
    flat = [_flat(run.config) for run in runs]
    names = dict.fromkeys(name for each in flat for name in each)
    rows = [(name, [json.dumps(each.get(name)) for each in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _groups(runs: Sequence[ReportedRun]) -> list[str]:
    """The name of the group of each run: runs that differ in the seed alone share one."""
    keys = [
        json.dumps({n: v for n, v in run.config.items() if n not in PER_SEED}, sort_keys=True, default=str)
        for run in runs
    ]
    count = {key: keys.count(key) for key in keys}
    first = {key: run.name for key, run in reversed(list(zip(keys, runs, strict=True)))}
    return [f"{first[key]} and {count[key] - 1} more seeds" if count[key] > 1 else first[key] for key in keys]


def _pass_curves(run: ReportedRun) -> list[dict[str, Any]]:
    from jaxrl_llm.evaluation.measures import measured

    found = []
    for when, records in run.evaluations.items():
        curve = measured(records, (1,))["pass_at_k"]
        found.append(
            {
                "name": f"{run.name}, {when}",
                "k": [int(k) for k in curve],
                "mean": [point["mean"] for point in curve.values()],
                "low": [point["interval"][0] for point in curve.values()],
                "high": [point["interval"][1] for point in curve.values()],
            }
        )
    return found


def _stages(run: ReportedRun) -> list[dict[str, Any]]:
    """The first step of each stage, with its name."""
    first: dict[str, int] = {}
    for record in run.metrics:
        first.setdefault(record.get("stage", ""), record["step"])
    return [{"name": name, "step": step} for name, step in first.items()]


def _parts(run: ReportedRun) -> dict[str, float]:
    return {name: round(value, 1) for name, value in run.summary.get("seconds", {}).items() if name != "total"}


def _facts(run: ReportedRun) -> dict[str, str]:
    """Plain facts of a run: size, time, memory, machine, versions."""
    summary = run.summary
    facts = {"directory": str(run.path), "steps": str(run.metrics[-1]["step"])}
    if not summary:
        return facts | {"state": "goes on, or was stopped"}
    seconds, tokens = summary.get("seconds", {}), summary.get("completion_tokens_sampled", 0)
    sampling = sum(value for name, value in seconds.items() if name not in ("total", "set-up", "warm start"))
    facts["time"] = f"{seconds.get('total', 0):,.0f} s"
    facts["tokens sampled in training"] = f"{tokens:,}"
    if sampling:
        facts["tokens a second, with updates and evaluations"] = f"{tokens / sampling:,.0f}"
    if "peak_memory_bytes" in summary:
        facts["peak memory of the host"] = f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"
    if "compilations" in summary:
        facts["programs compiled"] = f"{summary['compilations']} in {summary.get('compilation_seconds', 0):.0f} s"
    devices = summary.get("devices", [])
    facts["devices"] = f"{len(devices)}: {', '.join(devices[:4])}"
    return facts | {name: str(value) for name, value in summary.get("versions", {}).items()}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {n: v for key, value in tree.items() for n, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()}


def _script(data: Any) -> str:
    """JSON that can stand in a script element: no text in it can end the element or start a comment."""
    text = json.dumps(_finite(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@cache
def _plotly() -> str:
    """The drawing library, compressed, in letters."""
    file = Path(_package("plotly").__file__).parent / "package_data" / "plotly.min.js"
    return base64.b64encode(gzip.compress(file.read_bytes(), 6, mtime=0)).decode()


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"a report needs the package {name}; install it with pip install 'jaxrl_llm[report]'"
        ) from None
