"""`jaxrl pairs --cleaned`: what several reward models make of wrong labels, as a file that the source `pairs` reads."""

from __future__ import annotations

import json

import pytest

from jaxrl_llm.cli import main
from jaxrl_llm.commands.scored_pairs import cleaned_pairs
from jaxrl_llm.data.judged_rows import Judged
from jaxrl_llm.data.written import judged_groups


def test_the_weakest_pairs_are_turned_and_the_next_ones_smoothed(tmp_path):
    groups = [[Judged(f"Q{n}", "good"), Judged(f"Q{n}", "bad")] for n in range(5)]
    # Two models; mean gaps 2, -1, 0.5, 3 and 1.
    said = [[2, 0, 0, 2, 1, 0, 3, 0, 1, 0], [2, 0, 0, 0, 0, 0, 3, 0, 1, 0]]
    lines, counts = cleaned_pairs(groups, said, flip=0.2, smooth=0.4)
    assert counts == {"pairs": 5, "keep": 3, "smooth": 1, "flip": 1}
    assert [(line["prompt"], line["chosen"], line["margin"], line["weight"]) for line in lines] == [
        ("Q0", "good", 2.0, 1.0),
        ("Q1", "bad", 1.0, 1.0),
        ("Q2", "good", 0.5, 0.9),
        ("Q2", "bad", 0.0, 0.1),
        ("Q3", "good", 3.0, 1.0),
        ("Q4", "good", 1.0, 1.0),
    ]
    path = tmp_path / "cleaned.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = judged_groups(str(path), "pairs", {}).groups
    assert [row.values["preferred"] for group in read for row in group] == [1.0, 0.0] * 6
    assert read[3][0].values["weight"] == 0.1
    with pytest.raises(ValueError, match=r"flip is 0\.5 and smooth is 0\.4"):
        cleaned_pairs(groups, said, flip=0.5, smooth=0.4)


@pytest.mark.parametrize("words", [["pairs", "--file", "x.jsonl", "--column"], ["eval", "--field"]])
@pytest.mark.parametrize("given", ["prompt", "prompt=", "=text"])
def test_a_column_without_a_name_or_a_value_is_refused(tmp_path, capsys, words, given):
    assert main([*words, given, str(tmp_path)]) == 2
    assert f"{words[-1]} is {given!r}; write NAME=COLUMN" in capsys.readouterr().err


def test_other_runs_without_a_file_to_write_are_refused(tmp_path, capsys):
    assert main(["pairs", str(tmp_path), "--file", "x.jsonl", "--others", str(tmp_path)]) != 0
    assert "add --cleaned FILE" in capsys.readouterr().err
