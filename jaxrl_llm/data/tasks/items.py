"""Synthetic tasks: items, the split of items by hash, and generation of distinct items."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from random import Random
from typing import Any, NamedTuple

from jaxrl_llm.bounds import shown
from jaxrl_llm.experience import Source

SPLITS = ("train", "validation", "test", "extrapolation")
_SHARE = {"train": 0.8, "validation": 0.1, "test": 0.1, "extrapolation": 1.0}

# Part of the random seed and of a data set's name: increase it when a generator's output changes.
GENERATOR_VERSION = 1


@dataclass(frozen=True)
class Item:
    """One problem.

    Attributes:
      body: the prompt's text without begin of sequence and newline; starts with the task's letter and a colon.
      think: reference scratch; empty in the direct variant, and for problems without scratch.
      answer: reference answer.
      task: name of the task.
      level: difficulty in the task's own unit (digits, operations, numbers, depth).
      domain: category of the item, for bandits over arms and for statistics by domain.
    """

    body: str
    think: str
    answer: str
    task: str
    level: int
    domain: str


class Segment(NamedTuple):
    """A part of a reference conversation.

    Attributes:
      text: the text; control tokens, including the end of the turn, are spelled out.
      source: DEMONSTRATION for a turn of the policy, OBSERVATION for an observation of the environment.
      trained: whether its tokens are trained on.
    """

    text: str
    source: Source = Source.DEMONSTRATION
    trained: bool = True


def observed(text: str) -> Segment:
    """An observation of the environment, which is not trained on."""
    return Segment(text, Source.OBSERVATION, trained=False)


def tagged(text: str, opening: str, closing: str) -> str | None:
    """The text between the last opening tag and the next closing one; None if there is no such pair.

    >>> tagged("<a>1</a><a>2</a>", "<a>", "</a>")
    '2'
    """
    _, found, rest = text.rpartition(opening)
    inner, closed, _ = rest.partition(closing)
    return inner if found and closed else None


def answered(completion: str) -> str | None:
    """The stripped text between the last pair of answer tags; None if there is no pair.

    >>> answered("<t>3+4</t><a> 7 </a><eos>")
    '7'
    """
    answer = tagged(completion, "<a>", "</a>")
    return None if answer is None else answer.strip(" \n")


@dataclass(frozen=True)
class Task:
    """A family of problems with fixed options.

    Attributes:
      name: name of the family.
      draw: (random generator, level) -> an item, or None if this draw is not valid.
      verify: (item, answer text or None) -> reward of the answer.
      levels: levels of the family; others are generated only for the split "extrapolation".
      last_level: the highest level that the generator supports.
      description: one line for the user.
      options: every option with its value.
      scratchpad: responses have a think part.
      reward: name in `jaxrl_llm.rewards` of the function that gives a completion the same reward as `verify`; for a
        conversation, of the function that sums the environment's rewards of the turns.
      identity: item -> the text that identifies it, whose hash determines the split: the body, unless different items
        have the same body.
      segments: record -> the reference conversation; None for single-turn tasks.
      said: completion -> its answer for `verify`, None for none.
      environment: name in `jaxrl_llm.rollout.tasks` of the environment of multi-turn tasks, with its options that
        follow from those of the task; None for single-turn tasks.
      columns: record -> further columns by name, computed when a record is read; `response` replaces the reference
        completion.
    """

    name: str
    draw: Callable[[Random, int], Item | None]
    verify: Callable[[Item, str | None], float]
    levels: tuple[int, ...]
    last_level: int
    description: str
    options: Mapping[str, Any]
    scratchpad: bool
    reward: str = "exact_answer"
    identity: Callable[[Item], str] = lambda item: item.body
    segments: Callable[[Mapping[str, Any]], tuple[Segment, ...]] | None = None
    said: Callable[[str], str | None] = answered
    environment: tuple[str, Mapping[str, Any]] | None = None
    columns: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None

    def response(self, item: Item | Mapping[str, Any]) -> str:
        """The text with full reward, including the observations of an environment."""
        if self.segments is None:
            return reference_response(item, self.scratchpad)
        return "".join(segment.text for segment in self.segments(record(item, 0)))

    def generate(self, *, level: int, count: int, seed: int = 0, split: str = "train") -> list[Item]:
        """`generate` of this module, for this task."""
        return generate(self, level=level, count=count, seed=seed, split=split)


def split_of(body: str) -> str:
    """Split of a body, by hash: 80 % train, 10 % validation, 10 % test, independent of the seed.

    h = crc32(body) mod 10; 0..7 train, 8 validation, 9 test.

    >>> split_of("A:47+85"), split_of("F:K(M(abgd))")
    ('train', 'test')
    """
    remainder = zlib.crc32(body.encode()) % 10
    return "train" if remainder < 8 else "validation" if remainder == 8 else "test"


def generate(task: Task, *, level: int, count: int, seed: int = 0, split: str = "train") -> list[Item]:
    """Distinct items of one level and one split, in the order in which they are drawn.

    The first items do not depend on `count`: a larger set starts with the smaller one.

    Args:
      task: the family with its options, from `tasks.task`.
      level: difficulty.
      count: how many items.
      seed: seed of the draws. The split of a body does not depend on it.
      split: "train", "validation" and "test" are disjoint by hash; "extrapolation" ignores the hash and is for levels
        that are never trained on, including those beyond `task.levels`.

    Raises:
      ValueError: for an invalid level, count, seed or split, or if there are not `count` distinct items.
    """
    level, count, seed = require_int("level", level), require_int("count", count, low=1), require_int("seed", seed)
    require_choice("split", split, SPLITS)
    low, high = task.levels[0], task.levels[-1]
    if split != "extrapolation" and level not in task.levels:
        raise ValueError(
            f"level {level} is outside of the levels {low} to {high} of {task.name}; use one of them, or "
            'split="extrapolation" for a level that is never trained on'
        )
    if not low <= level <= task.last_level:
        raise ValueError(
            f"level {level} of {task.name} cannot be generated; its levels go from {low} to {high}, and up to "
            f'{task.last_level} with split="extrapolation"'
        )
    rng = Random(json.dumps([GENERATOR_VERSION, task.name, dict(task.options), level, seed], sort_keys=True))
    # A set of n bodies is exhausted after about n ln(n) draws, so this limit is reached only if none are left.
    limit = int((3000 + 30 * count) / _SHARE[split])
    seen: set[str] = set()
    items: list[Item] = []
    for draws in range(limit):
        item = task.draw(rng, level)
        identity = None if item is None else task.identity(item)
        if item is not None and identity is not None and identity not in seen:
            seen.add(identity)
            if split in ("extrapolation", split_of(identity)):
                items.append(item)
                if len(items) == count:
                    return items
        if draws == 3000 and not seen:
            break
    raise ValueError(
        f"{task.name} level {level} with options {dict(task.options)} has only {len(items)} distinct items in the "
        f"split {split!r} (all that {limit} draws found), but count is {count}; lower the count, or choose another "
        "level or other options"
    )


def reference_response(item: Item | Mapping[str, Any], scratchpad: bool = True) -> str:
    """The response with full reward: think part, answer part, end of sequence.

    Args:
      item: an `Item`, or a record read from a data set.
      scratchpad: with the think part (empty for an item without scratch); otherwise the direct variant without it.

    >>> reference_response(Item("A:4+8", "4+8+0=12", "12", "addition", 1, "addition-1"))
    '<t>4+8+0=12</t><a>12</a><eos>'
    """
    fields = asdict(item) if isinstance(item, Item) else item
    think = f"<t>{fields['think']}</t>" if scratchpad else ""
    return f"{think}<a>{fields['answer']}</a><eos>"


def record(element: Item | Mapping[str, Any], index: int) -> dict[str, Any]:
    """An item of any source as a record of the pipeline.

    Args:
      element: an `Item`, or a mapping with at least `body` and `answer`; text may be bytes, as in stored data sets.
      index: position in its source, which is the default of `item_id`.

    Raises:
      ValueError: if `body` or `answer` is missing.
    """
    fields = asdict(element) if isinstance(element, Item) else dict(element)
    for name in ("body", "answer"):
        if name not in fields:
            raise ValueError(
                f"element {index} of the source has the fields {sorted(fields)} but no {name!r}; every element needs "
                "the prompt's text as 'body' and the reference answer as 'answer'"
            )
    text = {"body", "think", "answer", "task", "domain"}
    defaults = {"think": "", "task": "", "level": 0, "domain": "", "item_id": index}
    found = {name: _text(fields[name]) if name in text else fields[name] for name in fields}
    return defaults | found | {name: int(found.get(name, defaults[name])) for name in ("level", "item_id")}


# Fields of every record; a row of a file has those that are its columns, and the others are defaults.
_DEFAULTS = frozenset({"think", "task", "level", "domain"})
_OF_PIPELINE = frozenset({"body", "item_id", "messages", "prefix", "raw", "response", "row_of_file"})


def defaults_of(item: Mapping[str, Any]) -> frozenset[str]:
    """Names that a record of a file has only by default; empty for problems of a built-in task.

    >>> sorted(defaults_of({"level": 2, "task": "", "raw": {"level": 2}}))
    ['domain', 'task', 'think']
    """
    return _DEFAULTS - item["raw"].keys() if "raw" in item else frozenset()


def own_columns(item: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a record: of a file its own, and what the pipeline adds, such as `data_source`.

    >>> own_columns({"item_id": 0, "body": "1+2", "answer": "3", "level": 0, "raw": {"question": "1+2", "sum": "3"}})
    {'question': '1+2', 'sum': '3'}
    """
    raw = item.get("raw", {})
    hidden = _OF_PIPELINE | ({"answer"} if "raw" in item else set()) | defaults_of(item)
    return {name: value for name, value in item.items() if name not in hidden} | raw


def named_item(item: Mapping[str, Any]) -> str:
    """A record in messages: the row of its file, or its number.

    >>> named_item({"item_id": 4}), named_item({"item_id": 4, "row_of_file": "line 5 of a.jsonl"})
    ('item 4', 'line 5 of a.jsonl')
    """
    return item.get("row_of_file") or f"item {item.get('item_id', 0)}"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def equality(item: Item, answer: str | None) -> float:
    """Reward 1 if the answer equals the reference answer exactly, else 0."""
    return float(answer == item.answer)


def require_bool(name: str, value: Any) -> bool:
    """The value, if it is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}; it must be true or false")
    return value


def require_int(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """The value, if it is an integer within [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {shown(value)} of type {type(value).__name__}; it must be an integer")
    if (low is not None and value < low) or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} is {value}; it must be {wanted}")
    return value


def require_share(name: str, value: Any, high: float = 1.0) -> float:
    """The value, if it is a number within [0, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
        raise ValueError(f"{name} is {shown(value)}; it must lie in [0, {high:g}]")
    return value


def require_choice(name: str, value: Any, choices: tuple) -> Any:
    """The value, if it is one of the choices."""
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"{name} is {shown(value)}; it must be one of {', '.join(map(repr, choices))}")
    return value


def require_subset(name: str, value: Any, characters: str) -> str:
    """The value in alphabet order, if it is a string of distinct characters out of those given."""
    known = isinstance(value, str) and len(value) > 0 and set(value) <= set(characters)
    if not known or len(set(value)) != len(value):
        raise ValueError(f"{name} is {shown(value)}; it must be a string of distinct characters out of {characters!r}")
    return "".join(character for character in characters if character in value)
