"""Rewards before anything is compiled: whether the data has what they read, and whether they can be called at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from jaxrl_llm.experience import FACTS, Experience
from jaxrl_llm.fields import TEXT
from jaxrl_llm.run.explain import trace
from jaxrl_llm.run.setup import Parts
from jaxrl_llm.signatures import required
from jaxrl_llm.training.reading import Context, read_values

_READ_ANSWERS = frozenset(name for name in (*TEXT, *FACTS) if name.startswith("answer"))


def answers_of(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a split has reference answers: a user's file need not."""
    return len(records) > 0 and bool(records[0]["answer"])


def require_answers(parts: Parts, sets: Mapping[str, Any]) -> None:
    """Raises ValueError where something reads reference answers and the data has none."""
    c, own = parts.step.composition, parts.config.data
    if "train" not in sets or answers_of(sets["train"]):
        return
    for kind, terms in (("reward", c.rewards), ("credit entry", c.credit), ("loss", c.losses)):
        for term in terms:
            if _READ_ANSWERS & required([term.function]):
                raise ValueError(
                    f"{kind} {term.name!r} reads the reference answer, but the lines of {own.path} have none; name "
                    "their field in data.fields.answer, or use a reward that reads other columns"
                )


def try_rewards(parts: Parts, sets: Mapping[str, Any]) -> None:
    """Call each reward that reads text on one row: the first problem with its reference completion as what was said.

    A reward with a value on failure may fail, and is not tried.

    Raises:
      RewardError: as a step would, before one is compiled.
    """
    terms = [t for t in parts.step.composition.rewards if t.on_host and t.value_on_failure is None]
    if not terms or "train" not in sets or parts.step.composition.rollout is None:
        return
    record, decode = sets["train"][0], parts.tokenizer.decode
    rows = _one_row(trace(parts), parts.tokenizer.encode(record.get("response") or record["answer"]))
    context = Context([record], decode)
    state: Any = SimpleNamespace(step=0)  # all that a reading sees of it
    outputs = {term.name: (f"reward/{term.name}",) for term in terms}
    read_values(terms, outputs, rows, None, state, context, np.arange(1), None, None)


def _one_row(shapes: Experience, completion: Sequence[int]) -> dict[str, np.ndarray]:
    """The arrays of a row that says this: what is not known before a step is zero."""
    held = {name: np.zeros((1, *leaf.shape[1:]), leaf.dtype) for name, leaf in shapes.known().items()}
    said = list(completion)[: held["tokens"].shape[1]]
    held["tokens"][0, : len(said)] = said
    held["mask"][0, : len(said)] = 1
    held["length"][:], held["weight"][:] = len(said), 1
    return held
