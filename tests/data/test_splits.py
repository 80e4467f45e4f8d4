"""Splits and mixtures: disjoint, in the shares that were asked for, in an order that is a function of (seed, step)."""

from __future__ import annotations

import json
from collections import Counter

import jax
import numpy as np
import pytest

from jaxrl_llm.data import (
    CharacterTokenizer,
    Refining,
    fields_of,
    mixture,
    problem_sets,
    prompt_batches,
    supervised_batches,
    with_examples,
    with_templates,
)

TOKENIZER = CharacterTokenizer()


def test_a_prompt_comes_once_in_every_template_and_evaluations_have_the_first(tmp_path):
    given = sets(tmp_path)
    texts = {"plain": "{body}", "twice": "Q: {body}\nRead the question again: {body}\nA:"}
    found = with_templates(given, texts)
    train, test = found["train"], found["test"]
    assert (len(train), len(test)) == (2 * len(given["train"]), len(given["test"]))
    assert len({each["item_id"] for each in train}) == len(train)
    assert {each["template"] for each in test} == {"plain"}
    assert train.sources == ("plain", "twice")
    one, other = train[0], train[1]
    assert one["body"] == other["body"]
    assert TOKENIZER.decode(TOKENIZER.prompt_ids(one)) == f"<bos>{one['body']}\n"
    question = f"Q: {one['body']}\nRead the question again: {one['body']}\nA:"
    assert TOKENIZER.decode(TOKENIZER.prompt_ids(other)) == f"<bos>{question}\n"
    assert train.fingerprint != with_templates(given, {"plain": "{body}", "other": "{body}."})["train"].fingerprint
    batch = prompt_batches(train, TOKENIZER, prompts_per_step=8, max_prompt_tokens=64, max_answer_tokens=8, seed=0)[0]
    told = [train.sources[number] for number in np.asarray(batch.prompts.fields["source_id"])]
    assert told == [item["template"] for item in batch.items]
    hinted = with_templates(given, {"plain": "{body}", "hint": "{body} of level {{ level }}"})["train"][1]
    assert TOKENIZER.decode(TOKENIZER.prompt_ids(hinted)) == f"<bos>{one['body']} of level {one['raw']['level']}\n"
    with pytest.raises(ValueError, match=r"data.templates.empty 'no place' has no place for the prompt"):
        with_templates(given, {"empty": "no place"})


def rows(count, start=0):
    return [
        {"prompt": f"M7:{n}+1", "answer": str(n + 1), "response": f"<a>{n + 1}</a>", "level": n % 5}
        for n in range(start, start + count)
    ]


def write(file, objects):
    file.write_text("".join(json.dumps(each) + "\n" for each in objects))
    return file


def sets(place, count=60, start=0, *, objects=None, **refining):
    file = write(place / f"{start}.jsonl", objects or rows(count, start))
    return problem_sets(file, fields_of("prompt", response="response"), refining=Refining(**refining))


def test_what_is_left_out_is_counted_by_its_reason(tmp_path):
    objects = [*rows(60), *rows(60), {"prompt": "no answer"}, {"answer": "3"}]
    refining = {"where": ("level < 4", "prompt|length > 6"), "duplicates": "drop", "unusable": "drop", "limit": 20}
    found = sets(tmp_path, objects=objects, **refining)
    train = found["train"]
    assert len(train) == 20
    assert all(each["raw"]["level"] < 4 and each["item_id"] >= 10 for each in train)
    assert train.dropped["no readable prompt or answer"] == 2
    assert train.dropped["not level < 4"] == 24
    assert train.dropped["not prompt|length > 6"] == 16  # of 0 to 9 without 4 and 9, twice
    assert (
        train.dropped["duplicate prompt"]
        + train.dropped["beyond the limit of 20"]
        + 20
        + sum(2 * len(found[split]) for split in ("validation", "test"))
        == 122 - 2 - 24 - 16
    )
    assert found["test"].fingerprint != sets(tmp_path, objects=objects, unusable="drop")["test"].fingerprint
    with pytest.raises(ValueError, match=r"line 1 of .*: the condition 'levle < 4' fails with UndefinedError"):
        sets(tmp_path, where=("levle < 4",))
    with pytest.raises(ValueError, match=r"no row of .* is left for the train split"):
        sets(tmp_path, where=("level > 9",))


def test_prompts_of_two_splits_are_refused_or_leave_training(tmp_path):
    train, test = write(tmp_path / "a", rows(60)), write(tmp_path / "b", rows(3, 10))
    fields = fields_of("prompt")
    with pytest.raises(ValueError, match="splits must not overlap: remove it from one"):
        problem_sets(train, fields, test_path=test)
    found = problem_sets(train, fields, test_path=test, refining=Refining(overlap="drop"))
    bodies = {split: {each["body"] for each in one} for split, one in found.items()}
    assert bodies["test"] == {"M7:10+1", "M7:11+1", "M7:12+1"}
    assert not bodies["test"] & (bodies["train"] | bodies["validation"])
    gone = [one.dropped.get("prompt of another split", 0) for one in found.values()]
    assert sum(gone) == 3
    parts = {"a": sets(tmp_path), "b": dict.fromkeys(found, sets(tmp_path)["train"])}
    with pytest.raises(
        ValueError, match=r"is in line \d+ of \S+ in source \w \(train\) and in line \d+ of \S+ in source b"
    ):
        mixture(parts)


def test_a_data_set_with_splits_has_its_own(tmp_path):
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "train.jsonl", rows(40))
    write(tmp_path / "d" / "test.jsonl", rows(5, 100))
    found = problem_sets(tmp_path / "d", fields_of("prompt"))
    assert [each["body"] for each in found["test"]] == [f"M7:{n}+1" for n in range(100, 105)]
    assert len(found["train"]) + len(found["validation"]) == 40
    only = problem_sets(f"{tmp_path / 'd'}@train", fields_of("prompt"))
    assert sum(map(len, only.values())) == 40


def batches(source, seed=0, size=8, make=prompt_batches):
    sizes = {"prompts_per_step": size, "max_prompt_tokens": 20, "max_answer_tokens": 4}
    if make is supervised_batches:
        sizes = {"sequences_per_step": size, "max_prompt_tokens": 20, "max_completion_tokens": 20}
    return make(source, TOKENIZER, seed=seed, **sizes)


@pytest.mark.parametrize("make", [prompt_batches, supervised_batches])
def test_every_step_has_the_shares_of_the_weights(tmp_path, make):
    parts = {"small": sets(tmp_path, 30), "large": sets(tmp_path, 200, 1000), "third": sets(tmp_path, 40, 500)}
    train = mixture(parts, [4.0, 3.0, 1.0])["train"]
    made = batches(train, make=make)
    of = [Counter(item["data_source"] for item in made[step].items) for step in range(12)]
    assert all(count == {"small": 4, "large": 3, "third": 1} for count in of)
    # Of a source, no problem comes again before all have come.
    small = [item["item_id"] for step in range(12) for item in made[step].items if item["data_source"] == "small"]
    size = len(parts["small"]["train"])
    assert len(set(small[:size])) == size
    assert small[size : 2 * size] != small[:size]
    assert len({each["item_id"] for each in train}) == len(train)


def test_the_order_is_a_function_of_seed_and_step(tmp_path, monkeypatch):
    parts = {"a": sets(tmp_path, 30), "b": sets(tmp_path, 60, 1000)}

    def ids(made, step):
        return [(item["data_source"], item["body"]) for item in made[step].items]

    train = mixture(parts, [1.0, 1.0])["train"]
    used, other = batches(train), batches(train, seed=1)
    for step in range(12):
        used[step]
    assert ids(used, 5) == ids(batches(train), 5) != ids(other, 5)
    # Neither does it matter which host asks, nor of how many.
    before = ids(batches(train), 123_456)
    monkeypatch.setattr(jax, "process_index", lambda *_: 3)
    monkeypatch.setattr(jax, "process_count", lambda *_: 4)
    assert ids(batches(train), 123_456) == before
    # A source has its own order, whatever stands beside it.
    beside = mixture({"a": parts["a"], "c": sets(tmp_path, 90, 3000)}, [1.0, 1.0])["train"]
    of_a = [[body for name, body in ids(batches(one), 5) if name == "a"] for one in (train, beside)]
    assert of_a[0] == of_a[1]


def test_prompts_of_a_mixture_know_their_source_and_copies_their_number(tmp_path):
    parts = {"tiny": sets(tmp_path, 12), "large": sets(tmp_path, 60, 1000)}
    train = mixture(parts, [3.0, 1.0])["train"]
    batch = batches(train, size=16)[2]
    assert batch.prompts.fields["source_id"].tolist() == [
        ["tiny", "large"].index(item["data_source"]) for item in batch.items
    ]
    keys = list(zip(batch.prompts.prompt_id.tolist(), batch.prompts.fields["repeat"].tolist(), strict=True))
    assert len(set(keys)) == 16 > len(set(batch.prompts.prompt_id.tolist()))
    assert "repeat" not in batches(mixture(parts)["train"])[0].prompts.fields  # without weights all come equally often


def test_examples_stand_before_every_prompt_and_are_not_trained_on(tmp_path):
    parts = sets(tmp_path)
    found = with_examples(parts, 2, lambda each: f"{each['body']}{each['response']}\n")
    gone = {each["body"] for each in parts["train"]} - {each["body"] for each in found["train"]}
    assert len(gone) == 2
    assert found["train"].dropped == {"shown as an example": 2}
    (prefix,) = {each["prefix"] for one in found.values() for each in one}
    assert all(body in prefix for body in gone)
    item = found["test"][0]
    assert TOKENIZER.decode(TOKENIZER.prompt_ids(item)) == f"<bos>{prefix}{item['body']}\n"
    assert with_examples(parts, 2, lambda each: each["body"])["train"].fingerprint != found["train"].fingerprint
    with pytest.raises(ValueError, match=r"data.few_shot.path has \d problems? of the test split; take other"):
        with_examples(parts, 2, lambda each: "", given=list(parts["test"]))
    with pytest.raises(ValueError, match="examples is 99, but there are"):
        with_examples(parts, 99, lambda each: "")


def test_steps_of_a_mixture_are_plain_arrays(tmp_path):
    batch = batches(mixture({"a": sets(tmp_path)}, [1.0])["train"])[0]
    assert batch.prompts.fields["source_id"].dtype == np.int32
