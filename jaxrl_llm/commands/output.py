"""Standard output that may be closed by its reader: a run then continues without output."""

from __future__ import annotations

from typing import Any


class Lasting:
    """A stream whose `write` never fails, also when its reader has closed it or its disk is full."""

    def __init__(self, stream: Any):
        self.stream, self.closed_for_good = stream, stream is None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._quietly("write", text)
        return len(text)

    def flush(self) -> None:
        self._quietly("flush")

    def _quietly(self, name: str, *arguments: str) -> None:
        if not self.closed_for_good:
            try:
                getattr(self.stream, name)(*arguments)
            except (OSError, ValueError):
                self.closed_for_good = True


def unwrapped(stream: Any) -> Any:
    """The stream that a `Lasting` one wraps; any other stream itself."""
    return stream.stream if isinstance(stream, Lasting) else stream
