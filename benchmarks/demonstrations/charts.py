"""Charts of demonstrations: curves of several variants and seeds, one chart per panel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm.reporting.figures import INCHES, STYLE
from jaxrl_llm.reporting.report import COLOURS


def drawn(found: dict[str, Any], file: Path) -> None:
    """One chart per panel: the mean over seeds of each variant, with a band from the lowest to the highest seed."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = found["panels"]
    variants = list(dict.fromkeys(variant for of in panels.values() for variant in of))
    fullest = max(len(of) for of in panels.values())
    with rc_context(STYLE):
        figure = Figure(figsize=(INCHES[0] * len(panels), INCHES[1]), layout="constrained")
        for axes, (title, of) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
            for variant, seeds in of.items():
                values, colour = np.array(seeds, float), COLOURS[variants.index(variant) % len(COLOURS)]
                steps = found.get("steps", values.shape[1])
                x = found.get("x", ())[: values.shape[1]] or np.linspace(
                    steps / values.shape[1] / 2, steps, values.shape[1]
                ).round(1)
                known = ~np.isnan(values).all(0)
                x, values = np.asarray(x)[known], values[:, known]
                axes.fill_between(x, np.nanmin(values, 0), np.nanmax(values, 0), color=colour, alpha=0.2, linewidth=0)
                axes.plot(x, np.nanmean(values, 0), color=colour, label=variant)
            axes.set(title=title, xlabel=found.get("xlabel", "step"), xscale="log" if found.get("log") else "linear")
            if len(of) == fullest:
                last = axes
        last.legend()
        figure.savefig(file, metadata={"Date": None})
