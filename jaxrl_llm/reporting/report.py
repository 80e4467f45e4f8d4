"""The report of one or several runs: one self-contained HTML file, which needs no network.

The file includes the basic bundle of Plotly (plotly.js-basic-dist-min of npm, with its licence in this folder),
compressed. The page is a jinja2 template. Needs the extra `report`.
"""

from __future__ import annotations

import base64
import importlib
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from jaxrl_llm.reporting.drawn_curves import (
    SMOOTHING,
    kl_curves,
    pass_curves,
    series,
    smoothing_of,
    spacing,
    stages,
)
from jaxrl_llm.reporting.loggers import flattened
from jaxrl_llm.reporting.metric_alarms import alarms
from jaxrl_llm.reporting.metric_table import panels
from jaxrl_llm.reporting.reported_run import ReportedRun, facts, headlines, seconds_by_part, shown_samples
from jaxrl_llm.reporting.reward_summary import reward_tables

MOST_SAMPLES = 300
PER_SEED = ("seed", "run_dir", "name")
# The palette of Okabe and Ito, which colour-blind readers can distinguish.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")
FigureFormat = Literal["svg", "pdf", "png"]


def write_report(runs: Sequence[ReportedRun], out: str | Path) -> Path:
    """Write the report of runs into one HTML file, atomically.

    Args:
      runs: one or several; runs whose configs differ only in the seed are drawn as one curve with its spread.
      out: the file.

    Raises:
      ValueError: for no runs, a run without metrics, a file that cannot be written, or a missing package.
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
    groups, several = groups_of(runs), len(runs) > 1
    drawn = panels(list(dict.fromkeys(name for run in runs for name in series(run))))
    data = {
        "runs": [
            {"name": run.name, "group": groups[i], "spacing": spacing(run)}
            | {"series": series(run, from_last_stage=several), "stages": stages(run, from_last_stage=several)}
            for i, run in enumerate(runs)
        ],
        "groups": list(dict.fromkeys(groups)),
        "panels": [panel._asdict() for panel in drawn],
        "exact": [name for panel in drawn for name in panel.metrics if not smoothing_of(name)],
        "pass_at_k": pass_curves(runs, groups),
        "against_kl": kl_curves(runs, groups),
        "seconds": [{"name": run.name, "parts": seconds_by_part(run)} for run in runs if seconds_by_part(run)],
        "samples": [sample for run in runs for sample in shown_samples(run, MOST_SAMPLES // len(runs))],
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        title=", ".join(dict.fromkeys(run.name for run in runs)),
        runs=runs,
        headlines=headlines(runs, groups),
        rewards=reward_tables(runs, groups),
        has_seeds=len(set(groups)) < len(groups),
        has_single=any(groups.count(group) == 1 for group in groups),
        has_stages=any(len(run["stages"]) > 1 for run in data["runs"]),
        smoothing=SMOOTHING,
        alarms=[(run.name, sentence) for run in runs for sentence in alarms(run.metrics)],
        panels=drawn,
        data=_script(data),
        plotly=_plotly(),
        colours=COLOURS,
        different=different_settings(runs),
        configs=[(run.name, yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)) for run in runs],
        facts=[(run.name, facts(run)) for run in runs],
        has_pass_curve=bool(data["pass_at_k"]),
        has_kl=bool(data["against_kl"]),
        has_seconds=bool(data["seconds"]),
    )


def different_settings(runs: Sequence[ReportedRun]) -> list[tuple[str, list[str]]]:
    """Settings with different values in the runs, with the value in each."""
    flat = [flattened(run.config) for run in runs]
    names = dict.fromkeys(name for each in flat for name in each)
    rows = [(name, [json.dumps(each.get(name)) for each in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def groups_of(runs: Sequence[ReportedRun]) -> list[str]:
    """The name of the group of each run: runs that differ only in the seed are one group."""
    keys = [
        json.dumps({n: v for n, v in run.config.items() if n not in PER_SEED}, sort_keys=True, default=str)
        for run in runs
    ]
    count = {key: keys.count(key) for key in keys}
    first = {key: run.name for key, run in reversed(list(zip(keys, runs, strict=True)))}
    return [f"{first[key]} and {count[key] - 1} more seeds" if count[key] > 1 else first[key] for key in keys]


def _script(data: Any) -> str:
    """JSON escaped for a script element: no text in it can end the element or start a comment."""
    text = json.dumps(_finite(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _finite(value: Any) -> Any:
    """The value with NaN and infinities replaced by null, since JSON has neither."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@cache
def _plotly() -> str:
    """The compressed bundle of Plotly in base64."""
    return base64.b64encode(Path(__file__).with_name("plotly-basic.min.js.gz").read_bytes()).decode()


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"a report needs the package {name}; install it with pip install 'jaxrl_llm[report]'"
        ) from None
