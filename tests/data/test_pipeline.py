"""The input pipeline: a batch is a function of its step, and nothing is ever cut."""

from __future__ import annotations

import numpy as np
import pytest

from jaxrl_llm.data import (
    CharacterTokenizer,
    DataSpec,
    Item,
    data_set,
    encode_prompts,
    evaluation_batches,
    prompt_batches,
    reference_response,
    supervised_batches,
    tasks,
)

TOKENIZER = CharacterTokenizer()
ITEMS = tasks.task("chain").generate(level=3, count=22)
LONG = Item("M7:" + "1+" * 30 + "1", "", "3", "chain", 30, "chain-30")
PROMPT = {"max_prompt_tokens": 14, "max_answer_tokens": 3}


def batches(source=ITEMS, *, seed=0, **changes):
    arguments = {"prompts_per_step": 5, "seed": seed} | PROMPT | changes
    return prompt_batches(source, TOKENIZER, **arguments)


def assert_same(left, right):
    assert left.items == right.items
    for name in ("tokens", "length", "prompt_id", "answer_tokens", "answer_length"):
        np.testing.assert_array_equal(getattr(left.prompts, name), getattr(right.prompts, name))


def test_prompts_are_left_padded_and_answers_right_padded():
    item = Item("M7:3+5", "3+5=1", "1", "chain", 1, "chain-1")
    prompts = encode_prompts([item], TOKENIZER, max_prompt_tokens=12, max_answer_tokens=3)
    assert TOKENIZER.decode(prompts.tokens[0]) == "<pad>" * 4 + "<bos>M7:3+5\n"
    assert TOKENIZER.decode(prompts.answer_tokens[0]) == "1<pad><pad>"
    assert (prompts.length[0], prompts.answer_length[0], prompts.prompt_id[0]) == (8, 1, 0)
    assert all(np.asarray(array).dtype == np.int32 for array in (prompts.tokens, prompts.length, prompts.prompt_id))


def test_a_batch_does_not_depend_on_what_was_read_before():
    used, fresh = batches(), batches()
    for step in range(12):
        used[step]
    for step in (7, 0, 7, 11):
        assert_same(used[step], fresh[step])


def test_rows_and_items_belong_together():
    batch = batches()[3]
    for row, item in enumerate(batch.items):
        assert TOKENIZER.decode(batch.prompts.tokens[row]).endswith(f"<bos>{item['body']}\n")
        assert batch.prompts.prompt_id[row] == item["item_id"]
        assert ITEMS[item["item_id"]].body == item["body"]


def test_each_epoch_has_its_own_order_and_no_step_repeats_a_prompt():
    read = batches()
    assert read.steps_per_epoch == 4
    epochs = [np.concatenate([read[step].prompts.prompt_id for step in range(4 * e, 4 * e + 4)]) for e in range(3)]
    assert all(len(set(epoch.tolist())) == 20 for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])
    # What does not fill a batch is left to another epoch, never to none.
    assert set(np.concatenate([read[step].prompts.prompt_id for step in range(60)]).tolist()) == set(range(22))


def test_seed_decides_the_order():
    assert not np.array_equal(batches(seed=0)[0].prompts.prompt_id, batches(seed=1)[0].prompts.prompt_id)
    assert_same(batches(seed=1)[2], batches(seed=1)[2])


def test_stored_data_and_items_give_the_same_batches(tmp_path):
    stored = data_set(DataSpec("chain", (3,), "train", 22), str(tmp_path))
    for step in (0, 9):
        assert_same(batches(stored)[step], batches()[step])
        assert_same(batches(stored.source)[step], batches()[step])


def test_too_long_is_an_error_that_names_the_item_its_tokens_and_the_limit():
    with pytest.raises(ValueError, match=r"item 22 \('M7:1\+1.*66 tokens, more than max_prompt_tokens=14"):
        batches([*ITEMS, LONG])
    with pytest.raises(ValueError, match="answer has 1 tokens, more than max_answer_tokens=0"):
        batches(max_answer_tokens=0)


def test_too_long_is_dropped_and_counted_on_request():
    read = batches([LONG, *ITEMS], overlong="drop")
    assert (read.kept, read.dropped) == (22, 1)
    seen = {number for step in range(40) for number in read[step].prompts.prompt_id.tolist()}
    assert seen == set(range(1, 23))
    with pytest.raises(ValueError, match="no item is left of 1"):
        batches([LONG], overlong="drop")


def test_supervised_batches_hold_the_reference_completion():
    read = supervised_batches(
        ITEMS, TOKENIZER, sequences_per_step=4, max_prompt_tokens=14, max_completion_tokens=30, seed=0
    )
    batch = read[2]
    assert batch.prompt_tokens.shape == (4, 14)
    assert batch.tokens.shape == (4, 30)
    for row, item in enumerate(batch.items):
        assert TOKENIZER.decode(batch.tokens[row, : batch.length[row]]) == reference_response(item)
        assert batch.tokens[row, batch.length[row] - 1] == TOKENIZER.eos_id
        assert (batch.tokens[row, batch.length[row] :] == TOKENIZER.pad_id).all()
        real = batch.prompt_tokens[row, 14 - batch.prompt_length[row] :]
        assert TOKENIZER.decode(real) == f"<bos>{item['body']}\n"
    np.testing.assert_array_equal(batch.weight, np.ones(4))


def test_supervised_batches_of_the_direct_variant():
    arguments = {"sequences_per_step": 4, "max_prompt_tokens": 14, "max_completion_tokens": 4, "seed": 0}
    batch = supervised_batches(ITEMS, TOKENIZER, scratchpad=False, **arguments)[0]
    assert TOKENIZER.decode(batch.tokens[0]) == f"<a>{batch.items[0]['answer']}</a><eos>"
    with pytest.raises(ValueError, match=r"completion has .* tokens, more than max_completion_tokens=4"):
        supervised_batches(ITEMS, TOKENIZER, **arguments)


def test_evaluation_batches_hold_every_item_once():
    read = evaluation_batches(ITEMS, TOKENIZER, prompts_per_batch=8, **PROMPT)
    assert [batch.prompts.tokens.shape for batch in read] == [(8, 14)] * 3
    np.testing.assert_array_equal(read[-1].weight, [1, 1, 1, 1, 1, 1, 0, 0])
    ids = np.concatenate([batch.prompts.prompt_id[batch.weight > 0] for batch in read])
    np.testing.assert_array_equal(ids, np.arange(22))
    assert all(len(batch.items) == 8 for batch in read)
    np.testing.assert_array_equal(
        np.concatenate([batch.prompts.tokens for batch in read])[:22], encode_prompts(ITEMS, TOKENIZER, **PROMPT).tokens
    )


def test_fewer_items_than_a_step_takes_come_several_times_with_numbered_copies():
    read = batches(prompts_per_step=50)
    assert (read.kept, read.steps_per_epoch) == (22, 1)
    prompts = read[0].prompts
    pairs = set(zip(prompts.prompt_id.tolist(), prompts.fields["repeat"].tolist(), strict=True))
    assert len(pairs) == 50
    assert {copy for _, copy in pairs} == {0, 1, 2}
    assert len({number for number, _ in pairs}) == 22
    assert "repeat" not in batches()[0].prompts.fields


def test_numbered_items_can_be_chosen():
    read = batches(numbered=True)
    everything = read.chosen(range(22))
    assert everything.prompts.fields["item"].tolist() == list(range(22))
    chosen = read.chosen([5, 0, 5, 5])
    assert [item["body"] for item in chosen.items] == [everything.items[number]["body"] for number in (5, 0, 5, 5)]
    assert chosen.prompts.fields["item"].tolist() == [5, 0, 5, 5]
    assert chosen.prompts.fields["repeat"].tolist() == [0, 0, 1, 2]
    np.testing.assert_array_equal(chosen.prompts.tokens, np.asarray(everything.prompts.tokens)[[5, 0, 5, 5]])
    assert batches().chosen is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: batches(prompts_per_step=0), "at least 1"),
        (lambda: batches(overlong="cut"), "'error' or 'drop'"),
        (lambda: batches([{"body": "M7:1+1"}] * 9), "no 'answer'"),
        (lambda: batches([{"body": "M7:1+1", "answer": "2", "item_id": 1}] * 9), "used twice"),
        (lambda: batches([{"body": "é", "answer": "2"}] * 9), "not in the alphabet"),
        (lambda: batches([]), "empty"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_negative_step_is_refused():
    with pytest.raises(IndexError, match="count from 0"):
        batches()[-1]
