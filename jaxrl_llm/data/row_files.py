"""Rows of data sets in several file formats; each row is a mapping of columns, and their order is always the same.

    rows.jsonl, rows.json       one object per line, or one list
    rows.csv, rows.tsv          a line with the names of the columns, then cells of text
    rows.parquet                needs the extra parquet
    DIRECTORY                   files of one of these formats in the order of their names; or the output of
                                `save_to_disk` of Hugging Face's datasets (extra parquet)
    tfds:NAME/CONFIG:VERSION    prepared by tensorflow-datasets as ArrayRecord, under TFDS_DATA_DIR or
                                ~/tensorflow_datasets; also tfds:DIRECTORY. Needs no TensorFlow
    hf:OWNER/NAME/CONFIG        from the Hugging Face hub (extra datasets)

`@SPLIT` after one of the last three selects a split, such as tfds:NAME@train[:80%]. Files of a directory are splits if
all their names begin with train, validation (valid, val, dev) or test.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrl_llm.bounds import counted
from jaxrl_llm.data.extras import imported
from jaxrl_llm.data.json_files import contents, elements, json_object, place

SPLITS = ("train", "validation", "test")
_CALLED = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


class Row(NamedTuple):
    """One row.

    Attributes:
      number: from 1; the line number in a file of lines.
      where: its location for messages, such as "line 3".
      columns: name -> value, of plain Python; a ValueError with the reason if the row cannot be read. It may be another
        value than a mapping, which the caller must refuse.
    """

    number: int
    where: str
    columns: Any


class Stored(NamedTuple):
    """A data set that can be read.

    Attributes:
      path: its path or name, as given.
      splits: names of its splits; empty if it has none.
      read: (name of a split, "" if there are none) -> its rows, and a hash of their content.
    """

    path: str
    splits: tuple[str, ...]
    read: Callable[[str], tuple[list[Row], str]]

    def own(self, split: str) -> str | None:
        """Its own name for a split (train, validation or test); None if it has no such split."""
        return next((name for name in _CALLED[split] if name in self.splits), None)

    def rows(self, split: str = "train") -> tuple[list[Row], str]:
        """(rows of a split, or all rows of a data set without splits; a hash of their content).

        Raises:
          ValueError: if there are only other splits, or the data cannot be read.
        """
        if not self.splits:
            return self.read("")
        name = self.own(split) if split in _CALLED else split
        if name is None or name.partition("[")[0] not in self.splits:
            raise ValueError(
                f"{self.path} has no split {split!r}; it has {', '.join(self.splits)}: write {self.path}@NAME"
            )
        return self.read(name)


def stored(path: str | Path) -> tuple[Stored, str | None]:
    """(the data set at a path, its split after `@` or None).

    Raises:
      ValueError: for missing data, or an unknown format.
    """
    text = str(path)
    if Path(text).expanduser().exists():
        return _stored(text), None
    base, at, split = text.rpartition("@")
    return (_stored(base), split) if at and split and "/" not in split else (_stored(text), None)


def rows_of(path: str | Path) -> tuple[list[Row], str]:
    """(all rows at a path, a hash of their content); of several splits, the one after `@`, else train.

    Raises:
      ValueError: as for `stored`, or if the data cannot be read.
    """
    found, split = stored(path)
    return found.rows(split or "train")


def first_row(path: str | Path) -> Any:
    """The columns of the first row at a path; of a JSONL file, only this line is parsed.

    Raises:
      ValueError: as for `rows_of`, or if there are no rows.
    """
    file = Path(path).expanduser()
    if _FORMATS.get(file.suffix.lower(), _json) is _json and file.is_file():
        rows: Iterable[Row] = _json(file, contents(file, "data file"))
    else:
        rows = rows_of(path)[0]
    for row in rows:
        return row.columns
    raise ValueError(f"{path} has no rows; give a file with at least one row")


def row_objects(path: str | Path, what: str) -> tuple[list[tuple[str, Mapping[str, Any]]], str]:
    """((location for messages, columns) of every row at a path, a hash of the rows).

    Args:
      path: as for `stored`.
      what: the option with the path, for messages.

    Raises:
      ValueError: for data that cannot be read or are empty, or a row that is not a mapping.
    """
    try:
        rows, digest = rows_of(path)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    objects = []
    for row in rows:
        where = f"{path}, {row.where}"
        if isinstance(row.columns, ValueError):
            raise ValueError(f"{where}: {row.columns}")
        if not isinstance(row.columns, Mapping):
            raise ValueError(f"{where} has a {type(row.columns).__name__}, not an object")
        objects.append((where, row.columns))
    if not objects:
        raise ValueError(f"{path} has no rows; give a file with at least one row")
    return objects, digest


def _stored(path: str) -> Stored:
    kind, colon, name = path.partition(":")
    if colon and kind == "tfds":
        return _prepared(path, name)
    if colon and kind == "hf":
        return _of_hub(path, name)
    place = Path(path).expanduser()
    if place.is_dir():
        return _directory(path, place)
    return Stored(path, (), lambda split: _read([place]))


# ---- files ----------------------------------------------------------------------------------------------------------


def _read(files: Sequence[Path]) -> tuple[list[Row], str]:
    """The concatenated rows of files."""
    rows: list[Row] = []
    digests = []
    for file in files:
        content = contents(file, "data file")
        before = rows[-1].number if rows else 0
        name = f"{file.name}, " if len(files) > 1 else ""
        found = _FORMATS.get(file.suffix.lower(), _json)(file, content)
        rows += [Row(before + number, f"{name}{where}", columns) for number, where, columns in found]
        digests.append(hashlib.sha256(content).hexdigest())
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return rows, digest


def _json(file: Path, content: bytes) -> Iterable[Row]:
    called = place(content)
    for number, value in elements(file, content):
        unread = isinstance(value, ValueError)
        yield Row(number, f"{called} {number}", ValueError(f"not JSON: {value}") if unread else value)


def _csv(file: Path, content: bytes) -> list[Row]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data file {file} is not text in UTF-8 ({error}); save it as UTF-8") from None
    first = text.partition("\n")[0]
    delimiter = "\t" if file.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    longest = csv.field_size_limit(max(len(text), 1))  # a global setting, restored below
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names = next(reader, [])
        if "" in names or len(set(names)) < len(names):
            raise ValueError(
                f"data file {file} has the columns {names}; its first line must give each column a unique name"
            )
        rows = []
        for cells in reader:
            if cells:
                named = counted(len(names), "column")
                wrong = ValueError(f"{counted(len(cells), 'cell')}, but the first line has {named}")
                columns = dict(zip(names, cells, strict=True)) if len(cells) == len(names) else wrong
                rows.append(Row(len(rows) + 1, f"line {reader.line_num}", columns))
        return rows
    except csv.Error as error:
        raise ValueError(f"data file {file}, line {reader.line_num} is not CSV: {error}; repair the line") from None
    finally:
        csv.field_size_limit(longest)


def _parquet(file: Path, content: bytes) -> list[Row]:
    pyarrow, parquet = imported("pyarrow", "parquet"), imported("pyarrow.parquet", "parquet")
    try:
        return _numbered(parquet.read_table(io.BytesIO(content)).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"data file {file} is not a Parquet file: {error}; copy it again") from None


_FORMATS: Mapping[str, Callable[[Path, bytes], Iterable[Row]]] = {
    ".jsonl": _json,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def _directory(path: str, place: Path) -> Stored:
    if (place / "dataset_dict.json").is_file():
        splits = tuple(json_object(place / "dataset_dict.json").get("splits", ()))
        return Stored(path, splits, lambda split: _saved(place / split))
    if (place / "state.json").is_file():
        return Stored(path, (), lambda split: _saved(place))
    if (place / "dataset_info.json").is_file() and (place / "features.json").is_file():
        return _prepared(path, path)
    files = sorted(file for file in place.iterdir() if file.suffix.lower() in _FORMATS and file.name[0] not in "._")
    if not files:
        raise ValueError(f"{path} is a directory without files of {', '.join(_FORMATS)}; give one with data files")
    if len(kinds := {file.suffix.lower() for file in files}) > 1:
        raise ValueError(f"{path} has files of {', '.join(sorted(kinds))}; keep only files of one format")
    of = {split: [f for f in files if f.stem.lower().startswith(names)] for split, names in _CALLED.items()}
    if sum(map(len, of.values())) < len(files):
        return Stored(path, (), lambda split: _read(files))
    return Stored(path, tuple(split for split in SPLITS if of[split]), lambda split: _read(of[split]))


def _saved(place: Path) -> tuple[list[Row], str]:
    """Rows of a directory that `save_to_disk` of Hugging Face's datasets wrote."""
    pyarrow, ipc = imported("pyarrow", "parquet"), imported("pyarrow.ipc", "parquet")
    names = [each["filename"] for each in json_object(place / "state.json").get("_data_files", ())]
    values: list[Any] = []
    for name in names:
        try:
            with pyarrow.memory_map(str(place / name)) as file:
                values += ipc.open_stream(file).read_all().to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"data file {place / name} cannot be read: {error}; save the data set again") from None
    return _hashed(values)


# ---- data sets of libraries ---------------------------------------------------------------------------------------


def _prepared(path: str, name: str) -> Stored:
    """A data set that tensorflow-datasets has prepared, read without the code of its builder."""
    from tensorflow_datasets.core import read_only_builder as reader  # takes a while to import

    builder: Any
    directory, under = Path(name).expanduser(), os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    try:
        if directory.is_dir():
            builder = reader.builder_from_directory(str(directory))
        else:
            builder = reader.builder_from_files(name, data_dir=os.path.expanduser(under))
    except Exception as error:  # of several types, depending on what is missing
        raise ValueError(
            f"{path} is not a data set that tensorflow-datasets has prepared in {under} ({type(error).__name__}); "
            "prepare it with tfds build --file_format=array_record, set TFDS_DATA_DIR, or give the directory of the "
            "version, tfds:DIR/NAME/1.0.0"
        ) from None
    form = builder.info.file_format
    if form is not None and form.value != "array_record":
        raise ValueError(
            f"{path} is stored as {form.value}, which only TensorFlow can read; prepare it again with "
            "tfds build --file_format=array_record"
        )

    def read(split: str) -> tuple[list[Row], str]:
        try:
            source = builder.as_data_source(split=split)
            return _hashed(source.__getitems__(range(len(source))) if len(source) else [])
        except Exception as error:
            raise ValueError(f"{path}@{split} cannot be read: {type(error).__name__}: {error}") from None

    return Stored(path, tuple(builder.info.splits or ()), read)


def _of_hub(path: str, name: str) -> Stored:
    datasets = imported("datasets", "datasets")
    owner, _, rest = name.partition("/")
    repository, _, config = rest.partition("/")
    where = ("/".join(filter(None, (owner, repository))), config or None)
    try:
        splits = tuple(datasets.get_dataset_split_names(*where))
    except Exception as error:
        raise ValueError(
            f"{path} cannot be found on the hub: {type(error).__name__}: {str(error)[:200]}; give hf:OWNER/NAME or "
            "hf:OWNER/NAME/CONFIG, or save it with save_to_disk and give the directory"
        ) from None
    return Stored(path, splits, lambda split: _hashed(list(datasets.load_dataset(*where, split=split))))


def _hashed(values: Sequence[Any]) -> tuple[list[Row], str]:
    """(values as rows, a hash of their content)."""
    rows, digest = _numbered(values), hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.columns, sort_keys=True, default=str).encode() + b"\n")
    return rows, digest.hexdigest()


def _numbered(values: Sequence[Any]) -> list[Row]:
    return [Row(number, f"row {number}", _plain_or_error(value)) for number, value in enumerate(values, start=1)]


def _plain_or_error(value: Any) -> Any:
    try:
        return plain_value(value)
    except ValueError as error:
        return error


def plain_value(value: Any) -> Any:
    """A value of another library as text, numbers, lists and dictionaries of Python, for JSON.

    Messages of a chat that are stored as a list of roles and a list of contents become a list of messages.

    Raises:
      ValueError: for bytes that are not text, and for values of other types.

    >>> plain_value({"a": b"text", "b": float("nan")})
    {'a': 'text', 'b': None}
    """
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ValueError("a column has bytes that are not text; remove it from the data") from None
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        plain = {str(name): plain_value(one) for name, one in value.items()}
        return _messages(plain) if {"role", "content"} <= plain.keys() else plain
    if isinstance(value, list | tuple):
        return [plain_value(one) for one in value]
    if hasattr(value, "tolist"):  # of numpy
        return plain_value(value.tolist())
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    raise ValueError(f"a column has a {type(value).__name__}, which is neither text nor a number; remove it")


def _messages(columns: dict[str, Any]) -> Any:
    """The messages of a chat from their columns, as tensorflow-datasets returns a sequence of records."""
    lists = [value for value in columns.values() if isinstance(value, list)]
    if len(lists) < len(columns) or len({len(value) for value in lists}) > 1:
        return columns
    return [dict(zip(columns, each, strict=True)) for each in zip(*lists, strict=True)]
