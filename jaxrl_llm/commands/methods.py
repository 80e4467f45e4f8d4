"""`jaxrl methods`: the shipped recipes and the functions that they are made of."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any

from rich.console import Console
from rich.text import Text

from jaxrl_llm import catalogue
from jaxrl_llm.commands.tables import plain, show_columns


def show_methods(options: argparse.Namespace) -> None:
    """One method whole, or those that the options choose."""
    functions = options.functions or options.room is not None
    chosen = {name: getattr(options, name) for name in ("stage", "needs", "paper", "arxiv")}
    given = [name for name, value in chosen.items() if value is not None]
    if options.name is not None and (given or options.certainty or options.room):
        raise ValueError(f"methods {options.name} shows one method; leave the filters out")
    if functions and given:
        raise ValueError(f"--{given[0]} chooses among recipes; leave out {'--room' if options.room else '--functions'}")
    if options.name is not None:
        recipe = not functions and catalogue.is_recipe(options.name)
        if recipe:
            entry = catalogue.described_recipe(options.name)
        else:
            entry = catalogue.described(options.name) | {"recipes": catalogue.recipes_with(options.name)}
        if options.json:
            print(json.dumps(entry, indent=2, default=str))
        elif recipe:
            _show_recipe(entry, also_function=options.name in {e["name"] for e in catalogue.methods()})
        else:
            _show_function(entry)
        return
    if functions:
        rows = [
            {key: entry[key] for key in ("name", "room", "reference", "needs", "certainty")}
            for entry in catalogue.methods()
            if options.room in (None, entry["room"]) and options.certainty in (None, entry["certainty"])
        ]
    else:
        chosen["need"] = chosen.pop("needs")
        rows = catalogue.selected(catalogue.recipes(), certainty=options.certainty, **chosen)
    if options.json:
        print(json.dumps(rows, indent=2))
    elif functions:
        show_columns(rows, "functions; jaxrl methods NAME shows one whole")
    else:
        keys = ("name", "paper", "arxiv", "stage", "needs", "certainty")
        rows = [{key: row[key] for key in keys} | {"needs": catalogue.shortened(row["needs"])} for row in rows]
        show_columns(rows, "recipes; jaxrl methods NAME shows one whole, jaxrl train NAME trains with it")


def _show_recipe(entry: dict[str, Any], *, also_function: bool) -> None:
    console = Console()
    console.print(Text(f"{entry['name']} (recipe)", style="bold"))
    address = f", https://arxiv.org/abs/{entry['arxiv']}" if entry["arxiv"] else ""
    console.print(Text(f"{entry['paper']}{address}"), soft_wrap=True)
    for key in ("stage", "certainty", "needs"):
        if entry[key]:
            console.print(Text(f"{key.capitalize()}: {plain(entry[key])}"), soft_wrap=True)
    for function, blocks in entry["formulas"].items():
        console.print(Text(f"\n{function}", style="bold"))
        console.print(Text("\n\n".join(textwrap.indent(block, "    ") for block in blocks)), soft_wrap=True)
    console.print(Text(f"\n{entry['path']}", style="bold"), soft_wrap=True)
    console.print(Text(entry["yaml"].rstrip()), soft_wrap=True)
    if also_function:
        console.print(Text(f"\nA function has this name too: jaxrl methods --functions {entry['name']}"))


def _show_function(entry: dict[str, Any]) -> None:
    console = Console()
    console.print(Text(f"{entry['name']} ({entry['room']})", style="bold"))
    console.print(Text(entry["doc"]), soft_wrap=True)
    hyper = {key: value for key, value in entry["hyper_parameters"].items() if value is not None}
    console.print(Text(f"\nRecipe entry:  {entry['name']}: {json.dumps(hyper, default=str)}"), soft_wrap=True)
    if entry["recipes"]:
        console.print(Text(f"Used by:  {', '.join(entry['recipes'])}"))
