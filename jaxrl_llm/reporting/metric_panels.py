"""The charts of a run: its metrics by panel of the table and by unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxrl_llm.reporting.metric_table import PANELS, Panel, described

# Settings of an evaluation, which are no curves.
CONSTANT = ("validation/problems", "validation/samples_per_problem")


def panels(names: Sequence[str]) -> list[Panel]:
    """The charts of numbers that there are, in the order of the table: one for each unit, so that an axis has one.

    Numbers that are not in the table stand alone.
    """
    rows = {name: described(name) for name in names}

    def drawn() -> Iterator[Panel]:
        for panel in PANELS:
            by_unit: dict[tuple[str, str], list[str]] = {}
            for metric in panel.metrics:
                for name in (name for name, row in rows.items() if row is metric and name not in CONSTANT):
                    by_unit.setdefault((metric.unit, name if panel.apart else ""), []).append(name)
            for (unit, name), own in by_unit.items():
                title = name or (f"{panel.title}: {unit}" if unit and len(by_unit) > 1 else panel.title)
                yield panel._replace(title=title, metrics=tuple(own), unit=unit)

    return [*drawn(), *(Panel(name, (name,), "") for name, row in rows.items() if row is None)]
