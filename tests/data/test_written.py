"""Files of judged completions: rows of a line, and refused lines."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest

from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.data.judged_rows import Asked
from jaxrl_llm.data.written import PROVIDES, judged_groups, written_batches
from jaxrl_llm.experience import Source
from jaxrl_llm.fields import FIELDS, absent_value
from jaxrl_llm.rows import Written
from jaxrl_llm.run import sources

TOKENIZER = CharacterTokenizer()
EOS = TOKENIZER.eos_id
LINES = {
    "pairs": [
        {"prompt": "A:1+2", "chosen": "3", "rejected": "45"},
        {"prompt": "A:10+2", "chosen": "12", "rejected": ""},
    ],
    "rankings": [
        {"prompt": "A:1+2", "completions": ["3", "4", "55"]},
        {"prompt": "A:2+2", "completions": ["4", "3", "2"]},
    ],
    "ratings": [
        {"prompt": "A:1+2", "completion": "3", "rating": 3.5},
        {"prompt": "A:2+2", "completion": "5", "rating": -1},
    ],
    "labels": [
        {"prompt": "A:1+2", "completion": "3", "label": True},
        {"prompt": "A:2+2", "completion": "5", "label": 0},
    ],
    "steps": [
        {"prompt": "A:1+2", "steps": ["1+", "2", "=3"], "labels": [1, 0, 1]},
        {"prompt": "A:2+2", "steps": ["4"], "labels": [0]},
    ],
    "verdicts": [
        {"prompt": "A:1+2", "first": "3", "second": "4", "better": "first", "rationale": "~1"},
        {"prompt": "A:2+2", "first": "5", "second": "4", "better": "B"},
    ],
}
VERDICTS = {"question": "{prompt}{first}={second}", "verdict": "{rationale}{verdict}"}
SIZES = {"groups_per_step": 2, "max_prompt_tokens": 12, "max_completion_tokens": 6, "seed": 0}


USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in zip(("user", *["assistant"] * 2), "qgb", strict=True)
)


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def asked_of(kind):
    return {"asked": Asked(**VERDICTS)} if kind == "verdicts" else {}


@pytest.fixture
def batch(tmp_path):
    def make(kind, lines=None, **changes):
        groups = judged_groups(write(tmp_path / "judged.jsonl", lines or LINES[kind]), kind, **asked_of(kind)).groups
        return written_batches(groups, kind, TOKENIZER, **(SIZES | changes))

    return make


def test_rows_of_any_format_and_columns_of_other_names(tmp_path):
    pairs, *_ = judged_groups(write(tmp_path / "a.jsonl", LINES["pairs"]), "pairs")
    table = [{"q": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in LINES["pairs"]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "b.parquet")
    columns = {"prompt": "{{ q }}", "chosen": "good", "rejected": "bad"}
    found, digest, dropped = judged_groups(tmp_path / "b.parquet", "pairs", columns)
    assert not dropped
    assert [[row[:3] for row in group] for group in found] == [[row[:3] for row in group] for group in pairs]
    assert len(digest) == 64
    with pytest.raises(ValueError, match=r"b.parquet, row 1: there is no field 'worse'"):
        judged_groups(tmp_path / "b.parquet", "pairs", columns | {"rejected": "worse"})
    for kind in ("rankings", "ratings", "labels", "steps", "verdicts"):  # cells are text
        lines = LINES[kind]
        with (tmp_path / "c.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            for line in lines if kind != "verdicts" else lines[:1]:
                writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in line.items()})
        of_csv, of_json = tmp_path / "c.csv", write(tmp_path / "c.jsonl", lines[:1] if kind == "verdicts" else lines)
        found, wanted = (
            [[row._replace(where="") for row in group] for group in judged_groups(path, kind)[0]]
            for path in (of_csv, of_json)
        )
        assert found == wanted


def texts(batch):
    return [TOKENIZER.decode(batch.tokens[row, : batch.length[row]]) for row in range(len(batch.length))]


def by_prompt(batch, *values):
    """(prompt id, text, values) of each row, in the order of the file."""
    found = list(zip(batch.prompt_id.tolist(), texts(batch), *(v.tolist() for v in values), strict=True))
    return sorted(found, key=lambda row: row[0])


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("pairs", "preferred", [(0, "3<eos>", 1.0), (0, "45<eos>", 0.0), (1, "12<eos>", 1.0), (1, "<eos>", 0.0)]),
        (
            "rankings",
            "rank",
            [
                *((0, text, rank) for text, rank in (("3<eos>", 0.0), ("4<eos>", 1.0), ("55<eos>", 2.0))),
                *((1, text, rank) for text, rank in (("4<eos>", 0.0), ("3<eos>", 1.0), ("2<eos>", 2.0))),
            ],
        ),
        ("ratings", "rating", [(0, "3<eos>", 3.5), (1, "5<eos>", -1.0)]),
        ("labels", "preferred", [(0, "3<eos>", 1.0), (1, "5<eos>", 0.0)]),
    ],
)
def test_each_line_is_a_group_of_rows_with_what_was_said_of_them(batch, kind, name, expected):
    first = batch(kind)[0]
    assert first.fields.keys() == {name} == PROVIDES[kind]
    assert by_prompt(first, first.fields[name]) == expected
    assert first.prompt_tokens.shape[1:] == (12,)
    assert first.tokens.shape[1:] == (6,)
    for row, number in enumerate(first.prompt_id):
        prompt = first.prompt_tokens[row, 12 - first.prompt_length[row] :]
        assert TOKENIZER.decode(prompt).removeprefix("<bos>") == LINES[kind][number]["prompt"] + "\n"
        assert (first.tokens[row, first.length[row] :] == TOKENIZER.pad_id).all()


def test_the_label_of_a_step_is_on_its_last_token_and_that_of_the_last_on_the_end_of_sequence_too(batch):
    first = batch("steps")[0]
    labels = {number: first.fields["step_labels"][row] for row, number in enumerate(first.prompt_id)}
    nan = float("nan")
    np.testing.assert_array_equal(labels[0], [nan, 1, 0, nan, 1, 1])
    np.testing.assert_array_equal(labels[1], [0, 0, nan, nan, nan, nan])
    assert by_prompt(first) == [(0, "1+2=3<eos>"), (1, "4<eos>")]


def test_a_row_that_was_not_judged_says_so():
    for name in frozenset().union(*PROVIDES.values()):
        assert FIELDS[name].provider == "written"
        assert not np.isfinite(absent_value(name)) or absent_value(name) == -1


def test_epochs_visit_every_line_once_and_the_same_after_a_resume(batch):
    lines = [{"prompt": f"A:{n}+1", "chosen": "1", "rejected": "2"} for n in range(8)]
    batches, again = batch("pairs", lines), batch("pairs", lines)
    for epoch in range(2):
        seen = [number for step in range(4) for number in batches[4 * epoch + step].prompt_id[::2].tolist()]
        assert sorted(seen) == list(range(8))
    np.testing.assert_array_equal(batches[5].tokens, again[5].tokens)


def test_what_is_too_long_is_an_error_or_is_dropped_with_its_group(batch):
    lines = [*LINES["pairs"], {"prompt": "A:1+1", "chosen": "2", "rejected": "1234567"}]
    with pytest.raises(ValueError, match=r"judged.jsonl, line 3 needs 7 prompt and 8 completion tokens, .* 12 and 6"):
        batch("pairs", lines)
    kept = batch("pairs", lines, overlong="drop")
    assert (kept.kept, kept.dropped) == (2, 1)
    with pytest.raises(ValueError, match="groups_per_step is 3, but the source has only 2 items"):
        batch("pairs", lines, overlong="drop", groups_per_step=3)


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("pairs", {"prompt": "A:1", "chosen": "2", "rejected": "2"}, "two equal completions '2'"),
        ("pairs", {"prompt": "A:1", "chosen": "2"}, "rejected None, which is not text"),
        ("pairs", {"prompt": 3, "chosen": "2", "rejected": "1"}, "prompt 3, which is not text"),
        (
            "pairs",
            {"chosen": "a 2", "rejected": "b 1"},
            "prompt None, and its completions have no common beginning",
        ),
        (
            "pairs",
            {"prompt": "A", "chosen": "2", "rejected": "1", "tie": True},
            "a tie, so neither completion is better",
        ),
        ("pairs", {"prompt": "A", "chosen": "2", "rejected": "1", "margin": -1}, "margin -1.0; it must be at least 0"),
        ("pairs", {"prompt": "A", "chosen": "2", "rejected": "1", "weight": "x"}, "weight 'x'; it must be a finite"),
        ("pairs", {"prompt": [], "chosen": "2", "rejected": "1"}, r"prompt \[\], which has no message"),
        ("pairs", {"prompt": [{"role": 1}], "chosen": "2", "rejected": "1"}, "a message needs texts as role"),
        ("pairs", {"prompt": "A", "chosen": [USER], "rejected": "1"}, r"chosen with messages of \['user'\]"),
        ("verdicts", {"prompt": "A", "first": "2", "second": "1", "better": "C"}, "better 'C'; it must be first or"),
        ("verdicts", {"prompt": "A", "first": "2", "second": "2", "better": "A"}, "two equal completions '2'"),
        ("rankings", {"prompt": "A:1", "completions": ["2"]}, r"completions \['2'\]; a ranking is a list of"),
        ("rankings", {"prompt": "A:1", "completions": "23"}, "completions '23'"),
        ("rankings", {"prompt": "A:1", "completions": ["2", "3", "2"]}, "two equal completions '2'"),
        ("rankings", {"prompt": "A:1", "completions": ["2", 3, "4"]}, "completion 3, which is not text"),
        ("ratings", {"prompt": "A:1", "completion": "2", "rating": "good"}, "rating 'good'; it must be a finite"),
        ("ratings", {"prompt": "A:1", "completion": "2", "rating": True}, "rating True"),
        ("ratings", {"prompt": "A:1", "completion": "2"}, "no rating"),
        ("labels", {"prompt": "A:1", "completion": "2", "label": 2}, "label 2; it must be true, false"),
        ("labels", {"prompt": "A:1", "completion": "2", "label": None}, "label None"),
        ("labels", {"prompt": "A:1", "completion": "2", "label": "yes"}, "label 'yes'"),
        ("labels", {"prompt": "A:1", "completion": "2", "label": [1]}, r"label \[1\]"),
        ("steps", {"prompt": "A:1", "steps": ["1", "2"], "labels": [1]}, "give lists of one length"),
        ("steps", {"prompt": "A:1", "steps": [], "labels": []}, "give lists of one length"),
        ("steps", {"prompt": "A:1", "steps": ["1", 2], "labels": [1, 0]}, "step 2, which is not text"),
        ("steps", {"prompt": "A:1", "steps": ["1", ""], "labels": [1, 0]}, "an empty step, which has no last token"),
        ("steps", {"prompt": "A:1", "steps": ["1"], "labels": ["good"]}, "label 'good'; it must be a finite"),
        (
            "steps",
            {"prompt": "A:1", "steps": ["1"], "labels": [-100]},
            "label -100 of a step; it must be true, false",
        ),
        ("rankings", {"prompt": "A:1", "completions": ["1", "2"], "ranks": [0]}, r"ranks \[0\]; give one for each"),
        ("rankings", {"prompt": "A:1", "completions": ["1", "2"], "ranks": [1, 1]}, "a tie, so neither"),
        (
            "ratings",
            {"prompt": "A:1", "response": "2", "helpfulness": 3},
            "no rating; .* it has the numbers helpfulness",
        ),
        (
            "pairs",
            {"prompt": "A:1", "chosen": "2", "rejected": "3", "score_chosen": 1, "score_rejected": 2},
            "score_chosen 1",
        ),
        (
            "verdicts",
            {"prompt": "A:1", "first": "2", "second": "3", "better": "none"},
            "better 'none'; it must be first",
        ),
    ],
)
def test_a_line_that_cannot_be_used_is_named_by_file_and_line(tmp_path, kind, line, message):
    path = write(tmp_path / "judged.jsonl", [LINES[kind][0], line])
    with pytest.raises(ValueError, match=rf"judged\.jsonl, line 2 has .*{message}"):
        judged_groups(path, kind)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no"),
        ("{", "line 1: not JSON"),
        ("3\n", "line 1 has a int, not an object"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, content, message):
    (tmp_path / "judged.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        judged_groups(tmp_path / "judged.jsonl", "pairs")
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        judged_groups(tmp_path / "nowhere.jsonl", "pairs")


def test_messages_and_prompts_that_are_what_completions_begin_with(tmp_path):
    def read(line, kind="pairs"):
        (group,) = judged_groups(write(tmp_path / "judged.jsonl", [line]), kind).groups
        return [(row.prompt, row.text) for row in group]

    wanted = [("q", "g"), ("q", "b")]
    assert read({"chosen": [USER, GOOD], "rejected": [USER, BAD]}) == wanted  # TRL, implicit
    assert read({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}) == wanted  # TRL, explicit
    assert read({"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}) == wanted  # UltraFeedback
    assert read({"prompt": [USER, GOOD, USER], "chosen": "g", "rejected": "b"})[0] == ((USER, GOOD, USER), "g")
    text = {"chosen": "Human: q\n\nAssistant: so", "rejected": "Human: q\n\nAssistant: sh"}
    assert read(text) == [("Human: q\n\nAssistant: ", "so"), ("Human: q\n\nAssistant: ", "sh")]
    assert read({"completion": [USER, GOOD], "rating": 1}, "ratings") == [("q", "g")]
    with pytest.raises(ValueError, match=r"judged.jsonl, line 1: a conversation of 3 messages needs a chat template"):
        fed(
            tmp_path, "pairs", lines=[{"prompt": [USER, GOOD, USER], "chosen": "g", "rejected": "b"}], groups_per_step=1
        )


def test_columns_of_other_data_sets_and_what_they_say_of_a_pair(tmp_path):
    def values(line):
        (group,) = judged_groups(write(tmp_path / "judged.jsonl", [line]), "pairs").groups
        return [(row.text, dict(row.values)) for row in group]

    both = {"prompt": "q", "response_1": "1", "response_2": "2"}
    assert values(both | {"preference_strength": 2}) == [
        ("2", {"preferred": 1.0, "margin": 2.0}),
        ("1", {"preferred": 0.0, "margin": 2.0}),
    ]
    assert [text for text, _ in values(both | {"preference_strength": -1})] == ["1", "2"]
    scored = {"prompt": "q", "chosen": "g", "rejected": "b", "score_chosen": 8.5, "score_rejected": "6", "weight": 0.5}
    assert values(scored)[0] == ("g", {"preferred": 1.0, "margin": 2.5, "weight": 0.5})
    steps = judged_groups(
        write(tmp_path / "s.jsonl", [{"prompt": "q", "completions": ["a", "b"], "labels": [1, 0]}]), "steps"
    )
    assert steps.groups[0][0].steps == (("a", 1.0), ("b", 0.0))


def test_ties_and_equal_sides_are_dropped_and_counted_as_told(tmp_path):
    lines = [
        *LINES["pairs"],
        {"prompt": "A:1", "chosen": "2", "rejected": "2"},
        {"prompt": "A:1", "response_1": "2", "response_2": "3", "preference_strength": 0},
        {"prompt": "A:1", "chosen": "2", "rejected": "3", "tie": True},
    ]
    found = judged_groups(write(tmp_path / "a.jsonl", lines), "pairs", unusable="drop")
    assert (len(found.groups), found.dropped) == (2, {"equal completions": 1, "ties": 2})
    assert fed(tmp_path, "pairs", lines=lines, unusable="drop").dropped == {"equal completions": 1, "ties": 2}
    with pytest.raises(ValueError, match=r"1 row, of which none is usable \(equal completions\)"):
        judged_groups(write(tmp_path / "a.jsonl", lines[2:3]), "pairs", unusable="drop")
    with pytest.raises(ValueError, match="unusable is 'keep'; it must be error or drop"):
        judged_groups(tmp_path / "a.jsonl", "pairs", unusable="keep")


def test_margins_and_weights_stand_on_the_rows_that_have_them(tmp_path):
    lines = [{"prompt": f"A:{n}", "chosen": "1", "rejected": "2"} for n in range(4)]
    assert "margin" not in fed(tmp_path, "pairs", lines=lines).source.provides
    lines[0] |= {"margin": 2}
    lines[1] |= {"weight": 3}
    feed = fed(tmp_path, "pairs", lines=lines, groups_per_step=4)
    assert feed.source.provides == {"preferred", "margin"}
    rows = feed.rows(SimpleNamespace(), {})(0)
    of = {
        number: (float(rows["margin"][row]), float(rows.weight[row]))
        for row, number in enumerate(rows.prompt_id.tolist())
    }
    assert of == {0: (2.0, 1.0), 1: (0.0, 3.0), 2: (0.0, 1.0), 3: (0.0, 1.0)}


def test_a_share_of_pairs_is_turned_round_the_same_each_time(tmp_path):
    lines = [{"prompt": f"A:{n}", "chosen": "1", "rejected": "2"} for n in range(400)]

    def wrong():
        rows = fed(tmp_path, "pairs", lines=lines, groups_per_step=400, flipped=0.25).rows(SimpleNamespace(), {})(0)
        first = [TOKENIZER.decode(rows.tokens[row, :1]) for row in range(0, 800, 2)]
        assert (np.asarray(rows["preferred"])[::2] + np.asarray(rows["preferred"])[1::2] == 1).all()
        better = np.asarray(rows["preferred"])[::2] == (np.asarray(first) == "1")
        return sorted(np.asarray(rows.prompt_id)[::2][~better].tolist())

    assert wrong() == wrong()
    assert 0.2 < len(wrong()) / 400 < 0.3


def test_ratings_of_several_attributes_lie_within_their_bounds(tmp_path):
    lines = [
        {"prompt": "A:1", "response": "2", "helpfulness": 3, "verbosity": 0},
        {"prompt": "A:2", "response": "2", "helpfulness": 4},
    ]
    feed = fed(tmp_path, "ratings", lines=lines, attributes=("helpfulness", "verbosity"), lowest=0, highest=4)
    rows = feed.rows(SimpleNamespace(), {})(0)
    order = np.argsort(np.asarray(rows.prompt_id))
    np.testing.assert_array_equal(np.asarray(rows["rating"])[order], [[3, 0], [4, np.nan]])
    with pytest.raises(ValueError, match=r"line 2 has helpfulness 4, outside of \[0, 3\]; correct it"):
        fed(tmp_path, "ratings", lines=lines, attributes=("helpfulness",), lowest=0, highest=3)
    with pytest.raises(ValueError, match="line 1 has none of the ratings coherence; give one of them"):
        fed(tmp_path, "ratings", lines=lines, attributes=("coherence",))


def test_labels_of_one_class_only_are_refused(tmp_path):
    lines = [{"prompt": f"A:{n}", "completion": "1", "label": 0.7} for n in range(3)]
    with pytest.raises(ValueError, match=r"judged.jsonl has only labels like 0.7; training needs both classes"):
        fed(tmp_path, "labels", lines=lines)


def test_a_verdict_is_a_question_and_what_a_judge_should_write(tmp_path):
    asked = Asked(question="{prompt}|{first}|{second}", verdict="{rationale} {verdict}", both_orders=True)
    groups = judged_groups(write(tmp_path / "a.jsonl", LINES["verdicts"]), "verdicts", asked=asked).groups
    assert [[(row.prompt, row.text) for row in group] for group in groups] == [
        [("A:1+2|3|4", "~1 A"), ("A:1+2|4|3", "~1 B")],
        [("A:2+2|5|4", "B"), ("A:2+2|4|5", "A")],
    ]
    with pytest.raises(ValueError, match=r"source.verdicts.question is 'which\?', without \{prompt\}"):
        sources._of_verdicts(question="which?")


def test_rankings_in_any_order_with_ties_and_of_several_lengths(tmp_path):
    lines = [LINES["rankings"][0], {"prompt": "A:1", "completions": ["1", "2"], "ranks": [1, 0]}]
    rows = fed(tmp_path, "rankings", lines=lines).rows(SimpleNamespace(), {})(0)
    of = {n: sorted(zip(*map(np.ndarray.tolist, each), strict=True)) for n, each in with_weights(rows, "rank").items()}
    assert of == {0: [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0)], 1: [(-1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]}
    tied = [{"prompt": "A:1", "completions": ["1", "2", "3"], "ranks": [1, 0, 1]}]
    (group,) = judged_groups(write(tmp_path / "judged.jsonl", tied), "rankings").groups
    assert [(row.text, row.values["rank"]) for row in group] == [("1", 1.0), ("2", 0.0), ("3", 1.0)]
    with pytest.raises(ValueError, match="kind is 'triples'; it must be one of pairs, rankings"):
        judged_groups(tmp_path / "judged.jsonl", "triples")


def with_weights(rows, name):
    """prompt -> (a field, the weight) of its rows."""
    number = np.asarray(rows.prompt_id)
    return {
        n: (np.asarray(rows[name])[number == n], np.asarray(rows.weight)[number == n]) for n in set(number.tolist())
    }


def test_equal_sides_are_ties_also_where_the_prompt_is_what_they_begin_with(tmp_path):
    lines = [
        {"chosen": [USER, GOOD], "rejected": [USER, GOOD]},
        {"chosen": "same", "rejected": "same"},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ]
    found = judged_groups(write(tmp_path / "a.jsonl", lines), "pairs", unusable="drop")
    assert (len(found.groups), found.dropped) == (1, {"equal completions": 2})
    for line in lines[:2]:
        with pytest.raises(ValueError, match=r"line 1 has two equal completions .* set unusable to drop"):
            judged_groups(write(tmp_path / "a.jsonl", [line]), "pairs")


def test_a_text_that_is_a_list_of_json_is_a_text(tmp_path):
    lines = [{"prompt": "[2, 1]", "chosen": "[1, 2]", "rejected": "[]"}]
    (group,) = judged_groups(write(tmp_path / "a.jsonl", lines), "pairs").groups
    assert [(row.prompt, row.text) for row in group] == [("[2, 1]", "[1, 2]"), ("[2, 1]", "[]")]


def test_steps_without_a_judgement_and_of_one_class(tmp_path):
    rows = fed(
        tmp_path,
        "steps",
        lines=[{"prompt": "A:1", "steps": ["1", "2", "3"], "labels": [1, None, 0]}],
        groups_per_step=1,
    ).rows(SimpleNamespace(), {})(0)
    np.testing.assert_array_equal(rows["step_labels"][0, :4], [1, np.nan, 0, 0])
    for labels, message in (
        ([True, 1], "only labels like 1; training needs both classes"),
        ([None], "no step with a label"),
    ):
        line = {"prompt": "A:1", "steps": ["1", "2"][: len(labels)], "labels": labels}
        with pytest.raises(ValueError, match=message):
            judged_groups(write(tmp_path / "a.jsonl", [line]), "steps")


def test_an_attribute_that_no_row_has_is_refused(tmp_path):
    lines = [{"prompt": "A:1", "response": "2", "helpfulness": 3, "correctness": 4}]
    with pytest.raises(ValueError, match=r"no row of .* has the rating 'corectness'; its columns are .*'correctness'"):
        fed(tmp_path, "ratings", lines=lines, attributes=("helpfulness", "corectness"))


def test_verdicts_of_other_data_sets(tmp_path):
    def read(line, kind="verdicts", **options):
        asked = Asked(question="{prompt}|{first}|{second}", verdict="{rationale} {verdict}")
        found = judged_groups(write(tmp_path / "a.jsonl", [LINES[kind][0], line]), kind, asked=asked, **options)
        return [(row.prompt, row.text) for group in found.groups[1:] for row in group], found.dropped

    helpsteer = {"context": [USER], "response1": "1", "response2": "2", "overall_preference": 2}
    assert read(helpsteer | {"preference_statement": "why"})[0] == [("q|1|2", "why B")]
    assert read(helpsteer | {"overall_preference": 0}, unusable="drop") == ([], {"ties": 1})
    assert read(helpsteer, "pairs")[0] == [("q", "2"), ("q", "1")]
    arena = {"conversation_a": [USER, GOOD], "conversation_b": [USER, BAD], "winner": "model_b"}
    assert read(arena)[0] == [("q|g|b", "B")]
    assert read(arena, "pairs")[0] == [("q", "b"), ("q", "g")]
    assert read(arena | {"winner": "tie"}, "pairs", unusable="drop")[1] == {"ties": 1}


# ---- as a source ----------------------------------------------------------------------------------------------------


def fed(tmp_path, kind, *, beside=False, samples_per_prompt=4, groups_per_step=2, lines=None, **own):
    sizes = {key: SIZES[key] for key in ("max_prompt_tokens", "max_completion_tokens", "seed")}
    return getattr(sources, kind)(
        file=str(write(tmp_path / "judged.jsonl", lines or LINES[kind])),
        groups_per_step=groups_per_step,
        samples_per_prompt=samples_per_prompt,
        beside=beside,
        tokenizer=TOKENIZER,
        overlong_prompts="error",
        **(VERDICTS if kind == "verdicts" else {}),
        **sizes,
        **own,
    )


@pytest.mark.parametrize("kind", LINES)
def test_alone_they_are_all_rows_of_a_step(tmp_path, kind):
    feed = fed(tmp_path, kind)
    per_group = {"pairs": 2, "rankings": 3}.get(kind, 1)
    assert feed.source == Written(2 * per_group, per_group, PROVIDES[kind])
    rows = feed.rows(SimpleNamespace(), {})(0)
    assert rows.group.tolist() == np.repeat([0, 1], per_group).tolist()
    inside = np.arange(6) < np.asarray(rows.length)[:, None]
    np.testing.assert_array_equal(rows.mask, inside)
    np.testing.assert_array_equal(rows["written_mask"], inside)
    np.testing.assert_array_equal(rows.source, np.where(inside, Source.DEMONSTRATION, Source.PAD))
    np.testing.assert_array_equal(rows.weight, 1)
    assert PROVIDES[kind] <= rows.fields.keys()


def test_beside_samples_the_mask_leaves_them_out(tmp_path):
    feed = fed(tmp_path, "pairs", beside=True, samples_per_prompt=2)
    assert feed.source == Written(4, 2, PROVIDES["pairs"])
    rows = feed.rows(SimpleNamespace(), {})(0)
    assert not rows.mask.any()
    assert rows["written_mask"].sum() == rows.length.sum()


def test_beside_samples_they_come_in_groups_of_that_size(tmp_path):
    assert fed(tmp_path, "ratings", beside=True, samples_per_prompt=2).source.rows_per_group == 2
    with pytest.raises(ValueError, match=r"source.ratings.groups_per_step is 2, which .*samples_per_prompt 4 does not"):
        fed(tmp_path, "ratings", beside=True)
    with pytest.raises(ValueError, match=r"source.pairs has groups of 2 .*samples_per_prompt 4; set that to 2, or"):
        fed(tmp_path, "pairs", beside=True)


def test_what_a_file_holds_has_a_fingerprint(tmp_path):
    one = fed(tmp_path, "pairs").file
    assert fed(tmp_path, "pairs").file == one
    assert fed(tmp_path, "labels").file != one
    assert sources.sampler().file is None
