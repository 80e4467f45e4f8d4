"""Columns of the data whose texts are further prompts of the same problem."""

from __future__ import annotations

import pytest

from jaxrl_llm.data import CharacterTokenizer, ProblemSet, prompt_batches, tasks, with_column
from jaxrl_llm.data.tasks.addition import paraphrase
from jaxrl_llm.data.tasks.items import split_of

TOKENIZER = CharacterTokenizer()
SIZES = {"prompts_per_step": 3, "max_prompt_tokens": 9, "max_answer_tokens": 3, "seed": 0}
ITEMS = [
    {"body": "A:1+2", "answer": "3", "paraphrase": "A:2+1"},
    {"body": "A:4+5", "answer": "9", "raw": {"paraphrase": "A:5+4"}},
    {"body": "A:10+2", "answer": "12", "paraphrase": "A:2+10"},
]


def texts(tokens, length):
    return [
        TOKENIZER.decode(row[len(row) - count :]).strip().removeprefix("<bos>")
        for row, count in zip(tokens, length, strict=True)
    ]


def test_they_are_encoded_like_the_prompts_that_they_go_with():
    batch = prompt_batches(ITEMS, TOKENIZER, **SIZES, prompt_columns=("paraphrase",))[0]
    fields = batch.prompts.fields
    said = dict(
        zip(
            texts(batch.prompts.tokens, batch.prompts.length),
            texts(fields["paraphrase_tokens"], fields["paraphrase_length"]),
            strict=True,
        )
    )
    assert said == {"A:1+2": "A:2+1", "A:4+5": "A:5+4", "A:10+2": "A:2+10"}
    assert fields["paraphrase_tokens"].shape == batch.prompts.tokens.shape


def test_what_no_step_reads_is_not_there():
    assert "paraphrase_tokens" not in prompt_batches(ITEMS, TOKENIZER, **SIZES)[0].prompts.fields


def test_a_record_without_the_column_is_named():
    items = [*ITEMS[:2], {"body": "A:7+7", "answer": "14"}]
    with pytest.raises(ValueError, match=r"item 2 \('A:7\+7'\) has no 'paraphrase', which the step reads"):
        prompt_batches(items, TOKENIZER, **SIZES, prompt_columns=("paraphrase",))


def test_one_that_is_too_long_is_an_error_or_takes_its_item_along():
    items = [*ITEMS, {"body": "A:3+3", "answer": "6", "paraphrase": "A:3+3 in other words"}]
    with pytest.raises(ValueError, match="does not fit: its prompt has"):
        prompt_batches(items, TOKENIZER, **SIZES, prompt_columns=("paraphrase",))
    dropping = prompt_batches(items, TOKENIZER, **SIZES, overlong="drop", prompt_columns=("paraphrase",))
    assert (dropping.kept, dropping.dropped) == (3, 1)


def test_a_bucket_holds_both():
    short = [{"body": f"A:{n}+1", "answer": "1", "paraphrase": f"A:{n}+100"} for n in range(3)]
    batch = prompt_batches(short, TOKENIZER, **SIZES, widths=(7, 9), prompt_columns=("paraphrase",))[0]
    assert batch.prompts.tokens.shape == (3, 9)
    assert prompt_batches(short, TOKENIZER, **SIZES, widths=(7, 9))[0].prompts.tokens.shape == (3, 7)


def test_the_paraphrase_of_a_sum_has_its_answer_and_its_split():
    swapped = 0
    for item in tasks.task("addition").generate(level=2, count=50):
        other = paraphrase(item.body)
        assert split_of(other) == "train"
        assert sum(map(int, other.removeprefix("A:").split("+"))) == int(item.answer)
        swapped += other != item.body
    assert 30 < swapped < 50
    assert paraphrase(paraphrase("A:47+85")) == "A:47+85"


def test_a_column_is_written_as_a_template():
    records = ({"body": "A:1+2", "answer": "3", "raw": {"hint": "2+1"}}, {"body": "A:4+5", "answer": "9", "hint": "no"})
    sets = {"train": ProblemSet("file", "train", records, "print")}
    made = with_column(sets, "privileged", "{body}={{ answer }} {{ hint }}")["train"]
    assert [one["privileged"] for one in made] == ["A:1+2=3 2+1", "A:4+5=9 no"]
    assert made.fingerprint != with_column(sets, "privileged", "{body}")["train"].fingerprint
    for text, message in (("{{ answer }}", "has no place for the prompt"), ("{body}{{ hand }}", "fails with")):
        with pytest.raises(ValueError, match=message):
            with_column(sets, "privileged", text)
    talks = {"train": ProblemSet("file", "train", ({"messages": [], "answer": "3"},), "print")}
    with pytest.raises(ValueError, match="conversations have no single prompt"):
        with_column(talks, "privileged", "{body}")
