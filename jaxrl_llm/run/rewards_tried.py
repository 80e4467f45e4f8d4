"""Checks of rewards and views before compilation: the data has the columns that they read, and each can be called."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from jaxrl_llm.data.tasks.items import defaults_of, named_item
from jaxrl_llm.experience import FACTS, Experience
from jaxrl_llm.fields import TEXT
from jaxrl_llm.run.explain import trace
from jaxrl_llm.run.setup import Parts
from jaxrl_llm.signatures import names, required, signature
from jaxrl_llm.training.reading import Context, columns_of, read_values

_SECONDS, _TOGETHER = 5.0, 500  # per verifier; rows of one call
_READ_ANSWERS = frozenset(name for name in (*TEXT, *FACTS) if name.startswith("answer"))


def answers_of(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a split has reference answers; they are optional in a user's file."""
    return len(records) > 0 and bool(records[0]["answer"])


def require_answers(parts: Parts, sets: Mapping[str, Any]) -> None:
    """Raises ValueError if a reward, fill or loss reads reference answers and the data has none."""
    c, own = parts.step.composition, parts.config.data
    if "train" not in sets or answers_of(sets["train"]):
        return
    for kind, terms in (("reward", c.rewards), ("credit entry", c.credit), ("loss", c.losses)):
        for term in terms:
            if _READ_ANSWERS & required([term.function]):
                raise ValueError(
                    f"{kind} {term.name!r} reads the reference answer, but the lines of {own.path} have none; set "
                    "data.fields.answer to its column, or use a reward that reads other columns"
                )


def require_read(stages: Mapping[str, Parts], sets: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError if the data of a stage lacks reference answers or columns that something reads."""
    for name, parts in stages.items():
        require_answers(parts, sets[name])
        require_columns(parts, sets[name])
        require_usable_answers(parts, sets[name])


def require_columns(parts: Parts, sets: Mapping[str, Any]) -> None:
    """Raises ValueError where a row of the user's file lacks a column that a reward or a fill requires."""
    c, own = parts.step.composition, parts.config.data
    if "train" not in sets or own.path is None:
        return
    readings = [term for term in (*c.rewards, *c.credit) if term.on_host]
    known = columns_of([sets["train"][0]]) | c.resources.columns
    for term in readings:
        for name in sorted(required([term.function]) & known):
            lacking = [
                each
                for each in sets["train"]
                if name in defaults_of(each) or name not in {**each, **each.get("raw", {})}
            ]
            if lacking:
                first = lacking[0]
                raise ValueError(
                    f"{term.name!r} reads the column {name!r}, which {len(lacking):,} of {len(sets['train']):,} "
                    f"training rows lack, such as {named_item(first)} ({first['body'][:60]!r}); "
                    f"add it (null where there is no value), or leave such rows out: data.where='{name} is defined'"
                )


def require_usable_answers(parts: Parts, sets: Mapping[str, Any]) -> None:
    """Raise ValueError if a shipped verifier of completions and answers cannot use an answer of the user's training
    rows, such as `number_match` a word. The rows are tried in order, for at most 5 seconds per verifier."""
    if "train" not in sets or not (parts.config.data.path or parts.config.data.sources):
        return
    rows = sets["train"]
    for term in parts.step.composition.rewards:
        if not _of_answers(term.function) or term.value_on_failure is not None:
            continue
        until = time.monotonic() + _SECONDS
        for start in range(0, len(rows), _TOGETHER):
            part = [rows[index] for index in range(start, min(start + _TOGETHER, len(rows)))]
            wrong = [] if _unusable(term.function, part) is None else [r for r in part if _unusable(term.function, [r])]
            if wrong:
                said = (_unusable(term.function, wrong[:1]) or "").replace("of row 0", f"of {named_item(wrong[0])}")
                raise ValueError(
                    f"reward {term.name!r}: {said}. {len(wrong)} of the first {start + len(part):,} training rows "
                    "cannot be used; data.where leaves rows out"
                )
            if time.monotonic() > until:
                break


def _of_answers(function: Any) -> bool:
    while isinstance(function, partial):
        function = function.func
    shipped = inspect.isfunction(function) and function.__module__.startswith("jaxrl_llm.rewards.verifiers.")
    return shipped and set(signature(function).required) == {"completions", "answers"}


def _unusable(function: Any, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a verifier cannot use the answers of rows; None if it can."""
    try:
        function(completions=[""] * len(rows), answers=[row["answer"] for row in rows])
    except ValueError as error:
        return str(error)
    return None


def try_readings(parts: Parts, sets: Mapping[str, Any]) -> None:
    """Call what reads text on two rows: the first training problem with its reference completion.

    That is each reward, and each view of texts and columns alone. A reward with `value_on_failure` may fail on one row.

    Raises:
      RewardError: if a reward or a view fails.
    """
    c, tokenizer = parts.step.composition, parts.tokenizer
    if "train" not in sets or c.rollout is None:
        return
    record = sets["train"][0]
    terms = [term for term in c.rewards if term.on_host]
    texts = TEXT | columns_of([record])
    views = [view for view in c.views.values() if view.on_host and names(view.function) <= texts]
    if not terms and not views:
        return
    rows = _two_rows(trace(parts), tokenizer.encode(record.get("response") or record["answer"]))
    context = Context([record], tokenizer.decode, eos_ids=tuple(tokenizer.eos_ids))
    state: Any = SimpleNamespace(step=0)  # a reading uses only the step of the state
    outputs = {term.name: (f"reward/{term.name}",) for term in terms}

    def tried(chosen: Sequence[Any]) -> None:
        if chosen:
            read_values(chosen, outputs, rows, None, state, context, np.arange(2), None, None)

    for view in views:
        read_values([view], {}, rows, None, state, context, np.arange(2), lambda entry: entry, lambda *_: {})

    tried(terms)
    useless = [term for term in terms if context.numbers.get(f"failures/{term.name}") == 2]
    tried([replace(term, value_on_failure=None) for term in useless])  # raises the error of the function


def _two_rows(shapes: Experience, completion: Sequence[int]) -> dict[str, np.ndarray]:
    """The arrays of two rows with this completion; fields that only a step can fill are zero."""
    held = {name: np.zeros((2, *leaf.shape[1:]), leaf.dtype) for name, leaf in shapes.known().items()}
    said = list(completion)[: held["tokens"].shape[1]]
    held["tokens"][:, : len(said)] = said
    held["mask"][:, : len(said)] = 1
    held["length"][:], held["weight"][:] = len(said), 1
    return held
