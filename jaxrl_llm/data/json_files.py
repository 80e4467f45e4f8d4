"""JSON from files that others wrote: an object, or many elements numbered as an editor numbers them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from jaxrl_llm.bounds import file_bytes, parsed_json, shown

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MOST_BYTES = 2**26  # of a file of settings
_MOST_BAD = 20  # lines before the first good one


def json_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object; empty where there is no file.

    Raises:
      ValueError: if the file is no JSON, or holds something else.
    """
    try:
        value = parsed_json(file_bytes(file, _MOST_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}; copy the model's files again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}, not an object; copy the model's files again")
    return value


def json_objects(file: Path, flag: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(where it stands, object) of every line of a JSONL file, or of every element of a JSON list.

    Args:
      file: the file.
      flag: the option that named it, for messages.

    Raises:
      ValueError: for a file that cannot be read, holds nothing, or holds something else.
    """
    content = contents(file, flag)
    objects = []
    for number, element in elements(file, content):
        where = f"{file}, {place(content)} {number}"
        if isinstance(element, ValueError):
            raise ValueError(f"{where} is no JSON: {element}")
        if not isinstance(element, Mapping):
            raise ValueError(f"{where} holds a {type(element).__name__}, not an object")
        objects.append((where, element))
    if not objects:
        raise ValueError(f"{file} holds no line; give one object a line")
    return objects


def contents(file: Path, called: str) -> bytes:
    """What a file of data holds.

    Args:
      file: its path; `~` is the home directory.
      called: what it is called in messages.

    Raises:
      ValueError: for a file that cannot be read.
    """
    try:
        return file_bytes(file.expanduser())
    except OSError as error:
        raise ValueError(f"{called} {file} cannot be read: {error.strerror}; give the path of a JSONL file") from None
    except (ValueError, RuntimeError) as error:  # no regular file; no home directory
        raise ValueError(f"{called} cannot be read: {error}; give the path of a JSONL file") from None


def elements(file: Path, content: bytes) -> Iterator[tuple[int, Any]]:
    """The elements of a JSONL file, or of a JSON file that is one list, numbered from 1; blank lines are passed over.

    Args:
      file: named in messages.
      content: what the file holds.

    Yields:
      Number and value; the value of a line that is no JSON is the `ValueError` that says why.

    Raises:
      ValueError: for a list that is no JSON, or text in UTF-16.
    """
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"data file {file} is no text in UTF-8, and looks like UTF-16; save it as UTF-8")
    if _is_list(content):
        try:
            values = _parsed(content)
        except ValueError as error:
            raise ValueError(f"data file {file} is no JSON: {error}; repair it, or write one object a line") from error
        yield from enumerate(values, start=1)
        return
    # At newlines only: other line separators of Unicode may stand inside of a text.
    bad, good = 0, False
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            value = _parsed_or_error(line)
            good, bad = good or not isinstance(value, ValueError), bad + 1
            if not good and bad == _MOST_BAD:
                raise ValueError(f"data file {file} is no JSONL: none of its first {bad} lines is JSON: {value}")
            yield number, value


def place(content: bytes) -> str:
    """What `elements` numbers in a file: lines, or elements of a list."""
    return "element" if _is_list(content) else "line"


def _is_list(content: bytes) -> bool:
    return content.removeprefix(_BYTE_ORDER_MARK).lstrip()[:1] == b"["


def _parsed_or_error(text: bytes) -> Any:
    try:
        return _parsed(text)
    except ValueError as error:
        return ValueError(str(error))  # a new one, which keeps no frames alive: there may be a million


def _parsed(text: bytes) -> Any:
    value = parsed_json(text, parse_constant=_refused, parse_float=_finite, object_pairs_hook=_object)
    if b"\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = str(error.object)[error.start]
            raise ValueError(f"it holds {half!r}, half of a surrogate pair, which is no character") from None
    return value


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{shown(text, 40)} is beyond every number of 64 bits")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {shown(next(name for name in names if names.count(name) > 1))} stands twice in it")
    return made
