"""`jaxrl methods`: the shipped recipes and their functions."""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from jaxrl_llm.commands.tables import plain, show_columns
from jaxrl_llm.shipped import kept, nearest


def show_methods(options: argparse.Namespace) -> None:
    """Print one method in full, or the list that the options select."""
    functions = options.functions or options.room is not None
    chosen = {name: getattr(options, name) for name in ("stage", "needs", "paper", "arxiv")}
    given = [name for name, value in chosen.items() if value is not None]
    if options.name is not None and (given or options.certainty or options.room):
        raise ValueError(f"methods {options.name} shows one method; leave out the filters")
    if functions and given:
        raise ValueError(f"--{given[0]} chooses among recipes; leave out {'--room' if options.room else '--functions'}")
    if options.name is not None:
        known = kept("methods", _methods)
        recipe = not functions and options.name in (entry["name"] for entry in known["recipes"])
        if options.name not in (names := {entry["name"] for part in ("recipes", "functions") for entry in known[part]}):
            raise ValueError(f"there is no method {options.name!r}; {nearest(options.name, names)}")
        entry = kept(f"method {options.name} {recipe}", lambda: _described(options.name, recipe=recipe))
        if options.json:
            print(json.dumps(entry, indent=2))
        elif recipe:
            _show_recipe(entry, also_function=options.name in (entry["name"] for entry in known["functions"]))
        else:
            _show_function(entry)
        return
    if functions:
        rows = [
            {key: entry[key] for key in ("name", "room", "reference", "needs", "certainty")}
            for entry in kept("methods", _methods)["functions"]
            if options.room in (None, entry["room"]) and options.certainty in (None, entry["certainty"])
        ]
    else:
        chosen["need"] = chosen.pop("needs")
        known = kept("methods", _methods)
        rows = selected(known["recipes"], known["needs"], certainty=options.certainty, **chosen)
    if options.json:
        print(json.dumps(rows, indent=2))
    elif functions:
        show_columns(rows, "functions; jaxrl methods NAME shows one in full")
    else:
        keys = ("name", "paper", "arxiv", "stage", "needs", "certainty")
        rows = [{key: row[key] for key in keys} | {"needs": _shortened(row["needs"])} for row in rows]
        show_columns(rows, "recipes; jaxrl methods NAME shows one in full, jaxrl train NAME trains with it")


def selected(
    found: Sequence[dict[str, Any]],
    needs: Sequence[str],
    *,
    stage: str | None = None,
    certainty: str | None = None,
    need: str | None = None,
    paper: str | None = None,
    arxiv: str | None = None,
) -> list[dict[str, Any]]:
    """The recipes that match every given word: certainty exactly, the others as a case-insensitive part of the text;
    `needs` are all known needs.

    Raises:
      ValueError: for a need or a stage that no recipe has, with the nearest.
    """
    for what, word, known in (
        ("need", need, needs),
        ("stage", stage, sorted({entry["stage"] for entry in found})),
    ):
        if word is not None and not any(word.lower() in one.lower() for one in known):
            raise ValueError(f"no recipe has the {what} {word!r}; {nearest(word, known)}")

    def holds(word: str | None, text: str) -> bool:
        return word is None or word.lower() in text.lower()

    return [
        entry
        for entry in found
        if holds(stage, entry["stage"])
        and certainty in (None, entry["certainty"])
        and (need is None or any(holds(need, one) for one in entry["needs"]))
        and holds(paper, entry["paper"])
        and holds(arxiv, entry["arxiv"])
    ]


def _methods() -> dict[str, Any]:
    from jaxrl_llm import catalogue  # slow import of all methods and jax: the lists are cached

    return {"recipes": catalogue.recipes(), "functions": catalogue.methods(), "needs": catalogue.EVERY_NEED}


def _described(name: str, *, recipe: bool) -> dict[str, Any]:
    from jaxrl_llm import catalogue

    if recipe:
        return catalogue.described_recipe(name)
    return catalogue.described(name) | {"recipes": catalogue.recipes_with(name)}


def _shortened(needs: Sequence[str]) -> list[str]:
    """Abbreviated needs, for tables.

    >>> _shortened(["value model", "demonstrations", "memory"])
    ['value', 'demos', 'memory']
    """
    words = {
        "reference": "ref",
        "vocabulary": "vocab",
        "token reward model": "token reward",
        "meta-gradient": "meta",
        "demonstrations": "demos",
        "stored distributions": "top tokens",
    }
    ends = " (model|states|answers|samples?|scores)$"
    return [*dict.fromkeys(words.get(need) or re.sub(ends, "", need) for need in needs)]


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
        console.print(Text(f"\nA function has the same name: jaxrl methods --functions {entry['name']}"))


def _show_function(entry: dict[str, Any]) -> None:
    console = Console()
    console.print(Text(f"{entry['name']} ({entry['room']})", style="bold"))
    console.print(Text(entry["doc"]), soft_wrap=True)
    hyper = {key: value for key, value in entry["hyper_parameters"].items() if value is not None}
    console.print(Text(f"\nRecipe entry:  {entry['name']}: {json.dumps(hyper, default=str)}"), soft_wrap=True)
    if entry["recipes"]:
        console.print(Text(f"Used by:  {', '.join(entry['recipes'])}"))
