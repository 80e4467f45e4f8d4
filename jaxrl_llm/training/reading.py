"""Readings: functions that run on the host between two programs, because they read text or call a service.

In a run of several processes, each process reads the rows of its own devices. If all prompts have the same number of
samples, all samples of a prompt are read by the same process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxrl_llm.bounds import shown
from jaxrl_llm.experience import Experience, TrainState, without_end
from jaxrl_llm.fields import FIELDS, TEXT, absent_value, is_written_text, kind_of
from jaxrl_llm.parallel import hosts
from jaxrl_llm.rewards.host import Reading, RewardError, answered
from jaxrl_llm.signatures import declared_widths, names, per_row, signature
from jaxrl_llm.terms import View
from jaxrl_llm.training.segments import Host, Work

# Fields of rows that every reading needs.
_ALWAYS = ("tokens", "length", "weight", "group", "prompt_id")


@dataclass
class Context:
    """Host-side resources of one call of a step.

    Attributes:
      items: one dictionary per prompt of the whole batch (body, answer, ...), on every process; or None.
      decode, encode: token ids -> text, and back.
      eos_ids: ends of sequence, which the texts of completions do not contain.
      call: caller of an open environment in Python.
      stop: called before each program and host call; may raise to abort the step.
      numbers: seconds and failures of readings, by metric.
    """

    items: Sequence[Mapping[str, Any]] | None = None
    decode: Callable[[Sequence[int]], str] | None = None
    encode: Callable[[str], list[int]] | None = None
    eos_ids: tuple[int, ...] = ()
    call: Any = None
    stop: Callable[[], None] = lambda: None
    numbers: dict[str, float] = field(default_factory=dict)

    def required_items(self) -> Sequence[Mapping[str, Any]]:
        """The items.

        Raises:
          ValueError: if the caller passed none.
        """
        if self.items is None:
            raise ValueError(
                "this step reads text: call step(state, prompts, items) with one dictionary per prompt (body, answer, "
                "...)"
            )
        return self.items


def reading_part(name: str, terms: Sequence[Any], outputs: Mapping[str, Sequence[str]], key: str, sample: Any) -> Host:
    """The part that fills fields by readings.

    Args:
      name: for messages.
      terms: readings (`Reward` or `Fill`) with different names.
      outputs: term name -> fields that it fills.
      key: entry of work with the rows.
      sample: rows per group.
    """

    def read(state: TrainState, work: Work, context: Context) -> Work:
        rows = work[key]
        values = _read_by_all(terms, outputs, rows, state, work, context, sample)
        return {key: rows.filled(**values)}

    def shapes(state: TrainState, work: Work) -> Work:
        count, width = work[key].tokens.shape
        made = {}
        for term in terms:
            for field_name in outputs[term.name]:
                kind = kind_of(field_name)
                behind = declared_widths(term.function) if kind == "vector" else ()
                shape = (count, width) if kind == "token" else (count, *behind)
                made[field_name] = jax.ShapeDtypeStruct(shape, _dtype(field_name))
        return {key: work[key].filled(**made)}

    return Host(name, read, shapes)


def _said(context: Context, tokens: np.ndarray, length: np.ndarray) -> list[str]:
    """Texts of completions, without end of sequence."""
    assert context.decode is not None
    return [
        context.decode(without_end(row[:count].tolist(), context.eos_ids))
        for row, count in zip(tokens, length, strict=True)
    ]


def _dtype(name: str) -> Any:
    return jnp.int32 if name.endswith("_id") else jnp.float32


def view_part(view: View, key: str, samples: int) -> Host:
    """The part that makes the sequences of a view on the host: `<view>_tokens`, `<view>_length`, `<view>_mask`, and
    those of their prompts.

    Args:
      view: with a reading as its function.
      key: entry of work with the rows.
      samples: rows per group.
    """

    def widths(rows: Experience) -> tuple[int, int]:
        width = rows.tokens.shape[1]
        return view.max_prompt_tokens or rows.prompt_tokens.shape[1] + width, view.max_completion_tokens or width

    def read(state: TrainState, work: Work, context: Context) -> Work:
        rows = work[key]
        assert context.encode is not None  # ensured by `checked`
        entry = partial(_prompt if view.written_by else _pair, context.encode, widths(rows))
        packed = partial(_packed, widths(rows))
        return {key: rows.filled(**_read_by_all([view], {}, rows, state, work, context, samples, entry, packed))}

    def shapes(state: TrainState, work: Work) -> Work:
        count = work[key].tokens.shape[0]
        made = jax.eval_shape(lambda: {n: jnp.asarray(x) for n, x in _packed(widths(work[key]), [], [], count).items()})
        return {key: work[key].filled(**{f"{view.name}_{name}": x for name, x in made.items()})}

    return Host("reading", read, shapes)


def _pair(encode: Callable[[str], list[int]], widths: tuple[int, int], entry: Any) -> tuple[list[int], list[int]]:
    """The result of a view on the host for a row, as token ids."""
    if isinstance(entry, str) or not isinstance(entry, Sequence) or len(entry) != 2:
        raise ValueError(
            f"a view must return one pair (prompt, completion) per row, of texts or lists of token ids, not {entry!r}"
        )
    prompt, completion = (encode(part) if isinstance(part, str) else [int(one) for one in part] for part in entry)
    names = ("max_prompt_tokens", "max_completion_tokens")
    for what, ids, width in zip(names, (prompt, completion), widths, strict=True):
        if len(ids) > width:
            raise ValueError(f"{len(ids)} tokens, but {what} is {width}; raise it in the view's entry, or return fewer")
    if not prompt:
        raise ValueError("the prompt has no tokens; return a prompt of at least one token")
    return prompt, completion


def _prompt(encode: Callable[[str], list[int]], widths: tuple[int, int], entry: Any) -> tuple[list[int], list[int]]:
    """The prompt of a written view; its completion of one token marks that the row has a prompt."""
    if not isinstance(entry, str) and not (isinstance(entry, Sequence) and all(isinstance(one, int) for one in entry)):
        raise ValueError(f"a written view must return one prompt per row, a text or a list of token ids, not {entry!r}")
    return _pair(encode, widths, (entry, [0]))


def _packed(widths: tuple[int, int], values: Sequence[Any], present: Sequence[int], count: int) -> dict[str, Any]:
    """Pairs of token ids as the arrays of `Sequences`; rows without one have the mask 0."""
    prompts, tokens = (np.zeros((count, width), np.int32) for width in widths)
    prompt_length, length = np.ones(count, np.int32), np.zeros(count, np.int32)
    for row, pair in zip(present, values, strict=True):
        if pair is not None:
            prompt, completion = pair
            prompts[row, widths[0] - len(prompt) :], tokens[row, : len(completion)] = prompt, completion
            prompt_length[row], length[row] = len(prompt), len(completion)
    mask = (np.arange(widths[1]) < length[:, None]).astype(np.float32)
    made = {"prompt_tokens": prompts, "prompt_length": prompt_length, "tokens": tokens, "length": length}
    return made | {"mask": mask}


def _read_by_all(
    terms: Sequence[Any],
    outputs: Mapping[str, Sequence[str]],
    rows: Experience,
    state: TrainState,
    work: Work,
    context: Context,
    samples: int,
    entry: Callable[[Any], Any] | None = None,
    packed: Callable[..., dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Values by name for the whole batch, sharded like the rows. All processes must call it. `entry`, `packed`: of a
    view."""
    wanted = frozenset().union(*(names(term.function) for term in terms)) - TEXT
    wanted |= {f"{name[:-5]}_{part}" for name in wanted if is_written_text(name) for part in ("tokens", "length")}
    read = {name: rows[name] for name in {*_ALWAYS, *wanted} if name in rows}
    placement = rows.weight.sharding if isinstance(rows.weight, jax.Array) else None
    prompt_ids = work["prompts"].prompt_id if work.get("prompts") is not None else None
    if jax.process_count() == 1:
        here = jax.device_get(read)
        ids = None if prompt_ids is None else np.asarray(jax.device_get(prompt_ids))
        first_rows = np.arange(rows.tokens.shape[0])
        values = read_values(terms, outputs, here, ids, state, context, first_rows, entry, packed)
        if isinstance(placement, NamedSharding):  # without a mesh, explicit placement would compile programs twice
            return {name: jax.device_put(value, placement) for name, value in values.items()}
        return values
    assert isinstance(placement, NamedSharding)
    ids = None if prompt_ids is None else np.asarray(hosts.host_copy(prompt_ids))
    groups = rows.tokens.shape[0] // samples
    mine, own = hosts.own_rows(hosts.by_rows(read, groups, cast(Mesh, placement.mesh)))
    values, failure = {}, None
    try:
        values = read_values(terms, outputs, own, ids, state, context, mine, entry, packed)
    except RewardError as error:
        failure = error
    # If one process raised on its own, the others would wait for its rows.
    said = hosts.first_failure(None if failure is None else str(failure))
    if said is not None:
        raise RewardError(said) from failure
    whole = {name: hosts.gathered_rows(mine, value, rows.tokens.shape[0]) for name, value in values.items()}
    return {
        name: jax.make_array_from_callback(value.shape, placement, lambda index, v=value: v[index])
        for name, value in whole.items()
    }


def read_values(
    terms: Sequence[Any],
    outputs: Mapping[str, Sequence[str]],
    rows: Mapping[str, np.ndarray],
    prompt_ids: np.ndarray | None,
    state: TrainState,
    context: Context,
    first_rows: np.ndarray,
    entry: Callable[[Any], Any] | None,
    packed: Callable[..., dict[str, Any]] | None,
) -> dict[str, np.ndarray]:
    """Values of the local rows, by name. Rows of weight 0 are not passed to the functions."""
    count, width = rows["tokens"].shape
    present = np.flatnonzero(rows["weight"] > 0)
    text: dict[str, Any] = {}
    # A name that is neither a text nor an array of the rows is a column of the data.
    asked_for = frozenset().union(*(names(term.function) for term in terms)) - TEXT - rows.keys() - {"step"}
    written = {name for name in asked_for if is_written_text(name) and f"{name[:-5]}_tokens" in rows}
    asked_for -= written
    needed = frozenset().union(*(signature(term.function).required for term in terms)) & asked_for
    if reads_items(terms) or needed:
        items = context.required_items()
        item_of = item_numbers(rows["prompt_id"], rows["group"], prompt_ids, items)[present]
        text["items"] = [items[number] for number in item_of]
        text["prompts"] = [item.get("body", "") for item in text["items"]]
        text["answers"] = [item.get("answer", "") for item in text["items"]]
        every = columns_of(items[:1]) if any(signature(term.function).anything for term in terms) else frozenset()
        for name in (asked_for | every) - rows.keys():
            values = [column(item, name) for item in text["items"]]
            if name in needed or any(value is not None for value in values):
                text[name] = values
    if context.decode is not None:
        text["completions"] = _said(context, rows["tokens"][present], rows["length"][present])
        for name in written:
            length = rows[f"{name[:-5]}_length"][present]
            said = _said(context, rows[f"{name[:-5]}_tokens"][present], length)
            text[name] = [one if count else None for one, count in zip(said, length, strict=True)]
    arrays = {name: value[present] for name, value in rows.items()}
    found: dict[str, np.ndarray] = {}
    for term in terms:
        asked = names(term.function)
        if signature(term.function).anything:  # all texts; for a function of one row, the texts of that row
            asked |= text.keys() - (_PLURAL.keys() | set(_PLURAL.values()) if per_row(term.function) else set())
        data = {name: value for name, value in (text | arrays).items() if name in asked}
        if signature(term.function).anything and per_row(term.function):
            asked = asked | _PLURAL.keys()
        data |= {one: text[many] for one, many in _PLURAL.items() if one in asked and many in text}
        told = Reading(term.function, term.name, term.deadline_s, term.value_on_failure, entry=entry)
        if "step" in asked:
            told = replace(told, constants={"step": int(state.step)})
        answers = answered(told, data, rows=len(present), names=outputs.get(term.name, (term.name,)))
        context.numbers[f"seconds/{term.name}"] = answers.seconds
        if answers.failures or term.value_on_failure is not None:
            context.numbers[f"failures/{term.name}"] = float(answers.failures)
        for name, value in getattr(term.function, "report", dict)().items():
            context.numbers[f"judge/{term.name}/{name}"] = value
        for name, values in answers.values.items():
            if packed is not None:
                found |= {f"{name}_{part}": array for part, array in packed(values, present, count).items()}
                continue
            found[name] = _spread(values, name, present, count, width, first_rows, rows["group"])
    return found


def reads_items(terms: Sequence[Any], columns: Collection[str] = ()) -> bool:
    """Whether any of the readings (`Reward` or `Fill`) reads records or columns of the data."""
    asked = [signature(term.function) for term in terms if term.on_host]
    wanted = _OF_ITEMS.union(columns)
    return any(read.anything or wanted & {*read.required, *read.optional} for read in asked)


def columns_of(items: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """Names of the fields of records, and of the columns of their lines, that readings may read beside text."""
    found = {name for item in items for name in (*item, *(item.get("raw") or ()))}
    return frozenset(name for name in found if name.isidentifier()) - TEXT - FIELDS.keys() - {"raw", "row_of_file"}


def column(item: Mapping[str, Any], name: str) -> Any:
    """A field of a record, or of the line that it was read from; None if there is none."""
    return item[name] if name in item else (item.get("raw") or {}).get(name)


_EXACT = 2**24  # above this float32 cannot represent all integers
_OF_ITEMS = TEXT - {"completions", "completion"}
_PLURAL = {"completion": "completions", "prompt": "prompts", "answer": "answers", "item": "items"}


def item_numbers(
    ids: np.ndarray, groups: np.ndarray, prompt_ids: np.ndarray | None, items: Sequence[Mapping[str, Any]]
) -> np.ndarray:
    """The index of the item of each row: by the id of its prompt, or by its group if ids are not unique.

    Args:
      ids, groups: prompt and group of each row.
      prompt_ids: ids of the prompts of the items, in order; None if unknown.
      items: may contain the id of their prompt as `item_id`.
    """
    if all("item_id" in item for item in items):
        known = [item["item_id"] for item in items]
    else:
        told_apart = prompt_ids is not None and len(np.unique(prompt_ids)) == len(prompt_ids) <= len(items)
        known = prompt_ids.tolist() if prompt_ids is not None and told_apart else []
    place = {int(number): index for index, number in enumerate(known)}
    if place and all(int(number) in place for number in ids):
        return np.array([place[int(number)] for number in ids], int)
    return groups.astype(int) % max(len(items), 1)


def _spread(
    values: list[Any],
    name: str,
    present: np.ndarray,
    count: int,
    width: int,
    first_rows: np.ndarray,
    groups: np.ndarray,
) -> np.ndarray:
    """One entry per row of the batch, from the entries of the present rows; None means "does not apply"."""
    absent = float("nan") if "/" in name else absent_value(name)
    if any(isinstance(value, str) for value in values):
        if name.startswith(("reward/", "metric/")) or name == "rewards":
            row = next(row for row, value in enumerate(values) if isinstance(value, str))
            raise RewardError(
                f"{name.partition('/')[2] or name!r} returned the text {shown(values[row], 60)} at row {present[row]}; "
                "it must return one number for each row, or None where it does not apply"
            )
        # Equal texts of a group get the index of the first row of the group with this text, as in `rewards.answer_ids`:
        # this is exact, and independent of tokenizer and number of processes.
        ids, seen = np.full(count, -1, np.int32), {}
        for row, value in zip(present, values, strict=True):
            if value is not None:
                ids[row] = seen.setdefault((int(groups[row]), value), int(first_rows[row]))
        return ids
    shaped = [np.asarray(value, np.float32) for value in values if value is not None]
    per_token = kind_of(name) == "token" or (kind_of(name) == "either" and any(value.ndim for value in shaped))
    if per_token and "/" not in name:
        whole = np.full((count, width), absent, np.float32)
        for row, value in zip(present, values, strict=True):
            if value is not None:
                whole[row, : len(value)] = value
        return whole
    one = shaped[0].shape if shaped else ()
    whole = np.full((count, *one), absent, np.float32)
    for row, value in zip(present, values, strict=True):
        if value is not None:
            if np.shape(value) != one:
                raise RewardError(
                    f"{name!r} has shape {np.shape(value)} at row {row}, and {one} at another; give all rows one shape"
                )
            whole[row] = value
    if not name.endswith("_id"):
        return whole
    exact = (whole == np.round(whole)) & (np.abs(whole) < _EXACT)
    if not exact.all() or (kind_of(name) == "row" and one):
        row = int(np.argmin(exact.reshape(count, -1).all(axis=1)))
        raise RewardError(
            f"{name!r} is {whole[row]} at row {row}, and is compared by equality: return a text, or one whole number "
            f"below {_EXACT}"
        )
    return whole.astype(np.int32)
