"""Tables that fit the screen and break no word, and what leaves one out."""

from __future__ import annotations

import argparse
import json

import pytest

from jaxrl_llm.commands.tables import show

ROWS = [
    {
        "name": f"group_normalized_{number}",
        "options": "scale=none, largest_number_of_all=12345678",
        "where": "inside_of_the_program",
        "meaning": "advantages of a group " * 4 + "behaviour_logprobabilities_of_tokens",
    }
    for number in range(2)
]


@pytest.fixture
def shown(monkeypatch, capsys):
    def run(*, columns=80, rows=ROWS, spare=("options", "where"), **options):
        monkeypatch.setenv("COLUMNS", str(columns))
        show(argparse.Namespace(**{"json": False, "wide": False} | options), rows, "title", spare=spare)
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(("columns", "left_out"), [(80, ["options", "where"]), (100, ["options"]), (130, [])])
def test_columns_are_left_out_in_order_until_no_word_is_broken(shown, columns, left_out):
    text = shown(columns=columns)
    assert max(map(len, text.splitlines())) <= columns
    words = text.split()
    for row in ROWS:
        for key, value in row.items():
            assert (key in left_out) or set(value.split()) <= set(words), key
    assert ("columns left out: " in text) == bool(left_out)
    assert all(name in text for name in left_out)


def test_wide_shows_all_on_one_line_each(shown):
    lines = shown(wide=True).splitlines()
    assert all(any(all(value in line for value in row.values()) for line in lines) for row in ROWS)


def test_what_cannot_be_left_out_is_folded_and_nothing_is_lost(shown):
    text = shown(columns=40, spare=())
    assert max(map(len, text.splitlines())) <= 40


def test_only_words_that_do_not_fit_are_broken(shown):
    rows = [{"what": name, "value": value} for name, value in (("checkpoint", "/path" * 20), ("written to", "out"))]
    lines = shown(rows=rows, spare=()).splitlines()
    assert max(map(len, lines)) <= 80
    assert {"checkpoint", "written", "to", "out", "value"} <= {word for line in lines for word in line.split()}
    assert "".join(line[12:].strip() for line in lines[3:5]) == "/path" * 20


def test_json_has_every_column_and_no_rows_are_no_table(shown):
    assert json.loads(shown(json=True)) == ROWS
    assert shown(rows=[]) == "title: none\n"
