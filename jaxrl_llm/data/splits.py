"""The problems of a run: splits that never overlap, of one data set or a weighted mixture of several.

Omitted rows are counted by reason.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from jaxrl_llm.bounds import counted, there_are
from jaxrl_llm.data.jsonl import Fields, records_of, require_usable
from jaxrl_llm.data.prompts import PLACE, require_place
from jaxrl_llm.data.row_files import SPLITS, Row, stored
from jaxrl_llm.data.row_templates import holds, is_template, rendered
from jaxrl_llm.data.tasks.items import named_item, own_columns, split_of


@dataclass(frozen=True)
class Refining:
    """Which rows of a data set become problems; omitted rows are counted.

    Attributes:
      where: conditions on the columns that rows have to meet, expressions of jinja2 such as "level|int < 3"; `body`,
        `answer` and `response` are columns, too.
      limit: largest number of training problems, the first ones; None takes all.
      duplicates: "keep", or "drop" for prompts that an earlier row of the split has.
      overlap: of splits: "error", "drop" for prompts of a split that also occur in an evaluation split, or "keep".
      unusable: rows without a readable prompt or answer: "error" or "drop".
    """

    where: tuple[str, ...] = ()
    limit: int | None = None
    duplicates: Literal["keep", "drop"] = "keep"
    overlap: Literal["error", "drop", "keep"] = "error"
    unusable: Literal["error", "drop"] = "error"


@dataclass(frozen=True)
class ProblemSet(Sequence[dict[str, Any]]):
    """Records of one split, read by index as from `DataSet`.

    A record has `item_id` (number of its row, from 0), `body` (text of the prompt), `answer` and `response` (reference
    completion), "" if there is none, `messages` (the prompt's conversation, if the rows have one), the further columns
    of the row by their names, `raw` (the unchanged row), `row_of_file` (its place, for messages), in a mixture
    `data_source` (name of its source), `prefix` (solved examples before the prompt, if there are any), and with several
    templates `template` (name of its template) and `wording` (text of the template).

    Attributes:
      path: of the data.
      split: "train", "validation" or "test".
      records: the records.
      fingerprint: hash over the content, how it was read, and the split, for checkpoints.
      dropped: number of omitted rows, by reason.
      sources: names of the sources of a mixture.
      weights: their shares of the prompts of a step, up to a factor; empty if all records come equally often.
    """

    path: str
    split: str
    records: tuple[dict[str, Any], ...]
    fingerprint: str
    dropped: Mapping[str, int] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.records[index]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self.records[index] for index in indices]


def problem_sets(
    path: str | Path,
    fields: Fields,
    *,
    validation_path: str | Path | None = None,
    test_path: str | Path | None = None,
    refining: Refining = Refining(),
) -> dict[str, ProblemSet]:
    """The three splits of a user's data.

    A split with its own path is read from there; a split that the data set at `path` has by name is taken from it. Any
    other split is a part of `path` by the hash of the prompt (8 of 10 train, 1 validation, 1 test), so that it stays
    the same when rows are added or moved, and equal prompts share a split.

    Args:
      path: training data, and splits without their own path; see `row_files`.
      fields: which columns hold what.
      validation_path: of the validation split.
      test_path: of the test split.
      refining: which rows are used.

    Raises:
      ValueError: for data that are missing, rows that cannot be used (named), a split without any row, or a prompt that
        occurs in two splits.
    """
    found, named = stored(path)
    read = {"train": _kept(f"{path}", *found.rows(named or "train"), fields, refining)}
    places = {"train": str(path)}
    for split, own in (("validation", validation_path), ("test", test_path)):
        if own is not None:
            other, of_it = stored(own)
            read[split] = _kept(str(own), *other.rows(of_it or split), fields, refining)
            places[split] = str(own)
        elif named is None and (name := found.own(split)):
            read[split] = _kept(f"{path}@{name}", *found.rows(name), fields, refining)
            places[split] = f"{path}@{name}"
    cut = [split for split in SPLITS if split not in read]
    sets = {}
    for split in SPLITS:
        file, (records, digest, dropped) = places.get(split, places["train"]), read.get(split, read["train"])
        if split in cut:
            records = [each for each in records if split_of(prompt_key(each)) == split]
        elif split == "train":
            records = [each for each in records if split_of(prompt_key(each)) not in cut]
        if not records:
            raise ValueError(
                f"no line of {file} falls into the {split} split, which has the prompts with some values of a hash; "
                "add lines, or set a separate file for this split"
                if not dropped
                else f"no row of {file} is left for the {split} split: {sum(dropped.values())} were dropped "
                f"({', '.join(dropped)}); remove conditions, or give more rows"
            )
        print_of = [digest, asdict(fields), split, cut if split in cut or split == "train" else []]
        if refining != Refining():
            print_of.append(asdict(refining))
        fingerprint = hashlib.sha256(json.dumps(print_of).encode()).hexdigest()
        of_file = dropped if split not in cut else {}
        sets[split] = ProblemSet(file, split, tuple(records), fingerprint, dict(of_file))
    return _limited(_disjoint(_distinct(sets, refining), refining.overlap), refining)


def _kept(
    path: str, rows: Sequence[Row], digest: str, fields: Fields, refining: Refining
) -> tuple[list[dict[str, Any]], str, dict[str, int]]:
    """(records of the used rows, hash of all rows, number of omitted rows by reason)."""
    records, problems = records_of(path, rows, fields)
    if refining.unusable == "error":
        require_usable(path, records, problems)
    dropped = {"no readable prompt or answer": len(problems)} if problems else {}
    for condition in refining.where:
        met = []
        for each in records:
            try:
                if holds(condition, _readable(each)):
                    met.append(each)
            except ValueError as error:
                raise ValueError(f"{named_item(each)}: the condition {error}") from None
        if len(met) < len(records):
            dropped[f"not {condition}"] = len(records) - len(met)
        records = met
    return records, digest, dropped


def _readable(item: Mapping[str, Any]) -> dict[str, Any]:
    """What conditions and templates can read of a record."""
    return {name: item[name] for name in ("body", "answer", "response") if name in item} | own_columns(item)


def _distinct(sets: dict[str, ProblemSet], refining: Refining) -> dict[str, ProblemSet]:
    if refining.duplicates == "keep":
        return sets
    return {
        split: _left(one, "duplicate prompt", {prompt_key(each): each["item_id"] for each in reversed(one.records)})
        for split, one in sets.items()
    }


def _left(one: ProblemSet, reason: str, first: Mapping[str, int]) -> ProblemSet:
    """Without the records whose prompt `first` maps to another record."""
    kept = tuple(each for each in one.records if first.get(prompt_key(each), each["item_id"]) == each["item_id"])
    gone = len(one.records) - len(kept)
    return replace(one, records=kept, dropped={**one.dropped, reason: gone}) if gone else one


def _disjoint(sets: dict[str, ProblemSet], overlap: str) -> dict[str, ProblemSet]:
    if overlap == "keep":
        return sets
    if overlap == "error":
        _require_disjoint(sets)
        return sets
    found, measured = dict(sets), {}
    for split in sorted(sets, key=SPLITS.index, reverse=True):
        found[split] = _left(sets[split], "prompt of another split", measured)
        measured |= dict.fromkeys(map(prompt_key, sets[split].records), -1)
        if not found[split].records:
            raise ValueError(
                f"every prompt of {sets[split].path} ({split}) is also in another split; give other prompts"
            )
    return found


def _limited(sets: dict[str, ProblemSet], refining: Refining) -> dict[str, ProblemSet]:
    train, limit = sets["train"], refining.limit
    if limit is None or len(train) <= limit:
        return sets
    dropped = {**train.dropped, f"beyond the limit of {limit}": len(train) - limit}
    return sets | {"train": replace(train, records=train.records[:limit], dropped=dropped)}


def _require_disjoint(sets: Mapping[str, ProblemSet]) -> None:
    seen: dict[str, str] = {}
    for split in filter(sets.__contains__, SPLITS):
        held = {prompt_key(item): f"{_place(item)} ({split})" for item in sets[split].records}
        for key in held.keys() & seen.keys():
            raise ValueError(
                f"the prompt {key[:80]!r} is in {seen[key]} and in {held[key]}; splits must not overlap: remove it "
                "from one, or set data.overlap to drop, which removes it from training"
            )
        seen |= held


def _place(item: Mapping[str, Any]) -> str:
    source = item.get("data_source")
    return named_item(item) if source is None else f"{named_item(item)} in source {source}"


def mixture(
    parts: Mapping[str, Mapping[str, Sequence[dict[str, Any]]]],
    weights: Sequence[float] = (),
    *,
    overlap: Literal["error", "drop", "keep"] = "error",
) -> dict[str, ProblemSet]:
    """Several sources as one data set; the column `data_source` of a record is the name of its source.

    The id of a record depends on its id in its source and on the number of sources, not on their sizes.

    Args:
      parts: name of a source -> its splits, the same of each; `ProblemSet`s or `DataSet`s.
      weights: of the sources in training, in their order; empty uses all records equally often.
      overlap: for splits of different sources, as in `Refining`.

    Raises:
      ValueError: for splits that overlap.
    """
    sets = {}
    for split in next(iter(parts.values())):
        records, dropped, prints = [], {}, []
        for place, (name, part) in enumerate(parts.items()):
            one: Any = part[split]
            records += [{**each, "item_id": each["item_id"] * len(parts) + place, "data_source": name} for each in one]
            dropped |= {f"{name}: {reason}": count for reason, count in getattr(one, "dropped", {}).items()}
            prints.append([name, one.fingerprint])
        fingerprint = hashlib.sha256(json.dumps([list(weights), prints]).encode()).hexdigest()
        path = f"a mixture of {', '.join(parts)}"
        sets[split] = ProblemSet(path, split, tuple(records), fingerprint, dropped, tuple(parts), tuple(weights))
    return _disjoint(sets, overlap)


def with_examples(
    sets: Mapping[str, Sequence[dict[str, Any]]],
    count: int,
    shown: Callable[[Mapping[str, Any]], str],
    given: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, ProblemSet]:
    """Problems with solved examples before their prompts, the same for all.

    Args:
      sets: splits, with a training split unless examples are given.
      count: number of examples: training problems, the first by the hash of their prompts, which are then removed from
          training.
      shown: record -> text of an example.
      given: records to take the examples from, instead of training problems.

    Raises:
      ValueError: for fewer than `count` records.
    """
    of = list(sets["train"] if given is None else given)
    if len(of) < count + (given is None):
        raise ValueError(f"data.few_shot.examples is {count}, but {there_are(len(of), 'problem')} to take them from")
    if given is None:
        of.sort(key=lambda each: hashlib.sha256(prompt_key(each).encode()).digest())
    prefix, keys, found = "".join(map(shown, of[:count])), {prompt_key(each) for each in of[:count]}, {}
    for split, one in sets.items():
        records = tuple({**each, "prefix": prefix} for each in one if prompt_key(each) not in keys)
        gone = len(one) - len(records)
        if gone and split != "train":
            shown_too = counted(gone, "problem")
            raise ValueError(f"data.few_shot.path has {shown_too} of the {split} split; take other examples")
        known: Any = one
        dropped = dict(getattr(one, "dropped", {})) | ({"shown as an example": gone} if gone else {})
        fingerprint = hashlib.sha256(f"{known.fingerprint} {prefix}".encode()).hexdigest()
        path = getattr(one, "path", "") or getattr(one, "directory", "")
        found[split] = ProblemSet(path, split, records, fingerprint, dropped)
    return found


def with_templates(sets: Mapping[str, Sequence[dict[str, Any]]], templates: Mapping[str, str]) -> dict[str, ProblemSet]:
    """Each training problem once in every template, as separate problems; other splits use only the first template.

    An epoch thus has each prompt in all templates, and the samples of a group share one template. If the problems are
    not a mixture, `data_source` is the name of the template, and metrics are reported for each template.

    Args:
      sets: splits.
      templates: name -> text with `{body}` in each place of the prompt, and columns of the record as in jinja2, such as
        a hint.

    Raises:
      ValueError: for a text without a place for the prompt, or a column that a record does not have.
    """
    for name, text in templates.items():
        require_place(f"data.templates.{name}", text)
    first, found = next(iter(templates)), {}
    for split, one in sets.items():
        names = list(templates) if split == "train" else [first]
        records, known = [], cast(Any, one)
        sources = getattr(one, "sources", ())
        for each in one:
            for place, name in enumerate(names):
                own = {"item_id": each["item_id"] * len(templates) + place, "template": name}
                text = templates[name]
                wording = rendered(text, _readable(each)) if is_template(text) else text
                own |= {"wording": wording} | ({} if sources else {"data_source": name})
                records.append({**each, **own})
        fingerprint = hashlib.sha256(f"{known.fingerprint} {json.dumps(list(templates.items()))}".encode()).hexdigest()
        path = getattr(one, "path", "") or getattr(one, "directory", "")
        more = {"dropped": getattr(one, "dropped", {}), "weights": getattr(one, "weights", ())}
        sources = sources or (tuple(names) if split == "train" else ())
        found[split] = ProblemSet(path, split, tuple(records), fingerprint, **more, sources=sources)
    return found


def with_column(
    sets: Mapping[str, Sequence[dict[str, Any]]], name: str, text: str, *, of_prompt: bool = True
) -> dict[str, ProblemSet]:
    """Problems with one more column: a template filled with their prompts and other columns.

    Args:
      sets: splits.
      name: of the column.
      text: with `{body}` in the place of the prompt, and columns of the record as in jinja2.
      of_prompt: the text must have a place for the prompt.

    Raises:
      ValueError: for a text without a place for the prompt, or a column that a record does not have.
    """
    if of_prompt:
        require_place(f"data.{name}", text)

    def made(each: Mapping[str, Any]) -> str:
        own = rendered(text, _readable(each)) if is_template(text) else text
        return own.replace(PLACE, each["body"])

    return with_made_column(sets, name, made, text)


def with_made_column(
    sets: Mapping[str, Sequence[dict[str, Any]]], name: str, made: Callable[[Mapping[str, Any]], str], described: str
) -> dict[str, ProblemSet]:
    """Problems with one more column, computed by a function of the others.

    Args:
      sets: splits.
      name: of the column.
      made: record -> text.
      described: identifies the function; equal descriptions must give equal columns.

    Raises:
      ValueError: for conversations, which have no single prompt; errors of `made` are passed on.
    """
    found = {}
    for split, one in sets.items():
        known, records = cast(Any, one), []
        for each in one:
            if "body" not in each:
                raise ValueError(
                    f"data.{name} is {described!r}, but conversations have no single prompt to insert; remove it"
                )
            records.append({**each, name: made(each)})
        fingerprint = hashlib.sha256(f"{known.fingerprint} {name} {described}".encode()).hexdigest()
        path = getattr(one, "path", "") or getattr(one, "directory", "")
        more = {key: getattr(one, key) for key in ("dropped", "weights", "sources") if hasattr(one, key)}
        found[split] = ProblemSet(path, split, tuple(records), fingerprint, **more)
    return found


def prompt_key(item: Mapping[str, Any]) -> str:
    """Key of equal prompts: the text, or the whole conversation."""
    return json.dumps(item["messages"], sort_keys=True) if "messages" in item else item["body"]
