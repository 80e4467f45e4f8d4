"""The rooms of the house: imports point one way, a file name stands for one idea, modules and functions stay short.

Every table of exceptions may only shrink: what no longer needs its entry fails the test until the entry is gone.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import jaxrl_llm

PACKAGE = Path(jaxrl_llm.__file__).parent
MOST_LINES = 400  # of a module
MOST_CODE = 80  # lines of a function without blanks, comments and docstrings

ARITHMETIC = ("advantages", "losses", "rewards", "schedules", "selection")
FIELDS = {"experience", "fields", "network_names", "rows", "signatures", "terms"}
METHODS = {*FIELDS, "bounds", "ranges", "statistics", "token_codes", *ARITHMETIC}
# What each room may import; its own modules always. In the order of the flow: nobody imports what stands below.
MAY_IMPORT: dict[str, set[str]] = {
    "bounds": set(),
    "experience": set(),
    "shipped": {"bounds"},
    "network_names": set(),
    "fields": {"experience", "network_names", "shipped"},
    "signatures": {"experience", "fields"},
    "terms": {"experience", "fields", "network_names", "ranges", "signatures"},
    "rows": {"experience", "fields"},
    "ranges": {"bounds"},
    "statistics": set(),
    "token_codes": set(),
    "yaml_text": {"bounds"},
    "compilation_cache": set(),
    "endpoints": set(),
    "allocator": set(),
    "addresses": set(),
    "parallel": {"bounds"},
    "sandbox": set(),
    **{room: {"experience", "ranges", "statistics", "token_codes"} for room in ARITHMETIC},
    "rewards": {"endpoints", "experience", "ranges", "sandbox", "statistics", "token_codes"},
    "data": {"bounds", "experience", "ranges", "sandbox"},
    "models": {"bounds", "experience", "parallel", "ranges"},
    "hub": {"data", "models"},
    "rollout": {
        *FIELDS,
        "bounds",
        "data",
        "endpoints",
        "models",
        "parallel",
        "ranges",
        "rewards",
        "sandbox",
        "selection",
        "token_codes",
    },
    "evaluation": {
        *FIELDS,
        "bounds",
        "ranges",
        "yaml_text",
        "data",
        "models",
        "parallel",
        "rewards",
        "rollout",
        "sandbox",
    },
    "reporting": {"addresses", "bounds", "compilation_cache", "evaluation"},
    "config": {"addresses", "bounds", "yaml_text", "models", "parallel", "ranges", "rollout", "shipped"},
    "training": {*METHODS, "data", "models", "parallel", "rollout"},
    "run": {
        *METHODS,
        "addresses",
        "config",
        "data",
        "endpoints",
        "evaluation",
        "hub",
        "models",
        "parallel",
        "reporting",
        "rollout",
        "training",
    },
    "planning": {*METHODS, "config", "models", "parallel", "rollout", "run", "training"},
    "catalogue": {*METHODS, "config", "data", "run", "shipped", "training"},
}
ENTRANCES = {"cli", "commands", "__main__"}  # import everything, and only each other imports them

# (module, room that it imports): why.
OTHER_IMPORTS = {
    ("rewards.verifiers.latex_answers", "data"): "reads text on the host, with the grammar of final answers",
    ("rewards.verifiers.numbers", "data"): "reads text on the host, with the grammar of final answers",
    ("rewards.verifiers.text_answers", "data"): "reads text on the host, with the grammar of the task",
    ("rewards.verifiers.text_formats", "data"): "reads text on the host, between tags",
    ("rewards.verifiers.text_similarity", "data"): "reads text on the host, with the grammar of final answers",
    ("rewards.verifiers.tool_calls", "data"): "reads text on the host, between tags",
}
# What is longer, and how long it may be.
LONG_MODULES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}


@cache
def module_names() -> tuple[str, ...]:
    """The dotted names below the package of its modules."""
    return tuple(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in sorted(PACKAGE.rglob("*.py")))


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name below the package."""
    return {name: ast.parse(text(name)) for name in module_names()}


def text(name: str) -> str:
    return PACKAGE.joinpath(*name.split(".")).with_suffix(".py").read_text()


def room_of(name: str) -> str:
    return name.split(".")[0]


def imported_rooms(name: str, *, late: bool = True) -> set[str]:
    """Rooms that a module imports; with `late` also within functions, and never for the type checker alone."""

    def of(node: ast.AST) -> set[str]:
        found = set()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not late:
                continue
            if isinstance(child, ast.Import):
                found |= {alias.name for alias in child.names}
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name} has a relative import; write the whole name"
                found |= {f"{child.module}.{alias.name}" for alias in child.names}
            else:
                found |= of(child)
        return found

    parts = [whole.split(".") for whole in of(modules()[name])]
    return {part[1] for part in parts if part[0] == "jaxrl_llm" and len(part) > 1} - {room_of(name), "__version__"}


def inner(name: str) -> bool:
    return name != "__init__" and room_of(name) not in ENTRANCES


@pytest.mark.parametrize("name", [name for name in module_names() if inner(name)])
def test_imports_point_one_way(name):
    room = room_of(name)
    assert room in MAY_IMPORT, f"{room} is a new room; say in MAY_IMPORT what it may import"
    wrong = {other for other in imported_rooms(name) - MAY_IMPORT[room] if (name, other) not in OTHER_IMPORTS}
    assert not wrong, f"{name} imports {', '.join(sorted(wrong))}; {room} may import {sorted(MAY_IMPORT[room])}"


def test_every_exception_to_the_direction_is_needed():
    needed = {
        (name, other)
        for name in modules()
        if inner(name)
        for other in imported_rooms(name) - MAY_IMPORT.get(room_of(name), set())
    }
    assert set(OTHER_IMPORTS) <= needed, "an import was mended; take it out of OTHER_IMPORTS"


def test_no_room_imports_what_imports_it():
    below = {room: set() for room in map(room_of, modules())}
    for name in modules():
        if name != "__init__":
            below[room_of(name)] |= imported_rooms(name, late=False) & set(below)

    def reached(room: str, seen: set[str]) -> set[str]:
        for other in below[room] - seen:
            seen |= {other}
            reached(other, seen)
        return seen

    circles = {room for room in below if room in reached(room, set())}
    assert not circles, f"these rooms import each other in a circle: {', '.join(sorted(circles))}"


def test_importing_the_package_imports_no_room():
    assert imported_rooms("__init__", late=False) == set()


def test_a_file_name_stands_for_one_idea():
    counts = Counter(name.split(".")[-1] for name in modules())
    twice = {name for name, count in counts.items() if count > 1} - {"__init__"}
    assert not twice, [name for name in modules() if name.split(".")[-1] in twice]


def test_no_name_of_a_face_hides_a_module():
    found = set()
    for name, tree in modules().items():
        if name.split(".")[-1] != "__init__":
            continue
        folder = name.removesuffix("__init__")
        siblings = {other.removeprefix(folder).split(".")[0] for other in modules() if other.startswith(folder)}
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.module != f"jaxrl_llm.{folder}".rstrip("."):
                found |= {folder + (alias.asname or alias.name) for alias in node.names} & {
                    folder + sibling for sibling in siblings
                }
    assert not found, "from jaxrl_llm.room import name would be the function, and its module could not be imported"


def test_modules_are_short():
    lines = {name: len(text(name).splitlines()) for name in modules()}
    too_long = {name for name, count in lines.items() if count > MOST_LINES}
    assert too_long <= LONG_MODULES.keys(), f"over {MOST_LINES} lines: {sorted(too_long - LONG_MODULES.keys())}"
    assert LONG_MODULES.keys() <= too_long, f"short now: {sorted(LONG_MODULES.keys() - too_long)}"
    grown = {name: lines[name] for name, most in LONG_MODULES.items() if lines[name] > most}
    assert not grown, f"an exception may only shrink: {grown}"


def test_functions_are_short():
    lengths = {}
    for name, tree in modules().items():
        code = lines_of_code(tree, text(name))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = len(code & set(range(node.lineno, node.end_lineno + 1)))
                lengths[f"{name}.{node.name}"] = max(count, lengths.get(f"{name}.{node.name}", 0))
    too_long = {name for name, count in lengths.items() if count > MOST_CODE}
    assert too_long <= LONG_FUNCTIONS.keys(), f"over {MOST_CODE} lines: {sorted(too_long - LONG_FUNCTIONS.keys())}"
    assert LONG_FUNCTIONS.keys() <= too_long, f"short now: {sorted(LONG_FUNCTIONS.keys() - too_long)}"
    grown = {name: lengths[name] for name, most in LONG_FUNCTIONS.items() if lengths[name] > most}
    assert not grown, f"an exception may only shrink: {grown}"


def lines_of_code(tree: ast.Module, source: str) -> set[int]:
    """Numbers of the lines that hold code: no blanks, comments and docstrings."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            found |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            found -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found
