"""Log-probabilities of a reference that stand in a file of judged rows, so that no step computes them.

"reference_logprobs": [[-0.2, -1.5, ...], ...]    one list for each completion of the row, one number a token
"reference_tokens": [1234567, ...]                a checksum of the token ids that they belong to
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.bounds import shown

NAME = "reference_logprobs"


class StoredReference(NamedTuple):
    """What a file holds of one completion."""

    logprobs: tuple[float, ...]
    checksum: int


def token_checksum(prompt: Sequence[int], completion: Sequence[int]) -> int:
    """A checksum of token ids, and of where the completion begins.

    >>> token_checksum([1, 2], [3]) == token_checksum([1], [2, 3])
    False
    """
    return zlib.crc32(np.array([len(prompt), *prompt, *completion], np.int32).tobytes())


def stored_references(record: Mapping[str, Any], count: int, where: str) -> list[StoredReference] | None:
    """What a row holds of each of its completions; None where it has no such column.

    Raises:
      ValueError: for another number of lists, or entries that are no finite numbers.
    """
    if record.get(NAME) is None:
        return None
    said: Any = record[NAME]
    sums: Any = record.get("reference_tokens")
    lists = isinstance(said, Sequence) and isinstance(sums, Sequence) and len(said) == len(sums) == count
    if not lists or not all(isinstance(one, Sequence) and not isinstance(one, str) for one in said):
        raise ValueError(
            f"{where} has {NAME} {shown(said)} and reference_tokens {shown(sums)}; there must be {count} of each, as "
            "jaxrl pairs --reference writes them"
        )
    for number in (number for one in said for number in one):
        if not isinstance(number, (int, float)) or not abs(number) < float("inf"):
            raise ValueError(f"{where} has {NAME} with {shown(number)}; each must be a finite number")
    return [StoredReference(tuple(one), int(key)) for one, key in zip(said, sums, strict=True)]


def reference_row(
    stored: StoredReference, prompt: Sequence[int], completion: Sequence[int], width: int, where: str
) -> np.ndarray:
    """The log-probabilities of a completion, padded with 0.

    Raises:
      ValueError: for log-probabilities of other tokens, as of another tokenizer, template or text.
    """
    if len(stored.logprobs) != len(completion) or stored.checksum != token_checksum(prompt, completion):
        raise ValueError(
            f"{where} has {NAME} of other tokens, such as those of another tokenizer or prompt format; write them "
            "again with jaxrl pairs --reference, or leave the column out"
        )
    row = np.zeros(width, np.float32)
    row[: len(completion)] = stored.logprobs
    return row
