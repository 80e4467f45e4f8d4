"""Data of the user's own: every line is checked, splits never overlap, and the fingerprint follows the content."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from jaxrl_llm.data import CharacterTokenizer, encode_prompts, fields_of, problem_sets, prompt_batches, split_of
from jaxrl_llm.data.json_files import elements
from jaxrl_llm.data.jsonl import FORMATS, Fields

GSM8K = {
    "question": "Natalia sold clips to 48 of her friends in April, and half as many in May. How many altogether?",
    "answer": "She sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = <<48+24=72>>72.\n#### 72",
}


def lines(count, start=0):
    return [
        {"question": f"What is {n}+1?", "answer": f"{n}+1={n + 1}\n#### {n + 1}"} for n in range(start, start + count)
    ]


def write(file, objects):
    file.write_text("".join(json.dumps(each) + "\n" for each in objects))
    return file


def test_the_format_of_gsm8k(tmp_path):
    files = [write(tmp_path / name, [each]) for name, each in zip("abc", [GSM8K, *lines(2)], strict=True)]
    sets = problem_sets(files[0], fields_of("gsm8k"), validation_path=files[1], test_path=files[2])
    (item,) = sets["train"]
    assert (item["body"], item["answer"], item["item_id"]) == (GSM8K["question"], "72", 0)
    assert item["response"] == "She sold 48/2 = 24 clips in May.\nAltogether 48+24 = 72.\n#### 72"
    assert item["raw"] == GSM8K
    assert "messages" not in item
    assert sets["train"].__getitems__([0]) == [item]


def test_splits_are_cut_by_hash_and_never_overlap(tmp_path):
    sets = problem_sets(write(tmp_path / "a", lines(300)), fields_of("gsm8k"))
    bodies = {split: [item["body"] for item in part] for split, part in sets.items()}
    assert sum(map(len, bodies.values())) == len({body for part in bodies.values() for body in part}) == 300
    assert all(split_of(body) == split for split, part in bodies.items() for body in part)
    assert len(bodies["train"]) > 200
    # A line keeps its split and its number wherever others are added behind it.
    longer = problem_sets(write(tmp_path / "b", lines(400)), fields_of("gsm8k"))
    place = ("row_of_file",)  # the files have other names
    for split, part in sets.items():
        both = zip(longer[split].records, part.records, strict=False)
        assert all(a.keys() == b.keys() and all(a[n] == b[n] for n in a if n not in place) for a, b in both)


def test_a_split_with_a_file_of_its_own_is_not_cut_out_of_the_training_file(tmp_path):
    train, test = write(tmp_path / "train", lines(200)), write(tmp_path / "test", lines(5, start=1000))
    sets = problem_sets(train, fields_of("gsm8k"), test_path=test)
    assert [item["item_id"] for item in sets["test"]] == [0, 1, 2, 3, 4]
    assert len(sets["train"]) + len(sets["validation"]) == 200
    assert {split_of(item["body"]) for item in sets["train"]} == {"train", "test"}
    assert {split_of(item["body"]) for item in sets["validation"]} == {"validation"}
    assert sets["test"].path == str(test)


def test_equal_prompts_in_one_file_share_a_split(tmp_path):
    sets = problem_sets(write(tmp_path / "a", lines(100) + lines(100)), fields_of("gsm8k"))
    counts = Counter(item["body"] for part in sets.values() for item in part)
    assert set(counts.values()) == {2}
    ids = [item["item_id"] for part in sets.values() for item in part]
    assert sorted(ids) == list(range(200))


def test_a_prompt_in_two_files_is_refused(tmp_path):
    train, test = write(tmp_path / "train", lines(100)), write(tmp_path / "test", lines(3, start=97))
    with pytest.raises(ValueError, match=r"in line \d+ of .*train \(train\) and in line \d of .*test \(test\); splits"):
        problem_sets(train, fields_of("gsm8k"), validation_path=write(tmp_path / "v", lines(1, 500)), test_path=test)


def test_a_split_that_stays_empty_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no line of .* falls into the \w+ split"):
        problem_sets(write(tmp_path / "a", lines(1)), fields_of("gsm8k"))


def test_fingerprints_follow_content_reading_and_split(tmp_path):
    file = write(tmp_path / "a", lines(100))
    sets = problem_sets(file, fields_of("gsm8k"))
    prints = {part.fingerprint for part in sets.values()}
    assert len(prints) == 3
    again = problem_sets(write(tmp_path / "other name", lines(100)), fields_of("gsm8k"))
    assert {part.fingerprint for part in again.values()} == prints
    kept = problem_sets(file, fields_of("gsm8k", calculations="keep"))
    own = problem_sets(file, fields_of("gsm8k"), test_path=write(tmp_path / "t", lines(5, start=200)))
    changed = problem_sets(write(file, [*lines(99), GSM8K]), fields_of("gsm8k"))
    for other in (kept, own, changed):
        assert other["train"].fingerprint not in prints


def test_fields_are_mapped(tmp_path):
    objects = [
        {
            **{"data": {"problem": f"{n}?"}, "solution": rf"so \boxed{{{n}}}", "level": "Level 5", "answer": n},
            **{"hardness": n, "prefix": "x", "item_id": "a", "messages": 0},
        }
        for n in range(60)
    ]
    file = write(tmp_path / "a", objects)
    fields = fields_of("prompt", prompt="data.problem", answer="solution", response="solution", answer_from="boxed")
    item = problem_sets(file, fields)["train"][0]
    number = item["item_id"]
    assert (item["body"], item["answer"]) == (f"{number}?", str(number))
    assert (item["response"], item["raw"]) == (objects[number]["solution"], objects[number])
    # Further columns are there by their names, but for those that the pipeline would read as its own.
    assert (item["level"], item["hardness"]) == ("Level 5", number)
    assert not {"prefix", "messages"} & item.keys()
    # A number is taken as it is written.
    assert problem_sets(file, fields_of("prompt", prompt="data.problem"))["train"][0]["answer"] == str(number)
    assert problem_sets(file, fields_of("prompt", prompt="data.problem"))["train"][0]["response"] == ""


def test_a_field_whose_name_has_a_dot(tmp_path):
    objects = [{"a.b": f"{n}?", "answer": 0.5} for n in range(60)]
    item = problem_sets(write(tmp_path / "a", objects), fields_of("prompt", prompt="a.b"))["train"][0]
    assert (item["body"], item["answer"]) == (f"{item['item_id']}?", "0.5")


def test_conversations(tmp_path):
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "2+3?"}]
    objects = [
        {"messages": [asked[0], {"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"#### {n}"}]}
        for n in range(60)
    ]
    item = problem_sets(write(tmp_path / "a", objects), fields_of("messages", answer=None, answer_from="hashes"))[
        "train"
    ][0]
    number = item["item_id"]
    assert (item["body"], item["answer"], item["response"]) == (f"{number}?", str(number), f"#### {number}")
    assert item["messages"] == objects[number]["messages"][:2]
    # Without a last turn of the assistant the answer stands in its own field.
    objects = [{"messages": [asked[0], {"role": "user", "content": f"{n}?"}], "answer": "x"} for n in range(60)]
    item = problem_sets(write(tmp_path / "b", objects), fields_of("messages"))["train"][0]
    assert (item["answer"], item["response"]) == ("x", "")


def test_json_lists_blank_lines_and_byte_order_marks(tmp_path):
    objects = lines(100)
    text = "\n\n".join(map(json.dumps, objects))
    (tmp_path / "lines").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    (tmp_path / "list.json").write_text(" \n" + json.dumps(objects, indent=1))
    from_lines = problem_sets(tmp_path / "lines", fields_of("gsm8k"))
    from_list = problem_sets(tmp_path / "list.json", fields_of("gsm8k"))
    for split, part in from_list.items():
        assert [item["body"] for item in part] == [item["body"] for item in from_lines[split]]
        # Numbers are those of the lines, blank ones counted.
        assert [2 * item["item_id"] for item in part] == [item["item_id"] for item in from_lines[split]]


def test_a_line_separator_of_unicode_ends_no_line(tmp_path):
    (tmp_path / "a").write_text(json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False))
    assert list(elements(tmp_path / "a", (tmp_path / "a").read_bytes())) == [(1, {"prompt": "a\u2028b"})]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question": "a"', "line 2: not JSON: Expecting"),
        ('{"question": "a", "answer": NaN}', "line 2: not JSON: NaN is not a JSON number"),
        (b'{"question": "\xff"}', "line 2: not JSON: byte 14 is not UTF-8"),
        ("[1]", "line 2: has a list, not an object"),
        ("null", "line 2: has a NoneType, not an object"),
        ('{"answer": "#### 1"}', r"line 2: there is no field 'question'; its fields are \['answer'\]"),
        ('{"question": " ", "answer": "#### 1"}', "line 2: field 'question' is empty"),
        ('{"question": ["a"], "answer": "#### 1"}', r"""line 2: field 'question' is \["a"\], not text"""),
        ('{"question": true, "answer": "#### 1"}', "line 2: field 'question' is true, not text"),
        ('{"question": "a", "answer": null}', "line 2: field 'answer' is null, not text"),
        ('{"question": "a", "answer": "it is 7"}', "line 2: field 'answer' has no answer .*'hashes'.*'it is 7'"),
        ('{"question": "a", "answer": "it is #### "}', "line 2: field 'answer' has no answer"),
        (
            r'{"question": "a \ud83d", "answer": "#### 1"}',
            r"line 2: not JSON: it has '.ud83d', half of a surrogate pair",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    good = json.dumps(GSM8K).encode()
    raw = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a").write_bytes(good + b"\n" + raw + b"\n" + good)
    with pytest.raises(ValueError, match="1 line that cannot be used; repair it: " + message):
        problem_sets(tmp_path / "a", fields_of("gsm8k"))


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "is not a list of messages"),
        ("hi", "is not a list of messages"),
        ([{"role": "user"}], "message 0 of field 'messages' is not an object with texts as role and content"),
        ([{"role": "user", "content": [{"text": "x"}]}], "message 0 of field 'messages' is not an object"),
        ([{"role": "assistant", "content": "5"}], "no message of the user"),
        ([{"role": "system", "content": "s"}], "no message of the user"),
    ],
)
def test_bad_conversations_are_named(tmp_path, messages, message):
    write(tmp_path / "a", [{"messages": messages, "answer": "5"}])
    with pytest.raises(ValueError, match=r"line 1: .*" + message):
        problem_sets(tmp_path / "a", fields_of("messages"))


def test_answers_may_be_left_out_of_all_lines(tmp_path):
    lines = [{"prompt": f"say {i}", "hard": i} for i in range(40)]
    write(tmp_path / "a", lines)
    for fields in (fields_of("prompt"), fields_of("prompt", answer=None)):
        train = problem_sets(tmp_path / "a", fields)["train"]
        assert {record["answer"] for record in train} == {""}
        assert train[0]["raw"]["hard"] == train[0]["item_id"]
    with pytest.raises(ValueError, match="line 1: there is no field 'solution'"):
        problem_sets(tmp_path / "a", fields_of("prompt", answer="solution"))
    write(tmp_path / "b", [*lines, {"prompt": "a", "answer": "5"}])
    with pytest.raises(
        ValueError, match="40 lines that cannot be used; repair them: line 1: there is no field 'answer'"
    ):
        problem_sets(tmp_path / "b", fields_of("prompt"))


def test_a_pair_of_surrogates_is_a_character(tmp_path):
    (tmp_path / "a").write_text(r'{"a": "\ud83d\ude00 \u00e9"}')
    assert list(elements(tmp_path / "a", (tmp_path / "a").read_bytes())) == [(1, {"a": "\U0001f600 é"})]


def test_many_bad_lines_are_counted(tmp_path):
    (tmp_path / "a").write_text("x\n" * 8)
    with pytest.raises(ValueError, match=r"8 lines that cannot be used.*line 1: .*line 5: .*and 3 more"):
        problem_sets(tmp_path / "a", fields_of("gsm8k"))


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="nowhere cannot be read: No such file"):
        problem_sets(tmp_path / "nowhere", fields_of("gsm8k"))
    with pytest.raises(ValueError, match=r"is a directory without files of \.jsonl"):
        problem_sets(tmp_path, fields_of("gsm8k"))
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(ValueError, match="has no rows"):
        problem_sets(tmp_path / "empty", fields_of("gsm8k"))
    (tmp_path / "list").write_text('[{"question": "a"},')
    with pytest.raises(ValueError, match="list is not JSON"):
        problem_sets(tmp_path / "list", fields_of("gsm8k"))
    (tmp_path / "list").write_text("[1]")
    with pytest.raises(ValueError, match="element 1: has a int"):
        problem_sets(tmp_path / "list", fields_of("gsm8k"))


@pytest.mark.parametrize(
    "format, changes, message",
    [
        ("gsm", {}, "format is 'gsm'; it must be one of 'gsm8k', 'prompt', 'messages'"),
        ("prompt", {"question": "a"}, "no field 'question' to map; fields are prompt, messages"),
        ("prompt", {"messages": "m"}, "set one of them to the column of the prompt"),
        ("prompt", {"prompt": None}, "set one of them to the column of the prompt"),
        ("prompt", {"answer_from": "end"}, "answer_from is 'end'"),
        ("prompt", {"calculations": "yes"}, "calculations is 'yes'"),
        ("messages", {"response": "r"}, "remove response"),
    ],
)
def test_bad_formats(format, changes, message):
    with pytest.raises(ValueError, match=message):
        fields_of(format, **changes)


def test_formats_can_be_built_and_changed():
    for name, fields in FORMATS.items():
        assert fields_of(name) == fields
    assert fields_of("gsm8k", prompt="q") == Fields("q", None, "answer", "answer", "hashes", "remove")


def test_the_pipeline_takes_the_records(tmp_path):
    # The built-in tokenizer does for texts in its alphabet.
    part = problem_sets(write(tmp_path / "a", lines(100)), fields_of("gsm8k"))["train"]
    limits = {"max_prompt_tokens": 20, "max_answer_tokens": 3}
    batch = prompt_batches(part, CharacterTokenizer(), prompts_per_step=4, seed=0, **limits)[0]
    for row, item in enumerate(batch.items):
        assert item["answer"] == str(item["item_id"] + 1)
        assert batch.prompts.prompt_id[row] == item["item_id"]
    with pytest.raises(ValueError, match="does not fit: its prompt has"):
        encode_prompts(part, CharacterTokenizer(), max_prompt_tokens=14, max_answer_tokens=3)
