"""Rows of files with judged completions: completions of a prompt with preferences, ratings, labels or verdicts.

Columns have the names below, those of TRL, UltraFeedback and HelpSteer, or those in `columns`. Prompts and completions
are texts or lists of messages. Without a prompt, the common beginning of the completions of a row is the prompt.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxrl_llm.bounds import shown
from jaxrl_llm.data.row_templates import column_value
from jaxrl_llm.data.stored_reference import StoredReference

Kind = Literal["pairs", "rankings", "ratings", "labels", "steps", "verdicts"]
Prompt = str | tuple[Mapping[str, Any], ...]
QUESTION = "{prompt}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\nWhich answer is better, A or B?"
VERDICT = "{rationale}\n\nVerdict: {verdict}"

_LARGEST = float(np.finfo(np.float32).max)
# Alternative names of columns, used if a row does not have the first name.
_ALSO: Mapping[str, tuple[str, ...]] = {
    "prompt": ("question", "instruction", "context"),
    "completion": ("response",),
    "completions": ("responses",),
    "steps": ("completions",),
    "ranks": ("rank",),
    "first": ("response_1", "response1", "response_a", "conversation_a"),
    "second": ("response_2", "response2", "response_b", "conversation_b"),
    "better": ("verdict", "winner"),
    "preference_strength": ("overall_preference",),
    "rationale": ("preference_statement", "critique"),
}


class Judged(NamedTuple):
    """One completion of a file.

    Attributes:
      prompt: its prompt, a text or messages.
      text: of the completion, without end of sequence.
      values: name of a field -> its number, or several numbers.
      steps: texts of its steps with the label of each; empty for other kinds.
      where: its file and line.
      reference: log-probabilities of its tokens under a reference, where the file holds them.
    """

    prompt: Prompt
    text: str
    values: Mapping[str, Any] = {}
    steps: tuple[tuple[str, float], ...] = ()
    where: str = ""
    reference: StoredReference | None = None


class Tie(ValueError):
    """A pair or ranking without a better completion, which may be dropped and counted."""


class Asked(NamedTuple):
    """Options of a source for ratings and verdicts.

    Attributes:
      attributes: columns of ratings, one number each; empty for the single column `rating`.
      lowest, highest: bounds of ratings; None sets no bound.
      question, verdict: formats of the prompt and the completion of a judge.
      both_orders: each verdict gives two rows, one per order of the answers.
    """

    attributes: tuple[str, ...] = ()
    lowest: float | None = None
    highest: float | None = None
    question: str = QUESTION
    verdict: str = VERDICT
    both_orders: bool = False


Row = Mapping[str, Any]


def named(record: Row, columns: Mapping[str, str], kind: Kind, where: str) -> dict[str, Any]:
    """A row with the column names of its kind; lists that are stored as JSON text are parsed.

    Raises:
      ValueError: for a column in `columns` that the row does not have.
    """
    try:
        given = {name: column_value(record, column) for name, column in columns.items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    found = {**record, **given}
    for name, others in _ALSO.items():
        if name not in found and (other := next((other for other in others if other in record), None)):
            found[name] = record[other]
    if found.get("preference_strength") is not None:
        found = _strength(found, where) | found
    if kind == "pairs" and "chosen" not in found and "better" in found:
        side, sides = _better(found, where), [found.get("first"), found.get("second")]
        found |= {"chosen": sides[side or 0], "rejected": sides[1 - (side or 0)], "tie": side is None}
    if kind == "pairs" and "margin" not in found and {"score_chosen", "score_rejected"} <= found.keys():
        high, low = (_number(found[name], name, where) for name in ("score_chosen", "score_rejected"))
        if high < low:
            raise ValueError(
                f"{where} has score_chosen {high:g}, below score_rejected {low:g}; swap the two sides, or map margin "
                "to another column"
            )
        found["margin"] = high - low
    found |= {name: _as_list(found[name], False) for name in _LISTS if name in found}
    return found | {name: _as_list(found[name], True) for name in _TEXTS if name in found}


_LISTS = ("completions", "steps", "labels", "ranks")
_TEXTS = ("prompt", "chosen", "rejected", "completion", "first", "second")


def _strength(record: Row, where: str) -> dict[str, Any]:
    """A row of HelpSteer2-Preference or HelpSteer3: how much better the second of two responses is, from -3 to 3."""
    strength = _number(record["preference_strength"], "preference_strength", where)
    return {"better": "second" if strength > 0 else "first" if strength < 0 else "tie", "margin": abs(strength)}


_SIDES: Mapping[str, int | None] = {
    **dict.fromkeys(("first", "a", "1", "model_a", "response_a"), 0),
    **dict.fromkeys(("second", "b", "2", "model_b", "response_b"), 1),
    **dict.fromkeys(("tie", "both", "tie (bothbad)", "neither"), None),
}


def _better(record: Row, where: str) -> int | None:
    """Which of two answers is the better one; None for a tie."""
    said = str(better := record.get("better")).lower()
    if said not in _SIDES:
        raise ValueError(f"{where} has better {shown(better)}; it must be first or second, A or B, 1 or 2, or tie")
    return _SIDES[said]


def _as_list(value: Any, messages: bool) -> Any:
    """What a cell of text holds as JSON, if that is a list; of a text, only if it is a list of messages."""
    if not (isinstance(value, str) and value.startswith("[")):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        return value
    said = all(isinstance(one, Mapping) and "role" in one for one in found) and bool(found)
    return found if said or not messages else value


def _is_text(value: Any, what: str, where: str) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"{where} has {what} {shown(value)}, which is not text; write it in quotes")


def _number(value: Any, what: str, where: str) -> float:
    if isinstance(value, str):  # a cell of a CSV file
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
        raise ValueError(f"{where} has {what} {shown(value)}; it must be a finite number")
    return float(value)


def _at_least_zero(value: Any, what: str, where: str) -> float:
    number = _number(value, what, where)
    if number < 0:
        raise ValueError(f"{where} has {what} {number}; it must be at least 0")
    return number


def _said(value: Any, what: str, where: str) -> str | list[Mapping[str, Any]]:
    """A text, or messages with a role and a content each."""
    if not isinstance(value, list):
        return _is_text(value, what, where)
    if not value:
        raise ValueError(f"{where} has {what} [], which has no message")
    for message in value:
        if not (isinstance(message, Mapping) and all(isinstance(message.get(k), str) for k in ("role", "content"))):
            raise ValueError(f"{where} has {what} with {shown(message)}; a message needs texts as role and content")
    return value


def _prompt_and_texts(record: Row, keys: Sequence[str], where: str) -> tuple[Prompt, list[str]]:
    """The prompt of a row, and its completions as texts."""
    return _prompt_and_said(record.get("prompt"), [_said(record.get(key), key, where) for key in keys], keys, where)


def _prompt_and_said(
    prompt: Any, said: Sequence[str | list[Any]], keys: Sequence[str], where: str
) -> tuple[Prompt, list[str]]:
    if prompt is None:
        prompt, said = _implicit(said, where)
    prompt = _said(prompt, "prompt", where)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    texts = [_completion(value, messages, key, where) for value, key in zip(said, keys, strict=True)]
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"], texts
    return tuple(messages), texts


def _implicit(said: Sequence[Any], where: str) -> tuple[Any, list[Any]]:
    """The common beginning of completions as their prompt: whole messages, or a text up to white space."""
    if len(said) > 1 and all(value == said[0] for value in said):
        raise _equal(said[0], where)
    texts = [value for value in said if isinstance(value, str)]
    if not texts:
        alone = len(said) == 1
        same = said[0][:-1] if alone else _common(said)
        if same:
            return same, list(said)
    elif len(texts) == len(said) > 1:
        same = _common(texts)
        cut = max((place + 1 for place, letter in enumerate(same) if letter.isspace()), default=0)
        if same[:cut].strip():
            return same[:cut], [text[cut:] for text in texts]
    raise ValueError(f"{where} has prompt None, and its completions have no common beginning; add a prompt")


def _common(values: Sequence[Any]) -> Any:
    """The common beginning of several sequences."""
    first = values[0]
    same = (all(len(other) > n and other[n] == first[n] for other in values) for n in range(len(first)))
    return first[: next((n for n, holds in enumerate(same) if not holds), len(first))]


def _completion(value: str | list[Any], prompt: list[Any], what: str, where: str) -> str:
    if isinstance(value, str):
        return value
    rest = value[len(prompt) :] if value[: len(prompt)] == prompt else value
    if len(rest) != 1 or rest[0]["role"] != "assistant":
        roles = [message["role"] for message in rest]
        raise ValueError(
            f"{where} has {what} with messages of {shown(roles)} after the prompt; a completion is one message of the "
            "assistant, so move the others into the prompt"
        )
    return rest[0]["content"]


def _distinct(texts: Sequence[str], where: str) -> None:
    seen: set[str] = set()
    for text in texts:
        if text in seen:
            raise _equal(text, where)
        seen.add(text)


def _equal(said: Any, where: str) -> Tie:
    return Tie(
        f"{where} has two equal completions {shown(said)}, so neither is better; remove one, or set unusable to drop"
    )


def _tie(where: str) -> Tie:
    return Tie(f"{where} has a tie, so neither completion is better; remove the row, or set unusable to drop")


def _weight(record: Row, where: str) -> dict[str, float]:
    return {} if record.get("weight") is None else {"weight": _at_least_zero(record["weight"], "weight", where)}


def _pair(record: Row, where: str, asked: Asked) -> list[Judged]:
    prompt, (chosen, rejected) = _prompt_and_texts(record, ("chosen", "rejected"), where)
    if record.get("tie"):
        raise _tie(where)
    _distinct([chosen, rejected], where)
    both = _weight(record, where)
    if record.get("margin") is not None:
        both["margin"] = _at_least_zero(record["margin"], "margin", where)
    return [Judged(prompt, chosen, {"preferred": 1.0, **both}), Judged(prompt, rejected, {"preferred": 0.0, **both})]


def _ranking(record: Row, where: str, asked: Asked) -> list[Judged]:
    texts = record.get("completions")
    if not isinstance(texts, Sequence) or isinstance(texts, str) or len(texts) < 2:
        raise ValueError(
            f"{where} has completions {shown(texts)}; a ranking is a list of at least two texts, the best first"
        )
    said = [_said(text, "completion", where) for text in texts]
    prompt, texts = _prompt_and_said(record.get("prompt"), said, ["completion"] * len(said), where)
    _distinct(texts, where)
    ranks = range(len(texts)) if record.get("ranks") is None else record["ranks"]
    if isinstance(ranks, str) or not isinstance(ranks, Sequence) or len(ranks) != len(texts):
        raise ValueError(f"{where} has ranks {shown(ranks)}; give one for each of its {len(texts)} completions")
    places = [_at_least_zero(rank, "ranks", where) for rank in ranks]
    if len(set(places)) == 1:
        raise _tie(where)
    weight = _weight(record, where)
    return [Judged(prompt, text, {"rank": place, **weight}) for place, text in zip(places, texts, strict=True)]


def _rating(record: Row, where: str, asked: Asked) -> list[Judged]:
    prompt, (text,) = _prompt_and_texts(record, ("completion",), where)
    if asked.attributes:
        given = [record.get(name) for name in asked.attributes]
        rating: Any = tuple(
            float("nan") if value is None else _within(_number(value, name, where), name, where, asked)
            for value, name in zip(given, asked.attributes, strict=True)
        )
        if all(value is None for value in given):
            raise ValueError(f"{where} has none of the ratings {', '.join(asked.attributes)}; give one of them")
    else:
        if record.get("rating") is None:
            numbers = [name for name, value in record.items() if isinstance(value, (int, float)) and value == value]
            raise ValueError(
                f"{where} has no rating; name its columns as attributes, or one of them as columns: {{rating: NAME}}; "
                f"it has the numbers {', '.join(map(str, numbers)) or 'none'}"
            )
        rating = _within(_number(record["rating"], "rating", where), "rating", where, asked)
    return [Judged(prompt, text, {"rating": rating, **_weight(record, where)})]


def _within(value: float, what: str, where: str, asked: Asked) -> float:
    low, high = asked.lowest, asked.highest
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{where} has {what} {value:g}, outside of [{low}, {high}]; correct it, or the bounds")
    return value


def _label(record: Row, where: str, asked: Asked) -> list[Judged]:
    prompt, (text,) = _prompt_and_texts(record, ("completion",), where)
    value = record.get("label")
    if isinstance(value, str):  # a cell of a CSV file
        value = {"true": 1, "false": 0}.get(value.lower(), value)
        with contextlib.suppress(ValueError):
            value = float(value)
    if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{where} has label {shown(value)}; it must be true, false, or a number between 0 and 1")
    return [Judged(prompt, text, {"preferred": float(value), **_weight(record, where)})]


def _steps(record: Row, where: str, asked: Asked) -> list[Judged]:
    prompt, steps, labels = record.get("prompt"), record.get("steps"), record.get("labels")
    if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels) or not steps:
        raise ValueError(f"{where} has {shown(steps)} as steps and {shown(labels)} as labels; give lists of one length")
    if "" in steps:
        raise ValueError(f"{where} has an empty step, which has no last token for its label; remove it")
    pairs = tuple(
        (_is_text(step, "step", where), _step_label(label, where)) for step, label in zip(steps, labels, strict=True)
    )
    text = "".join(step for step, _ in pairs)
    prompt, _ = _prompt_and_said(_said(prompt, "prompt", where), [text], ["steps"], where)
    return [Judged(prompt, text, _weight(record, where), pairs)]


def _step_label(label: Any, where: str) -> float:
    """A number between 0 and 1; NaN for a step without a label."""
    if label is None:
        return float("nan")
    value = _number(int(label) if isinstance(label, bool) else label, "label", where)
    if not 0 <= value <= 1:
        raise ValueError(
            f"{where} has label {value:g} of a step; it must be true, false, a number between 0 and 1, or null for "
            "a step without a label"
        )
    return value


def _verdict(record: Row, where: str, asked: Asked) -> list[Judged]:
    prompt, answers = _prompt_and_texts(record, ("first", "second"), where)
    if not isinstance(prompt, str):
        prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    _distinct(answers, where)
    side = _better(record, where)
    if side is None:
        raise _tie(where)
    rationale = "" if record.get("rationale") is None else _is_text(record["rationale"], "rationale", where)
    rows = []
    for swapped in (False, True) if asked.both_orders else (False,):
        first, second = reversed(answers) if swapped else answers
        verdict = "AB"[side ^ swapped]
        text = _filled(asked.verdict, {"rationale": rationale, "verdict": verdict}).strip()
        question = _filled(asked.question, {"prompt": prompt, "first": first, "second": second})
        rows.append(Judged(question, text, _weight(record, where)))
    return rows


def _filled(text: str, values: Mapping[str, str]) -> str:
    """A format with its placeholders replaced in one pass, so that placeholders inside values are not replaced."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), text)


READERS: Mapping[str, Callable[[Row, str, Asked], list[Judged]]] = {
    "pairs": _pair,
    "rankings": _ranking,
    "ratings": _rating,
    "labels": _label,
    "steps": _steps,
    "verdicts": _verdict,
}
