"""The charts of a report as files for papers: SVG, PDF or PNG, drawn by matplotlib. Needs the extra `plot`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from jaxrl_llm.reporting.metric_panel import Panel
from jaxrl_llm.reporting.metric_table import described, panels
from jaxrl_llm.reporting.report import COLOURS, FigureFormat, groups_of
from jaxrl_llm.reporting.reported_run import ReportedRun, kl_curves, pass_curves, seconds_by_part, series

SMOOTHING, SMOOTHED_FROM = (
    0.8,
    25,
)  # as in the HTML report: the smoothing weight, and the largest number of points without smoothing
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


def _charts(runs: Sequence[ReportedRun]) -> Iterator[tuple[str, Any]]:
    several = len(runs) > 1
    of = list(zip(groups_of(runs), (series(run, from_last_stage=several) for run in runs), strict=True))
    for panel in panels(list(dict.fromkeys(name for _, own in of for name in own))):
        yield panel.title, lambda axes, panel=panel: _curves(axes, panel, of)
    if curves := [curve for run in runs for curve in pass_curves(run)]:
        yield "pass@k", lambda axes: _pass_at_k(axes, curves)
    if against := [curve for run in runs for curve in kl_curves(run)]:
        yield "reward against KL", lambda axes: _against_kl(axes, against)
    if parts := {run.name: seconds_by_part(run) for run in runs if seconds_by_part(run)}:
        yield "time by part", lambda axes: _bars(axes, parts)


def _curves(axes: Any, panel: Panel, of: Sequence[tuple[str, dict[str, Any]]]) -> None:
    groups = list(dict.fromkeys(group for group, _ in of))
    several = len(groups) > 1
    axes.set_yscale("log" if panel.log else "linear")
    for g, group in enumerate(groups):
        for m, name in enumerate(panel.metrics):
            members = [own[name] for other, own in of if other == group and name in own]
            if not members:
                continue
            label = ": ".join(filter(None, [group if several else "", name if len(panel.metrics) > 1 else ""])) or name
            colour, dash = COLOURS[(g if several else m) % len(COLOURS)], DASHES[(m if several else 0) % len(DASHES)]
            steps = np.unique(np.concatenate([steps for steps, _ in members]))
            values = np.full((len(members), len(steps)), np.nan)
            for row, (own, numbers) in enumerate(members):
                values[row, np.searchsorted(steps, own)] = smoothed(numbers)
            known = ~np.isnan(values).all(0)
            steps, values = steps[known], values[:, known]
            if len(members) > 1:
                low, high = np.nanmin(values, 0), np.nanmax(values, 0)
                axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
            elif len(steps) >= SMOOTHED_FROM:
                axes.plot(members[0][0], np.asarray(members[0][1], float), color=colour, alpha=0.3, linewidth=0.5)
            axes.plot(
                steps, np.nanmean(values, 0), dash, color=colour, label=label, marker="." if len(steps) < 5 else ""
            )
    first, *others = list(panel.metrics)
    row = described(first)
    axes.set(xlabel="step", ylabel=((row and row.unit) or panel.title) if others else first)


def smoothed(values: Sequence[float | None], weight: float = SMOOTHING) -> np.ndarray:
    """Exponential moving average, debiased at the start; None stays a gap."""
    numbers = np.asarray(values, float)
    if len(numbers) < SMOOTHED_FROM:
        return numbers
    total = mass = 0.0
    for place in np.flatnonzero(~np.isnan(numbers)):
        total, mass = weight * total + (1 - weight) * numbers[place], weight * mass + 1 - weight
        numbers[place] = total / mass
    return numbers


def _pass_at_k(axes: Any, curves: Sequence[dict[str, Any]]) -> None:
    for i, curve in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        axes.fill_between(curve["k"], curve["low"], curve["high"], color=colour, alpha=0.2, linewidth=0)
        axes.plot(curve["k"], curve["mean"], DASHES[i % len(DASHES)], color=colour, label=curve["name"], marker=".")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="k", ylabel="pass@k")


def _against_kl(axes: Any, curves: Sequence[dict[str, Any]]) -> None:
    for i, curve in enumerate(curves):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        axes.plot(smoothed(curve["kl"]), smoothed(curve["value"]), dash, color=colour, label=curve["name"])
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
