"""Format verifiers: order of tags, a regular expression, JSON of a schema, instructions."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, get_args

from jaxrl_llm.data.tasks.items import tagged
from jaxrl_llm.ranges import ranged

Grammar = Literal["think", "think_answer", "tags"]
Where = Literal["search", "whole"]


def tag_format(
    completions: Sequence[str],
    *,
    grammar: Grammar = "think_answer",
    think_tags: tuple[str, str] = ("<think>", "</think>"),
    answer_tags: tuple[str, str] = ("<answer>", "</answer>"),
) -> list[float]:
    """Whether the tags of thought and answer are well-formed.

        think          1 where the text starts with the opening tag, which occurs once, and a closing one follows
        think_answer   1 where each of the four tags occurs once and in order, the text begins and ends with one,
                       and only blanks are between thought and answer; both may be empty
        tags           a quarter for each of the four that occurs once on a line of its own

    Where tags are single tokens, `answer_format` is cheaper.

    Args:
      completions: decoded completions.
      grammar: as above.
      think_tags: tags around the thought; `<t>` and `</t>` in the built-in tasks.
      answer_tags: tags around the answer; `<a>` and `</a>` there.

    Returns:
      One number per row in [0, 1].

    Raises:
      ValueError: for an unknown grammar.

    >>> tag_format(["<think>a</think> <answer>4</answer>", "<think>a</think> so <answer>4</answer>", ""])
    [1.0, 0.0, 0.0]

    Reference: DeepSeek-R1 (2501.12948), as open-r1 and TRL check it.
    Certainty: verified
    """
    if grammar not in get_args(Grammar):
        raise ValueError(f"grammar is {grammar!r}; it must be one of {', '.join(get_args(Grammar))}")
    tags = (*think_tags, *answer_tags)
    opened, closed, answered, ended = tags

    def verdict(text: str) -> float:
        if grammar == "think":
            return float(text.startswith(opened) and text.count(opened) == 1 and closed in text)
        if grammar == "tags":
            lines = (f"{opened}\n", f"\n{closed}\n", f"\n{answered}\n", f"\n{ended}")
            return sum(text.count(line) == 1 for line in lines) / 4
        text = text.strip()
        if any(text.count(tag) != 1 for tag in tags) or not text.startswith(opened) or not text.endswith(ended):
            return 0.0
        places = [text.index(tag) for tag in tags]
        between = text[places[1] + len(closed) : places[2]]
        return float(places == sorted(places) and not between.strip())

    return [verdict(text) for text in completions]


def pattern_match(completions: Sequence[str], *, pattern: str, where: Where = "search") -> list[float]:
    r"""1 where a regular expression matches, else 0.

    Args:
      completions: decoded completions.
      pattern: of Python's `re`; a dot matches line breaks. Patterns that backtrack heavily need `deadline_s`.
      where: 'search' anywhere in the text, or 'whole' text.

    Returns:
      One reward per row, 0 or 1.

    Raises:
      ValueError: for an invalid regular expression, or an unknown `where`.

    >>> pattern_match(["#### 4", "four"], pattern=r"#### -?\d+", where="whole")
    [1.0, 0.0]
    """
    if where not in get_args(Where):
        raise ValueError(f"where is {where!r}; it must be one of {', '.join(get_args(Where))}")
    compiled = _compiled(pattern)
    read = compiled.search if where == "search" else compiled.fullmatch
    return [float(read(text) is not None) for text in completions]


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern is {pattern!r}, which is not a valid regular expression: {error}") from None


@ranged
def schema_match(
    completions: Sequence[str],
    *,
    schema: Mapping[str, Any] | None = None,
    tags: tuple[str, str] | None = None,
    readable: float = 0.0,
) -> list[float]:
    """1 where a completion is JSON that is valid under a schema, else 0. Needs the extra `text`.

    Args:
      completions: decoded completions.
      schema: JSON Schema; None takes any JSON.
      tags: tags around the JSON, the last pair counts; None takes the content of the last fence of three backticks, or
        the whole completion.
      readable: reward of JSON that is invalid under the schema.

    Returns:
      One reward per row.

    Raises:
      ValueError: for an invalid schema, or without jsonschema.

    >>> schema_match(['{"n": 4}', '{"n": "4"}', "4}"], schema={"properties": {"n": {"type": "integer"}}})
    [1.0, 0.0, 0.0]
    """
    allowed = None if schema is None else _validator(schema)
    rewards = []
    for text in completions:
        inner = _fenced(text) if tags is None else tagged(text, *tags)
        value = _NOTHING if inner is None else _json(inner)
        good = value is not _NOTHING and (allowed is None or allowed(value))
        rewards.append(1.0 if good else 0.0 if value is _NOTHING else readable)
    return rewards


def _validator(schema: Mapping[str, Any]) -> Callable[[Any], bool]:
    """Whether a value is valid under a schema. References must be inside the schema; nothing is fetched."""
    if importlib.util.find_spec("jsonschema") is None:
        raise ValueError("schema_match needs the package jsonschema; install it with: pip install 'jaxrl_llm[text]'")
    import jsonschema.validators  # the extra text
    import referencing.exceptions

    kind: Any = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"schema is not a valid JSON Schema: {error.message}") from None
    validator = kind(schema, registry=referencing.Registry())

    def allowed(value: Any) -> bool:
        try:
            return validator.is_valid(value)
        except referencing.exceptions.Unresolvable as error:
            raise ValueError(f"schema refers to {error.ref!r}, which is not in it; define it under $defs") from None
        except RecursionError:
            return False

    return allowed


_NOTHING = object()


def _fenced(text: str) -> str:
    parts = text.split("```")
    return parts[-2].removeprefix("json") if len(parts) > 2 and len(parts) % 2 else text


def _json(text: str) -> Any:
    """The value of a JSON text; `_NOTHING` for invalid JSON, such as NaN, duplicate names, or too deep nesting."""
    try:
        return json.loads(text, parse_constant=_refused, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        return _NOTHING


def _refused(constant: str) -> Any:
    raise ValueError(constant)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("duplicate name")
    return dict(pairs)


# ---- instructions ---------------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


# Checks of instructions by name: (text, value) -> whether the text follows it.
INSTRUCTIONS: Mapping[str, Callable[[str, Any], bool]] = {
    "least_words": lambda text, n: len(_words(text)) >= n,
    "most_words": lambda text, n: len(_words(text)) <= n,
    "least_characters": lambda text, n: len(text) >= n,
    "most_characters": lambda text, n: len(text) <= n,
    "sentences": lambda text, n: sum(any(map(str.isalnum, part)) for part in re.split("[.!?]", text)) == n,
    "paragraphs": lambda text, n: len([part for part in text.split("\n\n") if part.strip()]) == n,
    "bullets": lambda text, n: len(re.findall(r"^ {0,20}[-*•] ", text, re.M)) == n,
    "contains": lambda text, words: all(word.lower() in text.lower() for word in _listed(words)),
    "excludes": lambda text, words: not any(word.lower() in text.lower() for word in _listed(words)),
    "starts_with": lambda text, start: text.lstrip().startswith(start),
    "ends_with": lambda text, end: text.rstrip().endswith(end),
    "lower_case": lambda text, wanted: (text == text.lower()) == wanted,
    "upper_case": lambda text, wanted: (text == text.upper()) == wanted,
    "json": lambda text, wanted: (_json(_fenced(text)) is not _NOTHING) == wanted,
    "pattern": lambda text, pattern: _compiled(pattern).search(text) is not None,
}


def instructions_kept(
    completions: Sequence[str],
    items: Sequence[Mapping[str, Any]],
    *,
    instructions: Mapping[str, Any] | None = None,
    field: str = "instructions",
    strict: bool = False,
) -> list[float | None]:
    """The share of instructions that a completion follows, or whether it follows all.

        r = kept / instructions

    Args:
      completions: decoded completions.
      items: records of the data; under `field` the instructions of the prompt: {"most_words": 40, "contains":
        ["because"]}.
      instructions: further instructions for all prompts; names are those of `INSTRUCTIONS`.
      field: field of the records; it may be missing.
      strict: 1 for all instructions, else 0.

    Returns:
      One reward per row in [0, 1]; None for a row without instructions.

    Raises:
      ValueError: for an unknown instruction.

    >>> instructions_kept(["Because it rains."], [{}], instructions={"most_words": 2, "contains": "because"})
    [0.5]

    Reference: Light-IF (2508.03178).
    Certainty: reconstructed
    """
    rewards: list[float | None] = []
    for row, (text, item) in enumerate(zip(completions, items, strict=True)):
        asked = {**(instructions or {}), **(item.get(field) or {})}
        if unknown := sorted(asked.keys() - INSTRUCTIONS.keys()):
            raise ValueError(
                f"the instructions of row {row} name {unknown[0]!r}; they must be among {', '.join(INSTRUCTIONS)}"
            )
        kept = [INSTRUCTIONS[name](text, value) for name, value in asked.items()]
        share = sum(kept) / len(kept) if kept else None
        rewards.append(share if share is None or not strict else float(share == 1))
    return rewards
