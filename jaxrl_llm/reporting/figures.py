"""The charts of a report as files for papers: SVG, PDF or PNG, drawn by matplotlib. Needs the extra `plot`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from jaxrl_llm.reporting.drawn_curves import (
    kl_curves,
    pass_curves,
    pieces,
    series,
    smoothed,
    smoothing_of,
    spacing,
    stages,
)
from jaxrl_llm.reporting.metric_panel import Panel
from jaxrl_llm.reporting.metric_table import described, panels
from jaxrl_llm.reporting.report import COLOURS, FigureFormat, groups_of
from jaxrl_llm.reporting.reported_run import ReportedRun, seconds_by_part

MARKED = 25  # points: curves with fewer have a marker at each
INCHES = (3.4, 2.4)  # width of a paper column
STYLE = {
    "font.size": 8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.fontsize": 6,
    "legend.frameon": False,
}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.2}
STYLE |= {"svg.fonttype": "none", "svg.hashsalt": "jaxrl_llm", "pdf.fonttype": 42, "savefig.dpi": 300}
DASHES = ("-", "--", ":", "-.")


def write_figures(runs: Sequence[ReportedRun], directory: str | Path, form: FigureFormat = "svg") -> list[Path]:
    """Write one file for each chart of the report: curves, pass@k, seconds.

    Args:
      runs: one or several; runs that differ only in the seed are one curve with mean and range.
      directory: created if it does not exist; existing files are replaced.
      form: svg and pdf keep their text as text.

    Returns:
      The files.

    Raises:
      ValueError: for an unknown form, a directory that cannot be written, or missing matplotlib.
    """
    if form not in get_args(FigureFormat):
        raise ValueError(f"--format {form} is not known; use one of {', '.join(get_args(FigureFormat))}")
    try:
        figure = importlib.import_module("matplotlib.figure").Figure
        context = importlib.import_module("matplotlib").rc_context
    except ImportError:
        raise ValueError("figures need matplotlib; install it with pip install 'jaxrl_llm[plot]'") from None
    written, directory = [], Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with context(STYLE):
            for title, draw in _charts(runs):
                drawn = figure(figsize=INCHES, layout="constrained")
                axes = drawn.add_subplot()
                draw(axes)
                if len(axes.get_legend_handles_labels()[1]) > 1:
                    axes.legend()
                written.append(directory / f"{re.sub(r'[^a-z0-9]+', '_', title.lower()).strip('_')}.{form}")
                drawn.savefig(written[-1], metadata={"Date": None} if form == "svg" else None)
    except OSError as error:
        raise ValueError(f"no figures can be written to {directory}: {error.strerror}; name another place") from None
    return written


class Drawn(NamedTuple):
    """A run as it is drawn: its group, [steps, values] by metric, the first step of each stage, steps of a point."""

    group: str
    series: dict[str, Any]
    starts: list[int]
    spacing: float


def _charts(runs: Sequence[ReportedRun]) -> Iterator[tuple[str, Any]]:
    several, groups = len(runs) > 1, groups_of(runs)
    drawn = [
        Drawn(
            group,
            series(run, from_last_stage=several),
            [stage["step"] for stage in stages(run, from_last_stage=several)],
            spacing(run),
        )
        for run, group in zip(runs, groups, strict=True)
    ]
    for panel in panels(list(dict.fromkeys(name for one in drawn for name in one.series))):
        yield panel.title, lambda axes, panel=panel: _curves(axes, panel, drawn)
    if curves := pass_curves(runs, groups):
        yield "pass@k", lambda axes: _pass_at_k(axes, curves)
    if against := kl_curves(runs, groups):
        yield "reward against KL", lambda axes: _against_kl(axes, against)
    if parts := {run.name: seconds_by_part(run) for run in runs if seconds_by_part(run)}:
        yield "time by part", lambda axes: _bars(axes, parts)


def _curves(axes: Any, panel: Panel, drawn: Sequence[Drawn]) -> None:
    groups = list(dict.fromkeys(one.group for one in drawn))
    several = len(groups) > 1
    axes.set_yscale("log" if panel.log else "linear")
    for g, group in enumerate(groups):
        for m, name in enumerate(panel.metrics):
            members = [one for one in drawn if one.group == group and name in one.series]
            if not members:
                continue
            label = ": ".join(filter(None, [group if several else "", name if len(panel.metrics) > 1 else ""])) or name
            colour, dash = COLOURS[(g if several else m) % len(COLOURS)], DASHES[(m if several else 0) % len(DASHES)]
            _curve(axes, name, members, colour=colour, dash=dash, label=label)
    first, *others = list(panel.metrics)
    row = described(first)
    axes.set(xlabel="step", ylabel=((row and row.unit) or panel.title) if others else first)
    if panel.unit == "share":
        _share_axis(axes)


def _curve(axes: Any, name: str, members: Sequence[Drawn], *, colour: str, dash: str, label: str) -> None:
    """One metric: its smoothed curve in each stage over the numbers of each step, or the mean and the band of seeds."""
    weight = smoothing_of(name)
    steps = np.unique(np.concatenate([one.series[name][0] for one in members]))
    values = np.full((len(members), len(steps)), np.nan)
    for row, one in enumerate(members):
        own, numbers = one.series[name]
        for piece in pieces(own, one.starts):
            found = smoothed(own[piece], numbers[piece], weight, one.spacing)
            values[row, np.searchsorted(steps, own[piece])] = found
            if len(members) == 1 and weight:
                axes.plot(own[piece], np.asarray(numbers[piece], float), color=colour, alpha=0.3, linewidth=0.5)
    known = ~np.isnan(values).all(0)
    steps, values = steps[known], values[:, known]
    for piece in pieces(steps, sorted({start for one in members for start in one.starts})):
        x, y = steps[piece], values[:, piece]
        if len(members) > 1:
            axes.fill_between(x, np.nanmin(y, 0), np.nanmax(y, 0), color=colour, alpha=0.2, linewidth=0)
        mark = "." if len(x) < MARKED else ""
        axes.plot(x, np.nanmean(y, 0), dash, color=colour, label=label, marker=mark)
        label = ""  # once in the legend


def _share_axis(axes: Any) -> None:
    """From 0, and to 1 if all that is drawn is 0."""
    highest = axes.dataLim.y1
    axes.set_ylim(bottom=0 if axes.get_ylim()[0] < 0 else None, top=None if highest > 0 else 1)


def _pass_at_k(axes: Any, curves: Sequence[dict[str, Any]]) -> None:
    for i, curve in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        axes.fill_between(curve["k"], curve["low"], curve["high"], color=colour, alpha=0.2, linewidth=0)
        axes.plot(curve["k"], curve["mean"], DASHES[i % len(DASHES)], color=colour, label=curve["name"], marker=".")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="k", ylabel="pass@k")
    _share_axis(axes)


def _against_kl(axes: Any, curves: Sequence[dict[str, Any]]) -> None:
    for i, curve in enumerate(curves):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        x, y = (smoothed(curve["step"], curve[what], spacing=curve["spacing"]) for what in ("kl", "value"))
        axes.plot(x, y, dash, color=colour, label=curve["name"])
    axes.set(xlabel="KL, nats a token", ylabel="reward")


def _bars(axes: Any, parts: dict[str, dict[str, float]]) -> None:
    names = list(dict.fromkeys(name for own in parts.values() for name in own))
    for i, (run, own) in enumerate(parts.items()):
        places = np.arange(len(names)) + 0.8 * ((i + 0.5) / len(parts) - 0.5)
        axes.barh(
            places, [own.get(n, 0.0) for n in names], 0.8 / len(parts), color=COLOURS[i % len(COLOURS)], label=run
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="seconds")
