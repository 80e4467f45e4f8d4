"""What the rooms hold: every public method with its paper, its certainty and what it needs, read from docstrings."""

from __future__ import annotations

import inspect
import re
from typing import Any

from jaxrl_llm import advantages, losses, rewards
from jaxrl_llm.training.score import HOST_NAMES
from jaxrl_llm.training.wiring import nearest, signature

ROOMS = {"reward": rewards, "advantage": advantages, "loss": losses}

# Helpers that methods are made of: public for researchers, but no entries of a recipe.
_NOT_METHODS = re.compile(
    r"^(group_(?!normalized)|aggregate$|row_weight$|checked_|extract_|answer_span$|moments$|present$|outcome_token|token_weights$|weighted_sum$)"
)


def methods() -> list[dict[str, Any]]:
    """One entry a public function of the rooms: name, room, summary, reference, arxiv, certainty, needs, where."""
    return [
        _entry(name, room, getattr(module, name))
        for room, module in ROOMS.items()
        for name in sorted(module.__all__)
        if inspect.isfunction(getattr(module, name)) and not _NOT_METHODS.match(name)
    ]


def described(name: str) -> dict[str, Any]:
    """One method with its whole docstring and its hyper-parameters.

    Raises:
      ValueError: for an unknown name, with the nearest known one.
    """
    for room, module in ROOMS.items():
        if name in module.__all__ and inspect.isfunction(getattr(module, name)):
            function = getattr(module, name)
            parameters = inspect.signature(function).parameters.values()
            hyper = {
                p.name: None if p.default is p.empty else p.default for p in parameters if p.kind is p.KEYWORD_ONLY
            }
            return _entry(name, room, function) | {"doc": inspect.getdoc(function) or "", "hyper_parameters": hyper}
    raise ValueError(f"there is no method {name!r}; {nearest(name, [entry['name'] for entry in methods()])}")


def _entry(name: str, room: str, function: Any) -> dict[str, Any]:
    doc = inspect.getdoc(function) or ""
    reference = re.search(r"^References?:\s*(.+?)(?:\n\s*\n|\Z|\nCertainty)", doc, re.M | re.S)
    certainty = re.search(r"^Certainty:\s*(\w+)", doc, re.M)
    text = " ".join(reference.group(1).split()) if reference else ""
    read = signature(function)
    return {
        "name": name,
        "room": room,
        "summary": " ".join(doc.split("\n\n")[0].split()),
        "reference": text,
        "arxiv": re.findall(r"\b\d{4}\.\d{4,5}\b", text),
        "certainty": certainty.group(1) if certainty else "",
        "needs": list(read.required),
        "where": "host" if HOST_NAMES & {*read.required, *read.optional} else "program",
    }
