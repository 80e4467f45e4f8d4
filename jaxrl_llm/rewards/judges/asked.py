"""A judge behind an OpenAI-compatible endpoint, with a cache of its answers and a budget."""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from jaxrl_llm.endpoints import Endpoint, EndpointError, answer

# Beginnings of refusals.
_REFUSALS = ("i can't", "i cannot", "i can not", "i'm sorry", "i am sorry", "i won't", "i'm unable", "i am unable")

_SAVED_TOGETHER = 64  # answers per write of the file, since each write waits for the disk


class JudgeError(ValueError):
    """A judge cannot be queried further; the message names the judge, the number and the remedy."""


@dataclass
class Counts:
    """Counts of the queries to a judge in this process.

    Attributes:
      calls: exchanges with the endpoint.
      cached: answers found in the cache.
      refused: answers that decline to answer.
      unreadable: answers that could not be parsed.
      prompt_tokens, completion_tokens: as the endpoint counts them.
      cost: in the currency of the prices.
    """

    calls: int = 0
    cached: int = 0
    refused: int = 0
    unreadable: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


@dataclass
class Judge:
    """A chat model that answers questions with text.

    Answers are cached by the content of the question (model, messages, temperature, limit, number of the vote), on disk
    if `cache` names a file, so that repeated questions cost nothing, also in later runs.

    Attributes:
      endpoint: its address; at most `concurrency` questions run in parallel.
      temperature: of the answer; 0 is greedy.
      max_tokens: of the answer.
      cache: SQLite file of the answers; None keeps them in memory.
      budget: largest cost, in the currency of the prices, or in tokens without prices; None is no bound.
      price_prompt, price_completion: per million tokens.
      attempts: tries of a question whose answer cannot be parsed, each as another vote.
    """

    endpoint: Endpoint
    temperature: float = 0.0
    max_tokens: int = 256
    cache: Path | None = None
    budget: float | None = None
    price_prompt: float = 0.0
    price_completion: float = 0.0
    attempts: int = 2
    counts: Counts = field(default_factory=Counts)
    _known: dict[str, str] = field(default_factory=dict, repr=False)
    _unsaved: list[tuple[str, str]] = field(default_factory=list, repr=False)
    _opened: sqlite3.Connection | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self):
        where = self.endpoint.where
        for name, least in (("temperature", 0), ("max_tokens", 1), ("attempts", 1), ("price_prompt", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{where}.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"{where}.budget is {self.budget}; it must be above 0, or null for no bound")

    def ask_all(
        self, questions: Sequence[str], parse: Callable[[str], Any], *, votes: int = 1, system: str | None = None
    ) -> list[list[Any]]:
        """The parsed answers to each question: `votes` entries per question, None where none can be parsed.

        Equal questions are asked once. A question is repeated up to `attempts` times while `parse` returns None.

        Raises:
          JudgeError: when the budget is used up.
          EndpointError: when the endpoint does not answer.
        """
        wanted = [(text, vote) for text in dict.fromkeys(questions) for vote in range(votes)]

        def one(asked: tuple[str, int]) -> Any:
            text, vote = asked
            for attempt in range(self.attempts):
                found = parse(self._answered(text, system, vote + attempt * votes))
                if found is not None:
                    return found
                with self._lock:
                    self.counts.unreadable += 1
                if self.temperature == 0:  # the answer would be the same
                    break
            return None

        try:
            with ThreadPoolExecutor(max(1, min(self.endpoint.concurrency, len(wanted)))) as pool:
                found = dict(zip(wanted, pool.map(one, wanted), strict=True))
        finally:
            with self._lock:
                self._save()
        return [[found[text, vote] for vote in range(votes)] for text in questions]

    def report(self) -> dict[str, float]:
        """Its counts, for the metrics of a step."""
        return {name: float(value) for name, value in vars(self.counts).items()}

    def _answered(self, text: str, system: str | None, vote: int) -> str:
        messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": text}]
        body = {
            "model": self.endpoint.model,
            "messages": messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            **({"seed": vote} if self.temperature > 0 else {}),
            **self.endpoint.request,
        }
        key = hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
        with self._lock:
            known = self._recalled(key)
            if known is not None:
                self.counts.cached += 1
                return known
            self._require_budget()
        said = answer(self.endpoint, "/v1/chat/completions", body, what="a judgement")
        content, usage = _content(said, self.endpoint)
        with self._lock:
            self._count(content, usage)
            self._keep(key, content)
        return content

    def _require_budget(self) -> None:
        priced = self.price_prompt + self.price_completion > 0
        used = self.counts.cost if priced else float(self.counts.prompt_tokens + self.counts.completion_tokens)
        if self.budget is not None and used >= self.budget:
            unit = "" if priced else " tokens"
            raise JudgeError(
                f"{self.endpoint.where}.budget is {self.budget:g}{unit}, and {used:g} are used up after "
                f"{self.counts.calls} calls; raise it and go on with --resume (what was answered is kept in the cache)"
            )

    def _count(self, content: str, usage: Mapping[str, Any]) -> None:
        counts = self.counts
        prompt, completion = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
        counts.calls += 1
        counts.prompt_tokens += prompt
        counts.completion_tokens += completion
        counts.cost += (prompt * self.price_prompt + completion * self.price_completion) / 1e6
        counts.refused += is_refusal(content)

    def _recalled(self, key: str) -> str | None:
        if key not in self._known and self.cache is not None:
            row = self._database().execute("SELECT content FROM answers WHERE question = ?", (key,)).fetchone()
            if row is not None:
                self._known[key] = row[0]
        return self._known.get(key)

    def _keep(self, key: str, content: str) -> None:
        self._known[key] = content
        if self.cache is not None:
            self._unsaved.append((key, content))
            if len(self._unsaved) >= _SAVED_TOGETHER:
                self._save()

    def _save(self) -> None:
        """Write the unsaved answers; the caller holds the lock."""
        if self._unsaved:
            database = self._database()
            database.execute("BEGIN IMMEDIATE")
            database.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", self._unsaved)
            database.execute("COMMIT")
            self._unsaved.clear()

    def _database(self) -> sqlite3.Connection:
        """The cache, opened once; the caller holds the lock."""
        assert self.cache is not None
        if self._opened is None:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            self._opened = sqlite3.connect(self.cache, timeout=60, isolation_level=None, check_same_thread=False)
            self._opened.execute("CREATE TABLE IF NOT EXISTS answers (question TEXT PRIMARY KEY, content TEXT)")
        return self._opened


def judge_of(described: Mapping[str, Any], where: str) -> Judge:
    """A judge from its section of a config: fields of `Endpoint` and of `Judge`.

    Raises:
      ValueError: for a field that does not exist, or without url or model.
    """
    known = {name: kind for kind in (Endpoint, Judge) for name in kind.__dataclass_fields__ if not name.startswith("_")}
    for hidden in ("endpoint", "where", "counts"):
        known.pop(hidden)
    for name in described:
        if name not in known:
            raise ValueError(f"{where}.{name} is not a field of a judge; it has {', '.join(sorted(known))}")
    for name in ("url", "model"):
        if not described.get(name):
            raise ValueError(f"{where} has no {name}; write {{url: http://localhost:8000, model: NAME}}")
    of_endpoint = {name: value for name, value in described.items() if known[name] is Endpoint}
    own = {name: value for name, value in described.items() if known[name] is Judge}
    if own.get("cache") is not None:
        own["cache"] = Path(own["cache"])
    return Judge(Endpoint(**{"timeout_s": 60.0, "concurrency": 16, **of_endpoint}, where=where), **own)


def is_refusal(text: str) -> bool:
    """Whether an answer is a refusal, by its beginning.

    >>> is_refusal("I'm sorry, but I can't rate this."), is_refusal('{"rating": 3}')
    (True, False)
    """
    return text.strip().lower().replace("\u2019", "'").startswith(_REFUSALS)


def parsed_object(text: str) -> dict[str, Any] | None:
    """The JSON object of an answer that is one object or one fenced block with it; None for any other text.

    >>> parsed_object('{"rating": 4}'), parsed_object('Well, {"rating": 4}')
    ({'rating': 4}, None)
    """
    body = text.strip()
    if body.startswith("```") and body.endswith("```") and body.count("```") == 2:
        body = body.removeprefix("```").removesuffix("```").removeprefix("json").strip()
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of JSON is a finite number, and not true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _content(said: Any, endpoint: Endpoint) -> tuple[str, Mapping[str, Any]]:
    try:
        content = said["choices"][0]["message"]["content"]
        usage = said.get("usage") or {}
    except (KeyError, IndexError, TypeError):
        content, usage = None, {}
    if content is None or not isinstance(content, str):
        raise EndpointError(
            f"{endpoint.address('/v1/chat/completions')} answered a judgement without choices[0].message.content: "
            f"{str(said)[:200]!r}; it must be an OpenAI-compatible chat endpoint"
        )
    return content, usage
