"""Rows of data sets: the same columns, whatever they are stored as, and a sentence for what cannot be read."""

from __future__ import annotations

import builtins
import csv
import datetime
import decimal
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxrl_llm.data import DataSpec, data_set
from jaxrl_llm.data.row_files import first_row, plain_value, row_objects, rows_of, stored
from jaxrl_llm.data.row_templates import column_value, holds, rendered

ROWS = [{"question": f"{n} + 1?", "answer": str(n + 1), "level": n} for n in range(5)]


def as_jsonl(place, rows):
    place.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place.with_suffix(".jsonl")


def as_csv(place, rows):
    with place.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return place.with_suffix(".csv")


def as_parquet(place, rows):
    pa.parquet.write_table(pa.Table.from_pylist(rows), place.with_suffix(".parquet"))
    return place.with_suffix(".parquet")


def as_saved(place, rows):
    """As `Dataset.save_to_disk` of Hugging Face's datasets writes it."""
    place.mkdir()
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(place / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    (place / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (place / "dataset_info.json").write_text("{}")
    return place


@pytest.mark.parametrize("write", [as_jsonl, as_csv, as_parquet, as_saved])
def test_every_format_gives_the_same_rows(tmp_path, write):
    path = write(tmp_path / "rows", ROWS)
    rows, digest = rows_of(path)
    text = write is as_csv  # whose cells are text
    assert [row.columns for row in rows] == [row | {"level": str(row["level"])} if text else row for row in ROWS]
    assert [row.number for row in rows] == [1, 2, 3, 4, 5]
    assert first_row(path) == rows[0].columns
    assert rows_of(path)[1] == digest
    path = write(tmp_path / "other", [*ROWS, ROWS[0]])
    assert rows_of(path)[1] != digest


def test_a_prepared_tfds_data_set_is_read_by_name_or_directory(tmp_path, monkeypatch):
    made = data_set(DataSpec("addition", (1,), "train", 12), str(tmp_path))
    imported = builtins.__import__

    def without_tensorflow(name, *args, **kwargs):
        assert name.partition(".")[0] != "tensorflow"
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tensorflow)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for path in (f"tfds:task_items/{made.spec.name}:1.0.0", f"tfds:{made.directory}", made.directory):
        rows, _ = rows_of(path)
        assert [row.columns["body"] for row in rows] == [each["body"] for each in made]
        assert stored(path)[0].splits == ("train",)
    assert len(rows_of(f"tfds:{made.directory}@train[:25%]")[0]) == 3
    with pytest.raises(ValueError, match=r"has no split 'test'; it has train: write tfds:.*@NAME"):
        rows_of(f"tfds:{made.directory}@test")
    with pytest.raises(ValueError, match="tfds:nothing is not a data set that tensorflow-datasets has prepared in"):
        rows_of("tfds:nothing")


def test_a_directory_is_its_files_in_order_or_its_splits(tmp_path):
    (tmp_path / "all").mkdir()
    for name, part in (("b", ROWS[:2]), ("a", ROWS[2:])):
        as_jsonl(tmp_path / "all" / name, part)
    rows, _ = rows_of(tmp_path / "all")
    assert [row.columns for row in rows] == ROWS[2:] + ROWS[:2]
    assert [(row.number, row.where) for row in rows][2:4] == [(3, "a.jsonl, line 3"), (4, "b.jsonl, line 1")]
    (tmp_path / "split").mkdir()
    for name, part in (("train-00000-of-00002", ROWS[:2]), ("train-00001-of-00002", ROWS[2:4]), ("dev", ROWS[4:])):
        as_parquet(tmp_path / "split" / name, part)
    found, named = stored(f"{tmp_path / 'split'}@validation")
    assert (found.splits, named, found.own("validation"), found.own("test")) == (
        ("train", "validation"),
        "validation",
        "validation",
        None,
    )
    assert [row.columns for row in rows_of(f"{tmp_path / 'split'}@validation")[0]] == ROWS[4:]
    assert [row.columns for row in rows_of(tmp_path / "split")[0]] == ROWS[:4]
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    as_saved(tmp_path / "dict" / "test", ROWS)
    assert [row.columns for row in rows_of(f"{tmp_path / 'dict'}@test")[0]] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b\n1,2\n3\n", "a.csv, line 3: 1 cell, but the first line has 2 columns"),
        ("a.csv", b"a,a\n1,2\n", r"has the columns \['a', 'a'\]; its first line must give each column a unique name"),
        ("a.csv", b'a,b\n1,"2\n', "is not CSV: unexpected end of data"),
        ("a.csv", b"a\n\xff\n", "is not text in UTF-8"),
        ("a.csv", b"", "has no rows; give a file with at least one row"),
        ("a.parquet", b"PAR1", "is not a Parquet file"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl, line 2: not JSON: Expecting value"),
        ("a.jsonl", b"3\n", "line 1 has a int, not an object"),
    ],
)
def test_what_cannot_be_read_is_said_by_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        row_objects(tmp_path / name, "source file")


def test_cells_of_any_length_and_other_delimiters(tmp_path):
    (tmp_path / "a.csv").write_text("a;b\n" + "x" * 200_000 + ';"2\n3"\n')
    assert rows_of(tmp_path / "a.csv")[0][0].columns == {"a": "x" * 200_000, "b": "2\n3"}
    assert csv.field_size_limit() == 131_072  # as it was


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"install it with: pip install 'jaxrl_llm\[datasets\]'"):
        rows_of("hf:owner/name")


def test_values_of_other_libraries_become_plain():
    value = {
        "a": np.array([[1, 2]]),
        "b": np.float32(0.5),
        "c": datetime.date(2024, 1, 2),
        "d": decimal.Decimal("1.20"),
    }
    assert plain_value(value) == {"a": [[1, 2]], "b": 0.5, "c": "2024-01-02", "d": "1.20"}
    for bad in (b"\xff", object()):
        with pytest.raises(ValueError, match="a column has"):
            plain_value({"a": bad})


def test_templates_and_conditions_are_sandboxed_and_strict():
    row = {"q": "2+2?", "options": ["3", "4"], "meta": {"level": 2}}
    assert rendered("{{ q }} {% for o in options %}({{ o }}){% endfor %}\n", row) == "2+2? (3)(4)\n"
    assert column_value(row, "meta.level") == 2
    assert not holds("meta.level > 2 or q in options", row)
    for text in ("{{ levle }}", "{{ q.__class__.__mro__ }}", "{{ options.append(1) }}"):
        with pytest.raises(ValueError, match=r"fails with \w+.*the columns are meta, options, q"):
            rendered(text, row)
    for text in ("{{ q", "{% if q %}"):
        with pytest.raises(ValueError, match="is not valid jinja2"):
            rendered(text, row)


def test_messages_in_columns_become_a_list_of_messages():
    """tensorflow-datasets returns a sequence of records as a record of sequences."""
    asked = {"role": np.array([b"user", b"assistant"]), "content": np.array([b"2+3", b"5"])}
    messages = [{"role": "user", "content": "2+3"}, {"role": "assistant", "content": "5"}]
    assert plain_value({"chosen": asked, "margin": np.float32(1)}) == {"chosen": messages, "margin": 1.0}
    # Choices of a question are no messages, and neither is a single message.
    for value in ({"text": ["a", "b"], "label": ["A", "B"]}, {"role": "user", "content": ["a", "b"]}, messages[0]):
        assert plain_value(value) == value
