"""The display of a run: live on a terminal, otherwise single lines, and tables before and after.

`update` only stores floats, and a thread of rich redraws the terminal a few times per second, so training never waits.
"""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_ACCURACY = re.compile(r"(greedy|pass|maj|cons)(?:@(\d+|n))?")


class Column(NamedTuple):
    """One number of the display: the metric `name`, if it is present, with this label and format."""

    label: str
    name: str
    form: str


COLUMNS = (
    Column("reward", "reward", "{:.3f}"),
    Column("right", "correct_share", "{:.1%}"),
    Column("KL(ref)", "kl_reference_per_token", "{:.4f}"),
    Column("KL(update)", "kl_update", "{:.2e}"),
    Column("entropy", "entropy_per_token", "{:.3f}"),
    Column("length", "completion_tokens", "{:.1f}"),
    Column("no signal", "constant_group_share", "{:.0%}"),
    Column("loss", "loss", "{:+.4f}"),
)

# The rate is measured over the last minute, so that compilation and evaluations affect it only briefly.
RATE_WINDOW_SECONDS = 60.0


class Progress:
    """Display of one stage of a run. A context manager.

        with Progress(total=200, stage="grpo", sequences_per_step=64) as progress:
            progress.update(step, {"reward": 0.25, "loss": 0.1})

    On a terminal: a bar with step, rate and remaining time above the current metrics. Otherwise: one line every `every`
    steps, or every 10 seconds if that is None; the first and the last update always print a line.

    Args:
      total: last step of the stage; a resumed stage may start at a later step than 1.
      stage: its name.
      console: rich console; None for standard output.
      sequences_per_step: completions of one step, to compute tokens/s from the metric completion_tokens.
      every: steps between lines without a terminal; None for one line every 10 seconds.
      columns: the displayed metrics.
      clock: returns seconds.

    Raises:
      ValueError: total or every below 1.
    """

    def __init__(
        self,
        total: int,
        stage: str,
        console: Console | None = None,
        *,
        sequences_per_step: int | None = None,
        every: int | None = None,
        columns: tuple[Column, ...] = COLUMNS,
        clock: Callable[[], float] = time.monotonic,
    ):
        for name, value in (("total", total), ("every", every)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1 step.")
        self.total, self.stage, self.every, self.columns = total, stage, every, columns
        self.sequences_per_step = sequences_per_step
        self.console = console or Console()
        self._clock = clock
        self._started = clock()
        self._latest: tuple[int, Mapping[str, float]] | None = None
        self._window: deque[tuple[float, int]] = deque()
        self._printed: tuple[float, int] | None = None
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        self._started = self._clock()
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(console=self.console, get_renderable=self._display, refresh_per_second=4)
            self._live.start(refresh=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._latest is not None and (self._printed is None or self._printed[1] != self._latest[0]):
            self._print_line()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Set the current metrics; call it at most once per step.

        Args:
          step: completed steps of this stage.
          metrics: Python floats; converting a jax array would wait for the device.
        """
        now = self._clock()
        self._latest = (step, dict(metrics))
        # At most two entries per second, so that the window stays short for fast steps.
        if len(self._window) > 1 and now - self._window[-2][0] < 0.5:
            self._window.pop()
        self._window.append((now, step))
        while len(self._window) > 2 and now - self._window[1][0] > RATE_WINDOW_SECONDS:
            self._window.popleft()
        if self._live is None and self._due(now, step):
            self._print_line()

    def message(self, text: str) -> None:
        """Print a line above the display."""
        self.console.print(Text(text), soft_wrap=True)

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the accuracies of an evaluation on the validation split after a step; nothing if there are none."""
        named = {name.removeprefix("validation/"): value for name, value in metrics.items()}
        shown = sorted((_place(name), value) for name, value in named.items() if _ACCURACY.fullmatch(name))
        if shown:
            numbers = ", ".join(f"{name} {value:.1%}" for (*_, name), value in shown)
            self.message(f"{self.stage} {step}/{self.total}  validation: {numbers}")

    def steps_per_second(self) -> float | None:
        """Steps per second over the last minute; None before the second update."""
        if len(self._window) < 2:
            return None
        (began, first), (ended, last) = self._window[0], self._window[-1]
        return (last - first) / (ended - began) if ended > began and last > first else None

    def _due(self, now: float, step: int) -> bool:
        if self._printed is None or step >= self.total:
            return True
        printed_at, printed_step = self._printed
        return now - printed_at >= 10.0 if self.every is None else step - printed_step >= self.every

    def _print_line(self) -> None:
        step, metrics = self._latest or (0, {})
        self._printed = (self._clock(), step)
        parts = [f"{self.stage} {step}/{self.total}", *self._speed(step, metrics)]
        self.message("  ".join(parts + [f"{label} {value}" for label, value in self._values(metrics)]))

    def _speed(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        rate, tokens = self.steps_per_second(), metrics.get("completion_tokens")
        parts = [f"{_duration(self._clock() - self._started)} elapsed"]
        if rate is not None:
            parts.append(f"{_short(rate)} steps/s")
            if tokens is not None and self.sequences_per_step is not None:
                parts.append(f"{_short(rate * tokens * self.sequences_per_step)} tokens/s")
            parts.append(f"ETA {_duration(max(self.total - step, 0) / rate)}")
        return parts

    def _values(self, metrics: Mapping[str, float]) -> list[tuple[str, str]]:
        return [(c.label, c.form.format(metrics[c.name])) for c in self.columns if c.name in metrics]

    def _display(self) -> Group:
        # One read of the pair, since `update` may replace it while this runs in the thread of rich.
        step, metrics = self._latest or (0, {})
        head = Table.grid(padding=(0, 1), expand=True)
        for style, ratio in (("bold", None), (None, 1), (None, None)):
            head.add_column(style=style, ratio=ratio, no_wrap=True)
        head.add_row(self.stage, ProgressBar(total=self.total, completed=step), f"{step}/{self.total}")
        speed = Text("  ".join(self._speed(step, metrics)), style="dim")
        values = [Text.assemble((f"{label} ", "dim"), value) for label, value in self._values(metrics)]
        return Group(head, speed, Columns(values, padding=(0, 2)))


def results_table(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    """Table of an evaluation before and after training.

    Rows: greedy, pass@1, pass@k by k, maj@k by k, cons@n, then any others by name.

    Args:
      before: accuracies in [0, 1] by name ("greedy", "pass@4", "maj@8", ...), and counts by names that end in
        `_per_episode`; empty without an evaluation.
      after: the same after training.

    Returns:
      A rich table of percentages and counts; the change of a percentage is in percentage points, and missing values are
      dashes.
    """
    table = Table(title="evaluation")
    table.add_column("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in sorted({*before, *after}, key=_place):
        old, new = before.get(name), after.get(name)
        change, counted = Text("–"), name.endswith("_per_episode")
        digits = 2 if counted else 1
        if old is not None and new is not None:
            # Rounded first, so that a change that prints as 0.0 has no sign and no colour.
            points = round((new - old) * (1 if counted else 100), digits) + 0.0
            style = "" if counted or not points else "green" if points > 0 else "red"
            change = Text(f"{points:+.{digits}f}" if points else f"{0:.{digits}f}", style=style)
        form = "{:.2f}" if counted else "{:.1%}"
        table.add_row(Text(name), *("–" if value is None else form.format(value) for value in (old, new)), change)
    return table


def rewards_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Table of each reward at the start and at the end of training, and of what it adds to their sum.

    Args:
      rows: of `reward_summary.reward_rows`.
    """
    table = Table(title="rewards, means over the first and the last tenth of the steps")
    table.add_column("")
    for heading in ("weight", "first", "last", "adds, first", "adds, last"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        weight = "" if row["name"] is None else f"{row['weight']:g}"
        numbers = (row[key] for key in ("first", "last", "adds_first", "adds_last"))
        shown = ("–" if number is None else f"{number:.3f}" for number in numbers)
        table.add_row(Text("sum" if row["name"] is None else row["name"]), weight, *shown)
    return table


def samples_table(samples: Sequence[Mapping[str, Any]], step: int) -> Table:
    """Table of completions with their rewards: their sum, and each of several.

    Args:
      samples: as written to samples.jsonl.
      step: global step at which they were sampled.
    """
    table = Table(title=f"samples of step {step}", show_lines=True)
    for heading in ("prompt", "completion", "answer"):
        table.add_column(heading, overflow="fold", ratio=3 if heading == "completion" else 1)
    table.add_column("reward", justify="right", no_wrap=True)
    for sample in samples:
        shown = [Text(str(sample[name])) for name in ("prompt", "completion", "answer")]
        lines = [f"{float(sample['reward']):.3g}"] if "reward" in sample else []
        each = sample.get("rewards", {})
        if len(each) > 1:
            lines += [f"{name} {'–' if math.isnan(value) else f'{float(value):.3g}'}" for name, value in each.items()]
        table.add_row(*shown, Text("\n".join(lines)))
    return table


def units_table(rows: Iterable[tuple[str, int | float | str, str]]) -> Table:
    """Table of sizes that follow from a config, printed when a run starts.

    Args:
      rows: (name, value, derivation of the value), for example
        ("sequences_per_step", 64, "prompts_per_step 8 x samples_per_prompt 8").

    Returns:
      A rich table; whole numbers have thousands separators.
    """
    table = Table(title="units", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for name, value, meaning in rows:
        # bool is a subclass of int.
        number = isinstance(value, int) and not isinstance(value, bool)
        table.add_row(Text(name), f"{value:,}" if number else str(value), Text(meaning))
    return table


def _place(name: str) -> tuple[int, int, str]:
    kinds = ("greedy", "pass", "maj", "cons")
    match = _ACCURACY.fullmatch(name)
    if match is None:
        return len(kinds), 0, name
    k = match.group(2) or "0"
    return kinds.index(match.group(1)), 0 if k == "n" else int(k), name


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.3g}"
