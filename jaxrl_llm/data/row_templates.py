"""Texts and conditions from the columns of a row, in jinja2's sandbox: `{{ question }}` and `level|int < 3`.

A column that a row does not have is an error, not an empty text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from jaxrl_llm.bounds import shown
from jaxrl_llm.data.extras import imported


def is_template(text: str | None) -> bool:
    """Whether a text is a template, and not the name of a column.

    >>> is_template("{{ question }}"), is_template("question")
    (True, False)
    """
    return text is not None and ("{{" in text or "{%" in text)


def rendered(template: str, columns: Mapping[str, Any]) -> str:
    """A template rendered with the columns of a row.

    Raises:
      ValueError: for an invalid template, a missing column, or an operation that the sandbox forbids.

    >>> rendered("{{ a }} + {{ b }} = ?", {"a": 3, "b": 4})
    '3 + 4 = ?'
    """
    return _evaluated(_compiled(template, False).render, template, columns)


def column_value(columns: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or of a template of several columns.

    A name with dots is a path in nested objects, unless a column has exactly this name.

    Raises:
      ValueError: for a missing column, or as for `rendered`.

    >>> column_value({"a": {"b": 3}}, "a.b")
    3
    """
    if is_template(name):
        return rendered(name, columns)
    if name in columns:
        return columns[name]
    outer, dot, inner = name.partition(".")
    if dot and isinstance(columns.get(outer), Mapping):
        return column_value(columns[outer], inner)
    raise ValueError(f"there is no field {name!r}; its fields are {shown(sorted(map(str, columns)))}")


def holds(condition: str, columns: Mapping[str, Any]) -> bool:
    """Whether a condition, an expression of jinja2, is true for the columns of a row.

    Raises:
      ValueError: as for `rendered`.

    >>> holds("level|int < 3 and 'proof' not in question", {"level": "2", "question": "2+2?"})
    True
    """
    return bool(_evaluated(_compiled(condition, True), condition, columns))


def _evaluated(function: Callable[..., Any], text: str, columns: Mapping[str, Any]) -> Any:
    try:
        return function(dict(columns))
    except Exception as error:
        raise ValueError(
            f"{text[:80]!r} fails with {type(error).__name__}: {str(error)[:160]}; the columns are "
            f"{', '.join(sorted(map(str, columns)))[:300]}, and the cells of a CSV file are text (level|int)"
        ) from None


@functools.lru_cache(maxsize=1)
def _environment() -> Any:
    sandbox = imported("jinja2.sandbox")
    return sandbox.ImmutableSandboxedEnvironment(
        undefined=imported("jinja2").StrictUndefined, keep_trailing_newline=True
    )


@functools.lru_cache(maxsize=64)
def _compiled(text: str, expression: bool) -> Any:
    environment, jinja2 = _environment(), imported("jinja2")
    try:
        made = environment.compile_expression(text, False) if expression else environment.from_string(text)
    except jinja2.TemplateError as error:
        raise ValueError(f"{text[:80]!r} is not valid jinja2: {error}; repair it") from None
    return made
