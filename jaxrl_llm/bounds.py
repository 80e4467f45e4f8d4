"""Limits on user input: regular files of limited size, JSON of limited depth, and shortened values in messages."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

LONGEST_SHOWN = 200
LONGEST_MESSAGE = 1500
MOST_LEVELS = 100
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes of a file system


def shown(value: Any, most: int = LONGEST_SHOWN) -> str:
    """`repr` for a message, at most about `most` characters long: the middle of a longer one is left out.

    >>> shown("a" * 10_000, 20)
    "'aaaaaaa...aaaaaaa' (10,002 characters)"
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; a deeply nested value
        text = f"a {type(value).__name__} that is too large to show"
    return shortened(text, most)


def shortened(text: str, most: int = LONGEST_MESSAGE) -> str:
    """The text; if it is longer than `most` characters, without its middle."""
    if len(text) <= most:
        return text
    kept = (most - 3) // 2
    return f"{text[:kept]}...{text[-kept:]} ({len(text):,} characters)"


def counted(number: int, noun: str) -> str:
    """A number with its noun, for messages.

    >>> counted(1, "line"), counted(1200, "line")
    ('1 line', '1,200 lines')
    """
    return f"{number:,} {noun}" + "s" * (number != 1)


def there_are(number: int, noun: str) -> str:
    """`counted` as a clause, for messages.

    >>> there_are(1, "device"), there_are(8, "device")
    ('there is 1 device', 'there are 8 devices')
    """
    return f"there {'is' if number == 1 else 'are'} {counted(number, noun)}"


def error_line(error: BaseException) -> str:
    r"""The type and the message of an error in one line of limited length.

    >>> error_line(ValueError("a\nb"))
    'ValueError: a b'
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def natural(text: str) -> int | None:
    """The integer of a text of up to 18 ASCII digits; None for any other text, including other Unicode digits.

    >>> natural("12"), natural("²"), natural("-1")
    (12, None, None)
    """
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def file_bytes(path: Path, most: int | None = None) -> bytes:
    """The content of a regular file; pipes and devices, which may never end, are refused.

    Raises:
      OSError: as `open` does.
      ValueError: for anything but a regular file, or a file of more than `most` bytes.
    """
    if "\0" in str(path):
        raise ValueError(f"{shown(str(path))} is not a path: it contains a NUL character")
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is a pipe, socket or device; give a regular file")
        if most is not None and status.st_size > most:
            raise ValueError(f"{path} has {status.st_size:,} bytes, but at most {most:,} are allowed for such a file")
        return file.read()


def parsed_json(text: bytes | str, *, most_levels: int = MOST_LEVELS, **hooks: Any) -> Any:
    """JSON in UTF-8, with or without a byte order mark.

    Args:
      text: the JSON.
      most_levels: largest nesting of lists and objects.
      hooks: as for `json.loads`.

    Raises:
      ValueError: for anything else, with a short message.
    """
    try:
        value = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text, **hooks)
    except UnicodeDecodeError as error:
        other = ", and looks like UTF-16" if text[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ValueError(f"byte {error.start} is not UTF-8{other}; save the text as UTF-8") from None
    except RecursionError:
        raise ValueError(f"it has more than {most_levels} levels of nesting") from None
    opening = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    if sum(text.count(one) for one in opening) > most_levels and _deeper(value, most_levels):  # type: ignore[arg-type]
        raise ValueError(f"it has more than {most_levels} levels of nesting")
    return value


def _deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    return levels == 0 or any(
        _deeper(one, levels - 1) for one in (value.values() if isinstance(value, dict) else value)
    )


def too_long_a_path(path: str) -> str | None:
    """Why a file system refuses a path for its length; None if it does not."""
    whole, longest = len(os.fsencode(path)), max(len(os.fsencode(name)) for name in path.split("/"))
    if whole <= _LONGEST_PATH and longest <= _LONGEST_NAME:
        return None
    return (
        f"{whole} bytes, of which one name has {longest}; a path has at most {_LONGEST_PATH}, and each name in it "
        f"{_LONGEST_NAME}"
    )
