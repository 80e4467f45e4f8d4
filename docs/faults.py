"""Writes the tables of docs/survival.md: one row for each test that is marked `fault(group, what, outcome)`.

The markers are read from the source of tests/, on a test or on one case of it, and their words are literals.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from blocks import markdown_table

SURVIVAL_PAGE = Path(__file__).parent / "survival.md"
TESTS = SURVIVAL_PAGE.parents[1] / "tests"
BLOCK = re.compile(r"(<!-- faults of (?P<group>\w+): written by docs/build.py -->\n).*?(<!-- end of faults -->)", re.S)


class Fault(NamedTuple):
    """A fault that a test brings about, and what becomes of the run; `file` has the test."""

    group: str
    what: str
    outcome: str
    file: str


def _marks(tree: ast.Module) -> Iterator[list[str]]:
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
            for call in (node for decorator in function.decorator_list for node in ast.walk(decorator)):
                if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "fault":
                    yield [ast.literal_eval(word) for word in call.args]


def faults() -> list[Fault]:
    """All that tests are marked with, in the order of files and lines.

    Raises:
      ValueError: for a marker without its three words.
    """
    found = []
    for path in sorted(TESTS.rglob("test_*.py")):
        source = path.read_text()
        if ".mark.fault(" not in source:
            continue
        for words in _marks(ast.parse(source)):
            if len(words) != 3:
                raise ValueError(f"{path}: fault{tuple(words)}; give a group, the fault and the result")
            found.append(Fault(*words, path.relative_to(TESTS.parent).as_posix()))
    return found


def survival_page() -> str:
    """docs/survival.md with its tables of faults as the tests have them.

    Raises:
      ValueError: for a group that the page has no table of, or a table without a row.
    """
    by_group: dict[str, list[list[str]]] = {}
    for fault in faults():
        by_group.setdefault(fault.group, []).append([fault.what, fault.outcome, f"`{fault.file}`"])
    page = SURVIVAL_PAGE.read_text()
    if (there := {block["group"] for block in BLOCK.finditer(page)}) != by_group.keys():
        raise ValueError(f"tables of docs/survival.md and groups of faults differ: {there ^ by_group.keys()}")

    def written(block: re.Match) -> str:
        table = markdown_table(["fault", "result", "test"], by_group[block["group"]])
        return f"{block[1]}\n{table}\n\n{block[3]}"

    return BLOCK.sub(written, page)
