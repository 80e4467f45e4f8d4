"""JSON files of users and models: one object, or many elements, numbered by line for messages."""

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
    """The object in a JSON file; empty if the file does not exist.

    Raises:
      ValueError: if the file is not JSON, or not an object.
    """
    try:
        value = parsed_json(file_bytes(file, _MOST_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}; copy the model's files again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} has a {type(value).__name__}, not an object; copy the model's files again")
    return value


def json_objects(file: Path, flag: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(location for messages, object) of every line of a JSONL file, or of every element of a JSON list.

    Args:
      file: the file.
      flag: the option with the path, for messages.

    Raises:
      ValueError: for a file that cannot be read, is empty, or has elements that are not objects.
    """
    content = contents(file, flag)
    objects = []
    for number, element in elements(file, content):
        where = f"{file}, {place(content)} {number}"
        if isinstance(element, ValueError):
            raise ValueError(f"{where} is not JSON: {element}")
        if not isinstance(element, Mapping):
            raise ValueError(f"{where} has a {type(element).__name__}, not an object")
        objects.append((where, element))
    if not objects:
        raise ValueError(f"{file} has no lines; write one object per line")
    return objects


def contents(file: Path, called: str) -> bytes:
    """The bytes of a data file.

    Args:
      file: its path; `~` is the home directory.
      called: its name in messages.

    Raises:
      ValueError: for a file that cannot be read.
    """
    try:
        return file_bytes(file.expanduser())
    except OSError as error:
        raise ValueError(
            f"{called} {file} cannot be read: {error.strerror}; give the path of a readable file"
        ) from None
    except (ValueError, RuntimeError) as error:  # not a regular file, or no home directory
        raise ValueError(f"{called} cannot be read: {error}; give the path of a readable file") from None


def elements(file: Path, content: bytes) -> Iterator[tuple[int, Any]]:
    """The elements of a JSONL file, or of a JSON file with one list, numbered from 1; blank lines are skipped.

    Args:
      file: path for messages.
      content: bytes of the file.

    Yields:
      Number and value; for a line that is not JSON the value is a `ValueError` with the reason.

    Raises:
      ValueError: for a list that is not JSON, or text in UTF-16.
    """
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"data file {file} is not text in UTF-8 (it looks like UTF-16); save it as UTF-8")
    if _is_list(content):
        try:
            values = _parsed(content)
        except ValueError as error:
            raise ValueError(
                f"data file {file} is not JSON: {error}; repair it, or write one object per line"
            ) from error
        yield from enumerate(values, start=1)
        return
    # Lines end only at newlines: other line separators of Unicode may occur inside texts.
    bad, good = 0, False
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            value = _parsed_or_error(line)
            good, bad = good or not isinstance(value, ValueError), bad + 1
            if not good and bad == _MOST_BAD:
                raise ValueError(f"data file {file} is not JSONL: none of its first {bad} lines is JSON: {value}")
            yield number, value


def place(content: bytes) -> str:
    """The word for the numbers of `elements` in messages: "line", or "element" for a list."""
    return "element" if _is_list(content) else "line"


def _is_list(content: bytes) -> bool:
    return content.removeprefix(_BYTE_ORDER_MARK).lstrip()[:1] == b"["


def _parsed_or_error(text: bytes) -> Any:
    try:
        return _parsed(text)
    except ValueError as error:
        return ValueError(str(error))  # without a traceback, which would keep its frames in memory


def _parsed(text: bytes) -> Any:
    value = parsed_json(text, parse_constant=_refused, parse_float=_finite, object_pairs_hook=_object)
    if b"\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = str(error.object)[error.start]
            raise ValueError(f"it has {half!r}, half of a surrogate pair, which is not a character") from None
    return value


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{shown(text, 40)} is too large for a number of 64 bits")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {shown(next(name for name in names if names.count(name) > 1))} occurs twice in it")
    return made
