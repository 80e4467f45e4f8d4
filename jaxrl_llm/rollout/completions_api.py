"""One request to an OpenAI-compatible engine (vLLM, SGLang): token ids in, token ids and log-probabilities out.

What comes back is checked number by number: an engine that leaves something out, or means something else by it, is
found at the first request and not in a reward curve.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

TOKEN_ID = "token_id:"
# What is worth another attempt: too many requests, and an engine that is starting, restarting or overloaded.
_PASSING = frozenset({429, 500, 502, 503, 504})
_EXCERPT = 300


class EngineError(ValueError):
    """An engine did not answer, or not with what training needs; the message names request, address and remedy."""


@dataclass(frozen=True)
class Engine:
    """Where an engine is and how it is asked.

    Attributes:
      url: its root, such as http://localhost:8000; an ending /v1 is dropped.
      model: the name that requests carry.
      timeout_s: deadline of one request in seconds.
      concurrency: requests under way at once.
      retries: further attempts after a failed connection or a passing HTTP status.
      retry_wait_s: pause before the first of them in seconds; each next one is twice as long.
      api_key_variable: environment variable that holds the key; None sends none.
      request: further fields of every request, for what one engine alone understands.
    """

    url: str
    model: str
    timeout_s: float = 600.0
    concurrency: int = 64
    retries: int = 3
    retry_wait_s: float = 0.5
    api_key_variable: str | None = None
    request: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"rollout.engine.url is {self.url!r}; write its root, such as http://localhost:8000")
        for name, least in (("concurrency", 1), ("retries", 0), ("retry_wait_s", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"rollout.engine.{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.timeout_s > 0:
            raise ValueError(f"rollout.engine.timeout_s is {self.timeout_s}; it must be above 0")
        if self.api_key_variable and self.api_key_variable not in os.environ:
            raise ValueError(
                f"rollout.engine.api_key_variable is {self.api_key_variable!r}, which is not set in the environment; "
                "export it, or leave the field out"
            )

    def address(self, path: str) -> str:
        """The whole address of a path."""
        return f"{self.url.rstrip('/').removesuffix('/v1')}/{path.lstrip('/')}"


class Completion(NamedTuple):
    """One sampled completion.

    Attributes:
      tokens: ids, end of sequence included.
      logprobs: log-probability of each, as the engine reports it.
      ended: with end of sequence, not at the limit.
    """

    tokens: list[int]
    logprobs: list[float]
    ended: bool


def completion(
    engine: Engine,
    prompt: Sequence[int],
    *,
    seed: int,
    temperature: float,
    max_completion_tokens: int,
    eos_ids: Sequence[int],
    vocabulary_size: int,
    what: str,
) -> Completion:
    """Sample one completion of a prompt.

    Everything that an engine could otherwise take from its own defaults (a model's generation_config.json sets top-k
    and top-p) is said in the request, so that the distribution is softmax(logits / temperature) over the vocabulary.

    Raises:
      EngineError: see `answer` and `checked_completion`.
    """
    body = {
        "model": engine.model,
        "prompt": list(prompt),
        "max_tokens": max_completion_tokens,
        "n": 1,
        "seed": seed,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(eos_ids),
        "logprobs": 1,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        **engine.request,
    }
    path = "/v1/completions"
    found = answer(engine, path, body, what=what)
    return checked_completion(
        found,
        prompt,
        max_completion_tokens=max_completion_tokens,
        eos_ids=eos_ids,
        vocabulary_size=vocabulary_size,
        where=f"the answer of {engine.address(path)} to {what}",
    )


def checked_completion(
    found: Any,
    prompt: Sequence[int],
    *,
    max_completion_tokens: int,
    eos_ids: Sequence[int],
    vocabulary_size: int,
    where: str,
) -> Completion:
    """The one completion of an answer, or what is wrong with it.

    Raises:
      EngineError: for another number of choices than one; ids or log-probabilities that are missing, of another number
        or impossible; another prompt than the one that was sent; a completion that neither ended nor reached the limit.
    """
    choices = found.get("choices") if isinstance(found, Mapping) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        count = f"{len(choices)} choices" if isinstance(choices, list) else "no list of choices"
        raise EngineError(
            f"{where} has {count}, where one was asked for; leave n out of rollout.engine.request, and check that the "
            "address is that of the engine itself"
        )
    choice = choices[0]
    described = choice.get("logprobs")
    logprobs = described.get("token_logprobs") if isinstance(described, Mapping) else None
    if not isinstance(described, Mapping) or not isinstance(logprobs, list):
        raise EngineError(
            f"{where} has no log-probabilities (logprobs.token_logprobs); training needs one for each token, so use an "
            "engine whose /v1/completions returns them (vLLM: --max-logprobs at least 1)"
        )
    tokens = _token_ids(choice, described, where)
    if len(logprobs) != len(tokens):
        raise EngineError(
            f"{where} has {len(logprobs)} log-probabilities for {len(tokens)} tokens; each token needs its own, so "
            "turn off what changes tokens after sampling (echo, trimmed stop tokens, merged pieces)"
        )
    for position, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocabulary_size:
            raise EngineError(
                f"{where} has token {token!r} at position {position}, but the policy's ids are 0 to "
                f"{vocabulary_size - 1}; the engine serves another model or tokenizer, or pads its vocabulary"
            )
        number = isinstance(logprob, int | float) and not isinstance(logprob, bool)
        if not number or not math.isfinite(logprob) or logprob > 1e-3:
            raise EngineError(
                f"{where} has log-probability {logprob!r} at position {position}; it must be finite and at most 0, so "
                "check the engine's log for overflow (NaN scores) and its logprobs mode"
            )
    sent = choice.get("prompt_token_ids")
    if sent is not None and list(sent) != list(prompt):
        raise EngineError(
            f"{where} says that its prompt had {len(sent)} tokens ({str(sent[:8])[1:-1]} ...), but {len(prompt)} were "
            f"sent ({str(list(prompt)[:8])[1:-1]} ...); turn off special tokens or truncation that the engine adds"
        )
    ends = [position for position, token in enumerate(tokens) if token in set(eos_ids)]
    ended = bool(ends) and ends[0] == len(tokens) - 1
    if ends and not ended:
        raise EngineError(
            f"{where} goes on for {len(tokens) - 1 - ends[0]} tokens after end of sequence; leave ignore_eos out of "
            "rollout.engine.request"
        )
    if not ended and len(tokens) != max_completion_tokens:
        raise EngineError(
            f"{where} stops after {len(tokens)} of at most {max_completion_tokens} tokens without end of sequence "
            f"{tuple(eos_ids)} (finish_reason {choice.get('finish_reason')!r}); raise the engine's context length, and "
            "let it return the token it stops at"
        )
    if len(tokens) > max_completion_tokens:
        raise EngineError(
            f"{where} has {len(tokens)} tokens, more than the {max_completion_tokens} that were asked for; use an "
            "engine that obeys max_tokens"
        )
    return Completion(tokens, [min(float(value), 0.0) for value in logprobs], ended)


def _token_ids(choice: Mapping[str, Any], described: Mapping[str, Any], where: str) -> list[Any]:
    """Ids from the field `token_ids`, or from tokens that are written as `token_id:123`."""
    written = described.get("tokens")
    named = None
    if isinstance(written, list) and all(isinstance(t, str) and t.startswith(TOKEN_ID) for t in written):
        named = [int(t[len(TOKEN_ID) :]) if t[len(TOKEN_ID) :].isdecimal() else t for t in written]
    for ids in (choice.get("token_ids"), described.get("token_ids"), named):
        if isinstance(ids, list) and ids:
            return ids
    raise EngineError(
        f"{where} has no token ids; text cannot be encoded again without changing tokens, so use an engine that knows "
        "return_token_ids or return_tokens_as_token_ids"
    )


def answer(engine: Engine, path: str, body: Mapping[str, Any] | None = None, *, what: str) -> Any:
    """The JSON that an engine answers: to a POST of `body`, or a GET without one. None where the answer is empty.

    Raises:
      EngineError: no connection or a passing HTTP status after all attempts, another HTTP status, no answer within
        `timeout_s`, or no JSON.
    """
    address, wait = engine.address(path), engine.retry_wait_s
    for attempt in range(engine.retries + 1):
        last = attempt == engine.retries
        try:
            status, content = _exchanged(engine, address, body)
        except TimeoutError:
            raise EngineError(
                f"{address} did not answer {what} within {engine.timeout_s:g} s; raise rollout.engine.timeout_s, or "
                "lower rollout.engine.concurrency where requests wait for each other"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            if last:
                raise EngineError(
                    f"{address} could not be reached for {what} in {engine.retries + 1} attempts "
                    f"({type(error).__name__}: {error}); start the engine, or correct rollout.engine.url"
                ) from None
        else:
            if status == http.HTTPStatus.OK:
                return _json(content, address, what)
            if last or status not in _PASSING:
                raise EngineError(
                    f"{address} answered {what} with HTTP {status}: {content[:_EXCERPT].decode(errors='replace')!r}; "
                    f"{_remedy(status)}"
                )
        time.sleep(wait)
        wait *= 2
    raise AssertionError("the last attempt returns or raises")


def _json(content: bytes, address: str, what: str) -> Any:
    if not content.strip():
        return None
    try:
        return json.loads(content)
    except ValueError:
        raise EngineError(
            f"{address} answered {what} with no JSON: {content[:_EXCERPT].decode(errors='replace')!r}; check that "
            "rollout.engine.url is the engine's"
        ) from None


def _remedy(status: int) -> str:
    if status in (401, 403):
        return "set rollout.engine.api_key_variable"
    if status == 404:
        return "check rollout.engine.model, and that the engine was started with this address enabled"
    if status in _PASSING:
        return "the engine's log says why; lower rollout.engine.concurrency where it is overloaded"
    return "check the sizes in section rollout against the engine's limits, and rollout.engine.request"


def _exchanged(engine: Engine, address: str, body: Mapping[str, Any] | None) -> tuple[int, bytes]:
    """Status and content of one exchange, within the deadline as a whole and not only between two bytes."""
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
        held: socket.socket = connection.sock  # the response closes the connection's own reference early
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


def require_model(engine: Engine) -> None:
    """Raise EngineError unless the engine is there and serves the model."""
    listed = answer(engine, "/v1/models", what="the list of its models")
    entries = listed.get("data", []) if isinstance(listed, Mapping) else []
    names = [entry.get("id") for entry in entries if isinstance(entry, Mapping)]
    if engine.model not in names:
        raise EngineError(
            f"rollout.engine.model is {engine.model!r}, but {engine.address('/v1/models')} serves "
            f"{', '.join(map(repr, names)) or 'no model'}; name one of them"
        )
