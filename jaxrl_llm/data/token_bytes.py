"""The bytes of each token of a `tokenizers` vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import cache
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_MARK = "\u2581"


@cache
def _byte_alphabet() -> dict[str, int]:
    """Printable character -> byte, in byte-level tokenizers (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in shown}
    hidden = [byte for byte in range(256) if byte not in shown]
    return table | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


def token_bytes(backend: Any, size: int, *, silent: Collection[int] = ()) -> list[bytes | None]:
    """Bytes of each id below `size`; None for silent ids and ids without a token.

    Args:
      backend: a `tokenizers.Tokenizer`.
      size: number of ids.
      silent: ids without text.
    """
    described = json.loads(backend.to_str())
    added = {entry["id"] for entry in described.get("added_tokens") or []}
    byte_level = '"ByteLevel"' in json.dumps(described.get("decoder") or {})
    pieces: list[bytes | None] = []
    for number in range(size):
        token = None if number in silent else backend.id_to_token(number)
        if token is None:
            pieces.append(None)
        elif not byte_level and (found := _BYTE_TOKEN.fullmatch(token)):
            pieces.append(bytes([int(found[1], 16)]))
        elif number in added:
            pieces.append(token.encode())
        elif byte_level:
            pieces.append(bytes(_byte_alphabet()[character] for character in token))
        else:
            pieces.append(token.replace(_WORD_MARK, " ").encode())
    return pieces
