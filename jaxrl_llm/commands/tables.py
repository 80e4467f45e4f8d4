"""Tables on a terminal, or JSON with --json."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def show(options: argparse.Namespace, rows: Sequence[dict[str, Any]], title: str, *, spare: Sequence[str] = ()) -> None:
    """Print a table that fits the screen without breaking words, or JSON with --json.

    Args:
      options: of the command; `wide` prints all columns, each row on one line.
      rows: dictionaries with the same keys.
      title: printed above the table.
      spare: keys of columns that are left out, in this order, if the screen is too narrow.
    """
    if options.json:
        print(json.dumps(rows, indent=2, default=str))
        return
    console, wide = Console(), getattr(options, "wide", False)
    if not rows:
        console.print(Text(f"{title}: none"))
        return
    cells = [{key: plain(value) for key, value in row.items()} for row in rows]
    left_out = []
    for key in () if wide else spare:
        if sum(_longest_words(cells).values()) + 2 * len(cells[0]) > console.width:
            left_out.append(key)
            cells = [{name: value for name, value in row.items() if name != key} for row in cells]
    if wide:
        widths = {key: max(len(row[key]) for row in [*cells, {key: key}]) for key in cells[0]}
        console = Console(width=max(console.width, sum(widths.values()) + 2 * len(widths)))
    console.print(_table(cells, title, console.width))
    if left_out:
        console.print(Text(f"columns left out: {', '.join(left_out)} (--wide shows all)", style="dim"))


def _table(cells: Sequence[dict[str, str]], title: str, width: int) -> Table:
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for key, size in _widths(cells, width).items():
        table.add_column(key, width=size, overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row.values()))
    return table


def show_report(options: argparse.Namespace, report: dict[str, Any], title: str) -> None:
    """Print a table of names and values, or JSON with --json."""
    if options.json:
        print(json.dumps(report, indent=2))
        return
    show(options, [{"what": key, "value": value} for key, value in report.items()], title)


def show_columns(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Print a table that breaks words only at underscores, with fewer columns on a narrow screen."""
    console = Console()
    cells = [{key: plain(value) for key, value in row.items()} for row in rows]
    if console.width < 112:
        for row in cells:
            row["name"] = _cut(row["name"], 21)
            row["needs"] = " ".join(_cut(word, 24) for word in row["needs"].split(" "))
            row["certainty"] = row["certainty"].replace("reconstructed", "reconstr.")
            if number := row.pop("arxiv", ""):
                row["paper"] += f"\n{number}"
            if room := row.pop("room", ""):
                row["name"] += f"\n({room})"
    console.print(_table(cells, title, console.width))


def _cut(word: str, width: int) -> str:
    """A word in lines of this width, broken after underscores."""
    return (
        word if len(word) <= width - 2 else "\n".join(textwrap.wrap(word.replace("_", "_ "), width)).replace("_ ", "_")
    )


def plain(value: Any) -> str:
    """A value as text without brackets and quotes."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}={inner}" for key, inner in value.items())
    return str(value)


def _longest_words(cells: Sequence[dict[str, str]]) -> dict[str, int]:
    """Length of the longest word of each column."""
    keys = list(cells[0]) if cells else []
    return {key: max(len(word) for row in cells for word in [*row[key].split(), key]) for key in keys}


def _widths(cells: Sequence[dict[str, str]], total: int) -> dict[str, int]:
    """Widths of columns: at least the longest word; the remaining room goes to columns that need the least to fit.

    Where words of this length do not fit, such as paths, those of the widest columns are broken.
    """
    keys = list(cells[0]) if cells else []
    widths = _longest_words(cells)
    whole = {key: max(len(line) for row in cells for line in [*row[key].split("\n"), key]) for key in keys}
    left = total - sum(widths.values()) - 2 * len(keys)
    while left < 0 and max(widths.values()) > 1:
        widths[max(keys, key=widths.__getitem__)] -= 1
        left += 1
    for key in sorted(keys, key=lambda key: whole[key] - widths[key]):
        more = max(0, min(whole[key] - widths[key], left))
        widths[key] += more
        left -= more
    return widths
