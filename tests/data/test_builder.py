"""Data sets on disk: the round trip, names that never collide, and writes that are whole or absent."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrl_llm.data import DataSpec, builder, data_set, task_items, tasks
from jaxrl_llm.data.tasks.items import record

SPEC = DataSpec("deduction", (0, 2), "train", 31, seed=3)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return data_set(SPEC, str(tmp_path_factory.mktemp("data")))


def test_round_trip_keeps_every_item_and_its_id(stored):
    items = SPEC.items()
    assert len(stored) == 31 == len(items)
    assert [stored[number] for number in range(31)] == [record(item, number) for number, item in enumerate(items)]
    assert [fields["item_id"] for fields in stored.__getitems__([5, 2])] == [5, 2]


def test_levels_share_the_items(stored):
    levels = [stored[number]["level"] for number in range(31)]
    assert (levels.count(0), levels.count(2)) == (16, 15)


def test_second_reading_reuses_the_files_and_has_the_same_fingerprint(stored, monkeypatch):
    monkeypatch.setattr(DataSpec, "items", lambda self: pytest.fail("the items were generated again"))
    again = data_set(SPEC, str(Path(stored.directory).parents[2]))
    assert again.fingerprint == stored.fingerprint
    assert again[7] == stored[7]


def test_nothing_is_printed(tmp_path, capfd):
    data_set(DataSpec("chain", (2,), "test", 5), str(tmp_path))
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""


@pytest.mark.parametrize(
    "other",
    [
        DataSpec("deduction", (0, 2), "train", 31, seed=4),
        DataSpec("deduction", (0, 2), "train", 32, seed=3),
        DataSpec("deduction", (2, 0), "train", 31, seed=3),
        DataSpec("deduction", (0, 2), "test", 31, seed=3),
        DataSpec("deduction", (0, 2), "train", 31, seed=3, options={"domain": "chain"}),
        DataSpec("chain", (1, 2), "train", 31, seed=3),
    ],
)
def test_another_specification_has_another_name_and_fingerprint(other, stored, tmp_path):
    assert other.name != SPEC.name
    assert data_set(other, str(tmp_path)).fingerprint != stored.fingerprint


def test_a_default_written_out_is_the_same_specification():
    assert DataSpec("deduction", (0, 2), "train", 31, seed=3, options={"scratchpad": True}).name == SPEC.name


def test_extrapolation_split_is_stored(tmp_path):
    assert data_set(DataSpec("addition", (9, 10), "extrapolation", 6), str(tmp_path))[5]["level"] == 10


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def half(self, records):
        yield records[0]["item_id"], records[0]
        raise RuntimeError("disk on fire")

    with monkeypatch.context() as broken:
        broken.setattr(task_items.TaskItems, "_generate_examples", half)
        with pytest.raises(RuntimeError, match="disk on fire"):
            data_set(SPEC, str(tmp_path))
    assert not list(tmp_path.rglob("1.0.0*"))
    assert len(data_set(SPEC, str(tmp_path))) == 31


def test_a_killed_write_is_never_read(tmp_path):
    program = f"""
import os
from jaxrl_llm.data import DataSpec, builder, data_set, task_items
def killed(self, records):
    for fields in records[:20]:
        yield fields["item_id"], fields
    os.kill(os.getpid(), 9)
task_items.TaskItems._generate_examples = killed
data_set(DataSpec("deduction", (0, 2), "train", 31, seed=3), {str(tmp_path)!r})
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(builder.__file__).parents[2])}
    finished = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=120)
    assert finished.returncode == -9, finished.stderr.decode()
    assert list(tmp_path.rglob("*incomplete*"))
    assert not list(tmp_path.rglob("1.0.0"))
    assert len(data_set(SPEC, str(tmp_path))) == 31


def test_a_process_that_comes_second_takes_the_first_ones_files(tmp_path, monkeypatch):
    written = []

    def overtaken(self, records):
        if not written:
            written.append("late")
            written.append(data_set(SPEC, str(tmp_path)))
        yield from ((fields["item_id"], fields) for fields in records)

    monkeypatch.setattr(task_items.TaskItems, "_generate_examples", overtaken)
    late = data_set(SPEC, str(tmp_path))
    assert late.fingerprint == written[1].fingerprint
    assert len(late) == 31


def test_damaged_files_are_refused(tmp_path):
    directory = Path(data_set(SPEC, str(tmp_path)).directory)
    metadata = directory / "metadata.json"
    metadata.chmod(0o644)
    metadata.write_text(metadata.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    with pytest.raises(ValueError, match="delete this directory"):
        data_set(SPEC, str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("adition", (1,), "train", 5), "did you mean"),
        (("addition", (), "train", 5), "levels"),
        (("addition", (1, 1), "train", 5), "only once"),
        (("addition", (1, 2), "train", 1), "at least 2"),
        (("addition", (1,), "dev", 5), "split"),
        (("addition", ("1",), "train", 5), "integer"),
    ],
)
def test_bad_specifications_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataSpec(*arguments)


def test_too_few_distinct_items_are_reported_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="distinct items"):
        data_set(DataSpec("addition", (1,), "train", 1000), str(tmp_path))
    assert not list(tmp_path.rglob("1.0.0*"))


def test_items_do_not_depend_on_the_other_levels():
    both, alone = SPEC.items(), DataSpec("deduction", (2,), "train", 15, seed=3).items()
    assert (
        [item for item in both if item.level == 2]
        == alone
        == tasks.task("deduction").generate(level=2, count=15, seed=3)
    )


def test_columns_that_are_made_of_records_are_there_and_not_on_disk(tmp_path):
    spec = DataSpec("addition", (1,), "train", 8, options={"scratchpad": False, "confidence": True})
    source = data_set(spec, str(tmp_path))
    assert "response" not in source.stored([3])[0]
    found = source[3]["response"]
    assert re.fullmatch(rf"<a>{source[3]['answer']}</a><c>\d\d</c>", found)
    assert source.__getitems__([3])[0] == source[3]
    assert "response" not in data_set(DataSpec("addition", (1,), "train", 8), str(tmp_path))[3]
