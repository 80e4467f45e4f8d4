"""A model behind an HTTP endpoint, and one request to it with a deadline, retries, and errors that name a remedy.

Used for sampling engines (`rollout.engine`) and judges.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

# HTTP statuses that are retried: too many requests, and a server that is starting, restarting or overloaded.
_PASSING = frozenset({429, 500, 502, 503, 504})
_EXCERPT = 300


class EndpointError(ValueError):
    """An endpoint did not answer, or gave an unusable answer; the message names request, address and remedy."""


@dataclass(frozen=True)
class Endpoint:
    """Address of a served model, and settings of its requests.

    Attributes:
      url: root of the server, such as http://localhost:8000; a trailing /v1 is dropped.
      model: name of the model in requests.
      timeout_s: deadline of one request in seconds.
      concurrency: number of simultaneous requests.
      retries: further attempts after a failed connection or a temporary HTTP error.
      retry_wait_s: pause before the first retry in seconds; it doubles with each further one.
      api_key_variable: environment variable that holds the key; None sends none.
      request: further fields of every request, for server-specific options.
      where: name of the config section, for messages.
    """

    url: str
    model: str
    timeout_s: float = 600.0
    concurrency: int = 64
    retries: int = 3
    retry_wait_s: float = 0.5
    api_key_variable: str | None = None
    request: Mapping[str, Any] = field(default_factory=dict)
    where: str = "rollout.engine"

    def __post_init__(self):
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{self.where}.url is {self.url!r}; write its root, such as http://localhost:8000")
        for name, least in (("concurrency", 1), ("retries", 0), ("retry_wait_s", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{self.where}.{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.timeout_s > 0:
            raise ValueError(f"{self.where}.timeout_s is {self.timeout_s}; it must be above 0")
        if self.api_key_variable and self.api_key_variable not in os.environ:
            raise ValueError(
                f"{self.where}.api_key_variable is {self.api_key_variable!r}, which is not set in the environment; "
                "export it, or leave the field out"
            )

    def address(self, path: str) -> str:
        """The full URL of a path."""
        return f"{self.url.rstrip('/').removesuffix('/v1')}/{path.lstrip('/')}"


def answer(engine: Endpoint, path: str, body: Mapping[str, Any] | None = None, *, what: str) -> Any:
    """The JSON response to a POST of `body`, or to a GET without a body; None for an empty response.

    Raises:
      EndpointError: for no connection or a temporary HTTP error after all attempts, another HTTP error, no answer
        within `timeout_s`, or a response that is not JSON.
    """
    address, wait = engine.address(path), engine.retry_wait_s
    for attempt in range(engine.retries + 1):
        last = attempt == engine.retries
        try:
            status, content = _exchanged(engine, address, body)
        except TimeoutError:
            raise EndpointError(
                f"{address} did not answer {what} within {engine.timeout_s:g} s; raise {engine.where}.timeout_s, or "
                f"lower {engine.where}.concurrency if requests wait for each other"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            if last:
                raise EndpointError(
                    f"{address} could not be reached for {what} in {engine.retries + 1} attempts "
                    f"({type(error).__name__}: {error}); start it, or correct {engine.where}.url"
                ) from None
        else:
            if status == http.HTTPStatus.OK:
                return _json(engine, content, address, what)
            if last or status not in _PASSING:
                raise EndpointError(
                    f"{address} answered {what} with HTTP {status}: {content[:_EXCERPT].decode(errors='replace')!r}; "
                    f"{_remedy(engine, status)}"
                )
        time.sleep(wait)
        wait *= 2
    raise AssertionError("the last attempt returns or raises")


def _json(engine: Endpoint, content: bytes, address: str, what: str) -> Any:
    if not content.strip():
        return None
    try:
        return json.loads(content)
    except ValueError:
        raise EndpointError(
            f"{address} answered {what} with something other than JSON: "
            f"{content[:_EXCERPT].decode(errors='replace')!r}; check that "
            f"{engine.where}.url is the server's"
        ) from None


def _remedy(engine: Endpoint, status: int) -> str:
    if status in (401, 403):
        return f"set {engine.where}.api_key_variable"
    if status == 404:
        return f"check {engine.where}.model, and that the server was started with this address enabled"
    if status in _PASSING:
        return f"see the server's log; lower {engine.where}.concurrency if it is overloaded"
    return f"compare the requested sizes with the server's limits, and check {engine.where}.request"


def _exchanged(engine: Endpoint, address: str, body: Mapping[str, Any] | None) -> tuple[int, bytes]:
    """Status and content of one request; the deadline applies to the whole request, not to each read."""
    until = time.monotonic() + engine.timeout_s

    def remaining() -> float:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    parts = urlsplit(address)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=remaining())
    headers = {"Content-Type": "application/json"}
    if engine.api_key_variable:
        headers["Authorization"] = f"Bearer {os.environ[engine.api_key_variable]}"
    try:
        connection.connect()
        held: socket.socket = connection.sock  # the response may close the connection's own reference early
        held.settimeout(remaining())
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        content = None if body is None else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", target, content, headers)
        response, pieces = connection.getresponse(), []
        while not response.isclosed():
            held.settimeout(remaining())
            piece = response.read1(1 << 16)
            if not piece:
                break
            pieces.append(piece)
        return response.status, b"".join(pieces)
    finally:
        connection.close()


def require_model(engine: Endpoint) -> None:
    """Raise EndpointError unless the engine is reachable and serves the model."""
    listed = answer(engine, "/v1/models", what="the list of its models")
    entries = listed.get("data", []) if isinstance(listed, Mapping) else []
    names = [entry.get("id") for entry in entries if isinstance(entry, Mapping)]
    if engine.model not in names:
        raise EndpointError(
            f"{engine.where}.model is {engine.model!r}, but {engine.address('/v1/models')} serves "
            f"{', '.join(map(repr, names)) or 'no model'}; name one of them"
        )
