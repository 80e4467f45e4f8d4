"""Bounds on what others wrote: regular files of a bounded size, JSON of a bounded depth, and values cut in messages."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST_SHOWN = 200
LONGEST_MESSAGE = 1500


def shown(value: Any, most: int = LONGEST_SHOWN) -> str:
    """`repr` for a message, at most about `most` characters long: the middle of a longer one is left out.

    >>> shown("a" * 10_000, 20)
    "'aaaaaaa...aaaaaaa' (10,002 characters)"
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; a value that holds itself too deeply
        text = f"a {type(value).__name__} that is too large to be shown"
    return shortened(text, most)


def shortened(text: str, most: int = LONGEST_MESSAGE) -> str:
    """The text, without its middle where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    kept = (most - 3) // 2
    return f"{text[:kept]}...{text[-kept:]} ({len(text):,} characters)"


def file_bytes(path: Path, most: int) -> bytes:
    """What a regular file holds; a pipe or a device, which may never end, is not read.

    Raises:
      OSError: as `open` does.
      ValueError: for what is no regular file, or one of more than `most` bytes.
    """
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(21, "it is a directory", str(path))
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is no regular file, but a pipe, socket or device; give a file")
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} holds {status.st_size:,} bytes, more than the {most:,} that are read of such a file")
    return content


def parsed_json(text: bytes | str, **hooks: Callable[..., Any]) -> Any:
    """JSON in UTF-8, with or without a byte order mark; `hooks` as for `json.loads`.

    Raises:
      ValueError: for anything else, deep nesting included, in a short sentence.
    """
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text, **hooks)
    except UnicodeDecodeError as error:
        utf16 = " (it looks like UTF-16)" if text[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ValueError(f"byte {error.start} is no UTF-8{utf16}; save the text as UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
