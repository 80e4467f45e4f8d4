"""Tables on a terminal, or JSON where it was asked for."""

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


def show(options: argparse.Namespace, rows: Sequence[dict[str, Any]], title: str) -> None:
    """A table, or JSON where it was asked for."""
    if options.json:
        print(json.dumps(rows, indent=2, default=str))
        return
    table = Table(title=Text(title), title_justify="left")
    for name in rows[0] if rows else ():
        # A name is for copying, so it is never broken.
        table.add_column(name, overflow="fold", no_wrap=name == "name")
    for row in rows:
        table.add_row(*(Text(plain(value)) for value in row.values()))
    Console().print(table)


def show_report(options: argparse.Namespace, report: dict[str, Any], title: str) -> None:
    """A table of names and values, or JSON where it was asked for."""
    if options.json:
        print(json.dumps(report, indent=2))
        return
    show(options, [{"what": key, "value": value} for key, value in report.items()], title)


def show_columns(rows: Sequence[dict[str, Any]], title: str) -> None:
    """A table in which no word is broken but at an underscore, and with fewer columns on a narrow screen."""
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
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for key, width in _widths(cells, console.width).items():
        table.add_column(key, width=width, overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row.values()))
    console.print(table)


def _cut(word: str, width: int) -> str:
    """A word in lines of this width, cut behind underscores."""
    return (
        word if len(word) <= width - 2 else "\n".join(textwrap.wrap(word.replace("_", "_ "), width)).replace("_ ", "_")
    )


def plain(value: Any) -> str:
    """A value without brackets and quotes."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}={inner}" for key, inner in value.items())
    return str(value)


def _widths(cells: Sequence[dict[str, str]], total: int) -> dict[str, int]:
    """Each column as wide as its longest word, and what is left to those that need the least to fit whole."""
    keys = list(cells[0]) if cells else []
    widths = {key: max(len(word) for row in cells for word in [*row[key].split(), key]) for key in keys}
    whole = {key: max(len(line) for row in cells for line in [*row[key].split("\n"), key]) for key in keys}
    left = total - sum(widths.values()) - 2 * len(keys)
    for key in sorted(keys, key=lambda key: whole[key] - widths[key]):
        more = max(0, min(whole[key] - widths[key], left))
        widths[key] += more
        left -= more
    return widths
