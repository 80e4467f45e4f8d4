"""A row of the table of metrics, and a panel of related rows."""

from __future__ import annotations

from typing import Any, NamedTuple

# What a metric is averaged over, as the table names it.
ROWS, TOKENS, GROUPS = "sampled rows", "trained tokens of sampled rows", "sampled groups"
UPDATES, OF_STEP, DRAWN = "updates of the step", "one value per step", "rows that the plan has sampled"
EPISODES, WITHIN = "episodes with a value", "rows with both values, minus the means of their groups"
OF_SOURCE, COUNTED, LARGEST = "sampled rows of the source", "tokens of the loss", "maximum over all tokens"
# Conditions under which a metric is not defined.
NO_ROW, NO_EPISODE = "the reward applies to no row of the step", "no episode of the step has a value"


class Metric(NamedTuple):
    """One row of the table.

    Attributes:
      name: name of the metric; parts in <angle brackets> depend on the run.
      unit: unit of the value; "" if it has none.
      over: what the value is averaged over.
      meaning: a short description.
      absent: condition under which the value is not defined. A step returns NaN for it, and the run leaves it out of
        the step's record; NaN of any other metric is an error.
      exact: whether the value is set or counted and not a noisy measurement, so that its curve is not smoothed.
    """

    name: str
    unit: str
    over: str
    meaning: str
    absent: str = ""
    exact: bool = False

    @property
    def pattern(self) -> str:
        """The name with * in place of each part that depends on the run."""
        head, *parts = self.name.split("<")
        return head + "".join("*" + part.partition(">")[2] for part in parts)


class Panel(NamedTuple):
    """A group of related metrics: a section of docs/metrics.md and the charts of the report that show it.

    Attributes:
      title: heading.
      metrics: rows of the table; in a chart returned by `panels`, names of metrics.
      text: description of the group.
      log: whether the axis of values is logarithmic.
      apart: whether each metric has its own chart, since their values cannot be compared.
      unit: unit of all metrics of a chart; set by `panels`.
    """

    title: str
    metrics: tuple[Any, ...]
    text: str
    log: bool = False
    apart: bool = False
    unit: str = ""
