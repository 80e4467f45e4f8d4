"""Handbooks, what demonstrations say, and single moves of logged episodes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from jaxrl_llm.config import parse_config, read_tree
from jaxrl_llm.data import CharacterTokenizer, ProblemSet, tasks, with_handbook
from jaxrl_llm.data.handbook import Entry, chooser, read_handbook, unique
from jaxrl_llm.data.tasks import grid
from jaxrl_llm.data.tasks.items import Source, record
from jaxrl_llm.run.problems import data_sets
from jaxrl_llm.shipped import recipe_path

BOOK = (
    Entry("K", "reverse the word", "words"),
    Entry("sum", "add digits from the right", "numbers"),
    Entry("L", "sort"),
)


@pytest.mark.parametrize(
    ("by", "item", "count", "expected"),
    [
        ("mention", {"body": "F:L(K(ab))"}, 9, ["K", "L"]),
        ("mention", {"body": "F:L(K(ab))"}, 1, ["K"]),
        ("similarity", {"body": "Add these digits, then sort the digits."}, 9, ["sum", "K", "L"]),
        ("similarity", {"body": "12"}, 9, []),
        ("domain", {"body": "", "domain": "words"}, 9, ["K"]),
        ("domain", {"body": "", "raw": {"domain": "none"}}, 9, []),
    ],
)
def test_which_entries_a_problem_gets(by, item, count, expected):
    found = [entry.name for entry in chooser(BOOK, count=count, by=by)(item)]
    assert (sorted(found) if by == "similarity" else found) == (sorted(expected) if by == "similarity" else expected)
    assert by != "similarity" or not found or found[0] == expected[0]


def test_a_file_of_entries_in_which_a_name_counts_once(tmp_path):
    path = tmp_path / "book.jsonl"
    lines = [{"name": "K", "instruction": "reverse"}, {"name": "K", "instruction": "again"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_handbook(str(path)) == (Entry("K", "reverse"),)
    assert unique(BOOK) == BOOK
    sets = {"train": ProblemSet("p", "train", ({"body": "F:K(ab)"}, {"body": "F:M(ab)"}), "f")}
    made = with_handbook(sets, {"M": "rotate"}, str(path), by="mention", line="{name} {instruction};")["train"]
    assert [each["handbook"] for each in made] == ["K reverse;", "M rotate;"]
    assert made.fingerprint != sets["train"].fingerprint
    path.write_text('{"name": "K"}\n')
    with pytest.raises(ValueError, match="row of a handbook needs a text 'instruction'"):
        read_handbook(str(path))
    with pytest.raises(ValueError, match=r"data.handbook.by is 'subject', which is not a column"):
        chooser(BOOK, count=1, by="subject")({"body": ""})


def config(data_directory, **data):
    tree = read_tree(recipe_path("metacognitive_reuse")) | {"stages": []}
    small = {"train_items": 8, "validation_items": 4, "test_items": 4}
    tree |= {"task": tree["task"] | small, "data": tree["data"] | {"directory": data_directory} | data}
    tree["source"] = {"demonstrations": {"sequences_per_step": 8}}
    return parse_config(tree, vocabulary_size=CharacterTokenizer().vocabulary_size)


def test_a_prompt_with_its_handbook_and_a_demonstration_of_another_text(data_directory):
    told = {"templates": {"told": "{{ handbook }}{body}"}, "response": "{{ template }} {{ think.split(';')[0] }}"}
    one = data_sets(config(data_directory, **told), ("train",))["train"][0]
    names = [name for name in "KLMNOPQRSTUV" if f"{name}(" in one["body"]]
    assert [line.split(" ")[0] for line in one["handbook"].split(";")[:-1]] == names
    assert one["wording"] == one["handbook"] + "{body}"
    assert one["response"] == f"told {one['think'].split(';')[0]}"
    with pytest.raises(ValueError, match=r"handbook has neither entries nor a path"):
        config(data_directory, handbook={"entries": {}})
    talking = config(data_directory, response="x", handbook=None)
    with pytest.raises(ValueError, match=r"data.response is set, but grid is answered in turns"):
        data_sets(replace(talking, task=replace(talking.task, name="grid", levels=(1,), options={})), ("train",))


def test_a_reference_episode_may_make_a_blocked_move_and_correct_it():
    rows = ["S.#", ".#.", "..G"]
    item = record(grid.item(rows), 0)
    plain, erring = grid.segments(item), grid.segments(item, detours=1.0)
    assert [part.text for part in erring[:2]] == ["<a>U</a><n>", "<o>x#.#.</o>"]
    assert not erring[0].trained
    assert erring[1].source == Source.OBSERVATION
    assert erring[2:] == plain
    assert "detours" not in grid.task().options  # data sets without them are those that there were
    share = sum(len(grid.segments(record(one, 0), detours=0.3)) > len(grid.segments(record(one, 0)))
                for one in grid.task(size=4).generate(level=3, count=100))  # fmt: skip
    assert 15 <= share <= 45


def test_a_logged_state_asks_for_the_next_move():
    task = tasks.task("grid_moves", size=3, wall_probability=0.2)
    tested = {item.answer for item in grid.task(size=3).generate(level=2, count=20, split="test")}
    assert not tested & {task.identity(item).removesuffix(":full") for item in task.generate(level=2, count=40)}
    for item in task.generate(level=3, count=20):
        shown, *history = item.body.split("</o>")
        path = grid.shortest_path(shown.removeprefix("G:").split("<o>")[0].split("/"))
        assert item.answer == path[len(history) - 1]
        assert "".join(part[3] for part in history[:-1]) == path[: len(history) - 1]
