"""Writes the generated pages of docs/: python docs/build.py. Tests hold that they are up to date.

docs/methods.md comes from docstrings and recipes; `gallery` has docs/gallery.md, `reference` has docs/fields.md,
docs/metrics.md, docs/formats.md and the tables of docs/engine.md and docs/models.md; `faults` has
those of docs/survival.md.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import api
import config_reference
import faults
import gallery
import reference
import yaml
from blocks import escaped, markdown, markdown_table

from jaxrl_llm import catalogue, shipped
from jaxrl_llm.config import read_tree

PAGE = Path(__file__).parent / "methods.md"
ROOM_TITLES = {
    "reward": "Rewards",
    "advantage": "Advantages",
    "selection": "Selection",
    "loss": "Losses",
    "schedule": "Schedules",
}

INTRODUCTION = """\
# Methods

Every published method that a recipe can name, written by `python docs/build.py` from the docstrings and from
`configs/methods/`; do not edit it. `jaxrl methods` shows the same in a terminal, and `jaxrl train NAME` trains with a
shipped recipe. A method is one function: its positional parameters are data that the step provides, its keyword-only
parameters are the hyper-parameters of a recipe's entry. [gallery.md](gallery.md) shows what each recipe moves.

**Certainty.** *verified*: the formula was read in running code or checked against it. *recalled*: from knowledge of
the paper, without code at hand. *reconstructed*: from abstracts and second-hand descriptions; the text says what may
differ.

**Notation.** `r` is a reward in formulas of advantages and an importance ratio in formulas of losses, `A` an advantage,
`pi` the current policy's probability of a token, `sg` the stop-gradient, `x` a loss of one token before averaging.
"""


def linked(text: str) -> str:
    """Escaped text whose arXiv numbers are links."""
    return re.sub(
        r"(?:arXiv )?\b(\d{4}\.\d{4,5})\b", r"[arXiv:\1](https://arxiv.org/abs/\1)", escaped(text).replace("arXiv ", "")
    )


def prose(paragraph: str, code: Collection[str]) -> str:
    """One paragraph of a docstring as Markdown."""
    if paragraph.startswith("    "):
        return markdown(textwrap.dedent(paragraph), code)
    if paragraph.startswith(">>>"):
        return f"```python\n{paragraph}\n```"
    return escaped(" ".join(paragraph.split()))


def method_section(entry: dict[str, Any], used: Sequence[dict[str, Any]]) -> str:
    """One function: what it is, its formulas, its reference, what it needs, and the recipes that name it."""
    described = catalogue.described(entry["name"])
    function = getattr(catalogue.ROOMS[entry["room"]], entry["name"])
    code = frozenset(inspect.signature(function).parameters) - gallery.GREEK
    parts = [f"#### {entry['name']}"]
    for paragraph in catalogue.paragraphs(described["doc"]):
        try:
            parts.append(prose(paragraph, code))
        except ValueError as error:
            raise ValueError(f"{entry['room']} {entry['name']}: {error}") from error
    facts = []
    if entry["reference"]:
        facts.append(f"Reference: {linked(entry['reference'])}")
    if entry["certainty"]:
        facts.append(f"Certainty: {entry['certainty']}")
    if entry["needs"]:
        facts.append(f"Reads: {', '.join(f'`{name}`' for name in entry['needs'])}")
    if engine := catalogue.needs([catalogue.built(function)]):
        facts.append(f"Needs: {', '.join(engine)}")
    by_entry: dict[str, list[str]] = {}
    for use in used:
        by_entry.setdefault(use["text"], []).append(recipe_link(use["recipe"]))
    facts += [f"Recipes: {', '.join(links)}: `{text}`" for text, links in by_entry.items()]
    return "\n\n".join([*parts, "\n".join(f"- {fact}" for fact in facts)]) if facts else "\n\n".join(parts)


@functools.cache
def recipe_files() -> dict[str, Path]:
    return {path.stem: path for path in shipped.method_files()}


def recipe_link(name: str) -> str:
    """A link to a recipe's file."""
    path = recipe_files()[name].relative_to(shipped.recipe_directory())
    return f"[{name}](../configs/methods/{path})"


def one_line(value: Any) -> str:
    """YAML of an entry in one line."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip().removesuffix("\n...")


def uses(recipes: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """For each function the recipes that name it, with the entry that does."""
    found: dict[str, list[dict[str, Any]]] = {}
    for recipe in recipes:
        for entry in own_entries(recipe["name"]):
            text = f"{entry['section']}: {one_line(entry['entry'])}"
            found.setdefault(entry["function"], []).append({"recipe": recipe["name"], "text": text})
    return found


@functools.cache
def own_entries(name: str) -> list[dict[str, Any]]:
    """A recipe's entries without those of the base that it extends, unless it has no others."""
    path = recipe_files()[name]
    return catalogue.entries(yaml.safe_load(path.read_text())) or catalogue.entries(read_tree(path))


def recipe_sections(recipes: Sequence[dict[str, Any]]) -> list[str]:
    """One table a stage."""
    parts = ["## Recipes"] if recipes else []
    known = {entry["name"] for entry in catalogue.methods()}
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for recipe in recipes:
        by_stage.setdefault(re.split(r" [+/] ", recipe["stage"])[0], []).append(recipe)
    for stage, members in sorted(by_stage.items()):
        rows = []
        for recipe in members:
            named = dict.fromkeys(entry["function"] for entry in own_entries(recipe["name"]))
            functions = [f"[{f}](#{f})" if f in known else f"`{f}`" for f in named]
            arxiv = f" {linked(recipe['arxiv'])}" if recipe["arxiv"] else ""
            also = f" ({escaped(recipe['stage'])})" if recipe["stage"] != stage else ""
            rows.append(
                [
                    recipe_link(recipe["name"]),
                    escaped(recipe["paper"]) + arxiv + also,
                    ", ".join(functions),
                    ", ".join(recipe["needs"]),
                    recipe["certainty"],
                ]
            )
        head = ["recipe", "paper", "functions", "needs", "certainty"]
        parts += [f"### {stage.capitalize() or 'Other'}", markdown_table(head, rows)]
    return parts


def page() -> str:
    """The whole of docs/methods.md."""
    recipes = catalogue.recipes()
    used = uses(recipes)
    parts = [INTRODUCTION.strip(), *recipe_sections(recipes)]
    entries = catalogue.methods()
    for room, title in ROOM_TITLES.items():
        parts.append(f"## {title}")
        by_module: dict[str, list[dict[str, Any]]] = {}
        for entry in entries:
            if entry["room"] == room:
                module = getattr(catalogue.ROOMS[room], entry["name"]).__module__
                by_module.setdefault(module, []).append(entry)
        for module, members in sorted(by_module.items()):
            about = (inspect.getdoc(importlib.import_module(module)) or "").split("\n\n")[0]
            family = ": ".join(module.split(".")[2:]).replace("_", " ").capitalize()
            parts.append(f"### {family}\n\n{prose(about, ())}")
            parts += [method_section(entry, used.get(entry["name"], [])) for entry in members]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Write the pages beside this file."""
    pages = {
        PAGE: page,
        reference.FIELDS_PAGE: reference.fields_page,
        reference.ENGINE_PAGE: reference.engine_page,
        reference.MODELS_PAGE: reference.models_page,
        reference.METRICS_PAGE: reference.metrics_page,
        reference.FORMATS_PAGE: reference.formats_page,
    }
    pages |= {config_reference.CONFIG_PAGE: config_reference.config_page, api.API_PAGE: api.api_page}
    pages |= {gallery.GALLERY_PAGE: gallery.gallery_page, faults.SURVIVAL_PAGE: faults.survival_page}
    written = {path: made() for path, made in pages.items()} | gallery.drawings()
    for path, text in written.items():
        path.write_text(text)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
