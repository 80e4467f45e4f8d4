"""Readings: what they are handed of rows and items, and what becomes of what they return."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.experience import Prompts
from jaxrl_llm.rewards import Guarded, RewardError, guarded, host
from jaxrl_llm.rewards.host import Reading
from jaxrl_llm.signatures import reading
from jaxrl_llm.training import Fill, Reward
from jaxrl_llm.training.reading import Context, columns_of, reading_part, reads_items

NAN = float("nan")
ITEMS = [{"body": f"prompt {i}", "answer": f"answer {i}", "level": i} for i in range(4)]


class At:
    """A state of which a reading sees the step."""

    step = 7


def decode(ids):
    return " ".join(map(str, ids))


def read(rows, *terms, items=ITEMS, prompts=None):
    """(rows with what readings fill, numbers about them)."""
    terms = [term if isinstance(term, (Fill, Reward)) else Reward(term, 0.5, "judge") for term in terms]
    outputs = {
        term.name: (f"reward/{term.name}",) if isinstance(term, Reward) else term.names for term in terms
    }  # fmt: skip
    context = Context(items, decode)
    work = {"rows": rows} | ({} if prompts is None else {"prompts": prompts})
    part = reading_part("reading", terms, outputs, "rows", 2)
    return part.function(At(), work, context)["rows"], context.numbers


def column(rows, function, **given):
    """What a reward called `judge` gave each row."""
    return np.asarray(read(rows, function, **given)[0]["reward/judge"])


# ---- what they are handed -------------------------------------------------------------------------------------------


def test_readings_get_what_they_name(rows):
    seen = {}

    def judge(items, completions, answers, prompts, length, step):
        seen.update(items=items, completions=completions, answers=answers, prompts=prompts, length=length, step=step)
        return np.arange(len(completions))

    # Groups are ids: rows need not stand in the order of their prompts.
    shuffled = replace(rows, group=jnp.asarray([3, 3, 1, 1, 0, 0, 2, 2]))
    np.testing.assert_array_equal(column(shuffled, judge), np.arange(8))
    assert seen["prompts"] == [f"prompt {i}" for i in (3, 3, 1, 1, 0, 0, 2, 2)]
    assert [item["level"] for item in seen["items"]] == [3, 3, 1, 1, 0, 0, 2, 2]
    assert seen["answers"][0] == "answer 3"
    assert seen["step"] == 7
    assert isinstance(seen["length"], np.ndarray)
    # Completions end where they end, whatever the width of the batch.
    assert [len(text.split()) for text in seen["completions"]] == rows.length.tolist()
    assert seen["completions"][1] == decode(rows.tokens[1, :2].tolist())


def test_texts_do_not_contain_the_end_of_sequence(rows):
    seen = {}
    said = seen.setdefault
    judge = lambda completions, critique_text: said("read", (completions, critique_text)) and np.zeros(8)  # noqa: E731
    tokens = np.asarray(rows.tokens)
    ends = (int(tokens[0, int(rows.length[0]) - 1]),)
    written = rows.filled(critique_tokens=rows.tokens, critique_length=rows.length)
    context = Context(ITEMS, decode, eos_ids=ends)
    term = Reward(judge, 0.5, "judge")
    reading_part("reading", [term], {"judge": ("reward/judge",)}, "rows", 2).function(At(), {"rows": written}, context)
    for texts in seen["read"]:
        for row, (text, length) in enumerate(zip(texts, rows.length.tolist(), strict=True)):
            ended = int(tokens[row, length - 1]) in ends
            assert text == decode(tokens[row, : length - ended].tolist())
    assert seen["read"][0][0].split() == decode(tokens[0, : int(rows.length[0]) - 1].tolist()).split()


def test_rows_find_their_items_by_the_id_of_their_prompt(rows):
    prompts = Prompts(*(np.zeros(4, np.int32),) * 5).replace(prompt_id=np.array([3, 2, 1, 0]))
    seen = column(rows, lambda items: [item["level"] for item in items], prompts=prompts)
    np.testing.assert_array_equal(seen, [3, 3, 2, 2, 1, 1, 0, 0])


def test_a_reading_of_one_row_is_called_for_each_of_them(rows):
    def judge(completion, answer, prompt, item, length, *, factor=2.0):
        assert f"answer {item['level']}" == answer
        assert prompt.endswith(answer[-1])
        return None if item["level"] == 1 else factor * len(completion.split()) + float(length)

    expected = 3.0 * np.asarray(rows.length, np.float32)
    np.testing.assert_array_equal(column(rows, judge), np.where(np.arange(8) // 2 == 1, np.nan, expected))


def test_a_reading_may_be_awaited_and_its_calls_wait_together(rows):
    async def judge(completion):
        await asyncio.sleep(0.2)
        return len(completion.split())

    started = time.monotonic()
    np.testing.assert_array_equal(column(rows, judge), rows.length)
    assert time.monotonic() - started < 8 * 0.2


def test_a_function_that_takes_anything_gets_text_and_items(rows):
    seen = {}

    def judge(completions, **known):
        seen.update(known)
        return [0.0] * len(completions)

    column(rows, judge)
    assert seen.keys() == {"prompts", "answers", "items", "body", "level"}
    assert seen["level"] == [ITEMS[0]["level"]] * 2 + [ITEMS[1]["level"]] * 2 + seen["level"][4:]


def test_columns_of_the_data_are_given_by_their_names(rows):
    items = [{"body": "b", "raw": {"hardness": number, "hint": None}} for number in range(4)]
    seen = {}

    def of_all(completions, hardness, length, truncated=None, hint=None, level=None):
        seen.update(hardness=hardness, length=length, truncated=truncated, hint=hint, level=level)
        return length

    def of_one(completion, hardness, length):
        return hardness * 100 + length

    np.testing.assert_array_equal(column(rows, of_all, items=items), rows.length)
    np.testing.assert_array_equal(seen["truncated"], rows.truncated)
    assert (seen["hint"], seen["level"]) == (None, None)
    of_rows = column(rows, of_one, items=items)
    np.testing.assert_array_equal(of_rows, np.asarray(seen["hardness"]) * 100 + rows.length)
    assert len(set(seen["hardness"])) > 1


def test_what_columns_there_are():
    assert columns_of([{"body": "b", "answer": "", "raw": {"x": 1, "length": 2, "no name": 3}}]) == {"body", "x"}
    assert reads_items([Reward(reading(lambda x: x), 1.0, "r")], {"x"})
    assert not reads_items([Reward(reading(lambda x: x), 1.0, "r")])


def test_a_reading_of_arrays_needs_no_text_and_no_items(rows):
    @reading
    def counted(length, weight):
        return length * weight

    np.testing.assert_array_equal(column(rows, counted, items=None), rows.length)
    np.testing.assert_array_equal(column(rows, lambda completions: [1.0] * len(completions), items=None), 1.0)
    assert not reads_items([Reward(counted), Reward(lambda completion: 0.0), Reward(lambda rewards: rewards)])
    for wants in (lambda answers: 0, lambda item: 0, lambda completions, **known: 0):
        assert reads_items([Reward(counted), Fill("x", wants)])
    with pytest.raises(ValueError, match=r"call step\(state, prompts, items\)"):
        column(rows, lambda answers: [0.0] * len(answers), items=None)


def test_absent_rows_are_shown_to_nobody(rows):
    weight = jnp.asarray([1.0, 0, 1, 1, 0, 0, 1, 1])
    seen = column(replace(rows, weight=weight), lambda completions: list(range(len(completions))))
    np.testing.assert_array_equal(seen, [0, np.nan, 1, 2, np.nan, np.nan, 3, 4])
    nobody = column(replace(rows, weight=weight * 0), lambda completions: 1 / 0)
    np.testing.assert_array_equal(nobody, [np.nan] * 8)


# ---- what they return -----------------------------------------------------------------------------------------------


def fill(rows, names, function, **options):
    return read(rows, Fill(names, function, "read", **options))[0]


def test_a_reading_gives_a_field_with_what_does_not_apply(rows):
    def stated(completions):
        return {"confidence": [0.8, None, float("nan"), 1, 0, 0.25, None, 0]}

    np.testing.assert_allclose(fill(rows, "confidence", stated)["confidence"], [0.8, NAN, NAN, 1, 0, 0.25, NAN, 0])
    unknown = fill(rows, "points", lambda completions: [1, None, *[2] * 6])["points"]
    np.testing.assert_array_equal(unknown, [1, 0, *[2] * 6])
    np.testing.assert_array_equal(
        fill(rows, "rating", lambda completions: [3, None, *[1] * 6])["rating"], [3, np.nan, *[1] * 6]
    )
    np.testing.assert_array_equal(
        fill(rows, "preferred", lambda completions: [1, 0, None, None, 1, 0, 1, 0])["preferred"],
        [1, 0, -1, -1, 1, 0, 1, 0],
    )


def test_a_reading_gives_several_names_by_name_or_in_their_order(rows):
    low, high = list(range(8)), [None, *range(7)]
    for returned in ({"high": high, "low": low}, (low, high)):
        filled = fill(rows, ("low", "high"), lambda completions, returned=returned: returned)
        np.testing.assert_array_equal(filled["low"], low)
        np.testing.assert_array_equal(filled["high"], [0, *range(7)])
    by_row = fill(rows, ("low", "high"), lambda completion: (len(completion.split()), None))
    np.testing.assert_array_equal(by_row["low"], rows.length)
    np.testing.assert_array_equal(by_row["high"], 0)


def test_equal_answers_get_equal_ids(rows):
    said = ["a", "a", "b", None, "c", "d", "d", "d"]
    ids = np.asarray(fill(rows, "answer_id", lambda completions: said)["answer_id"])
    assert ids.dtype == np.int32
    assert ids[3] == -1
    assert ids[0] == ids[1]
    assert ids[6] == ids[7]
    assert len(set(ids[[0, 2, 4, 5]].tolist()) | {-1}) == 5
    # Numbers are taken as they are, and rows that are not there say nothing.
    absent = replace(rows, weight=rows.weight.at[0].set(0.0))
    np.testing.assert_array_equal(
        fill(absent, "answer_id", lambda completions: [4, 4, None, 2, 2, 2, 2])["answer_id"], [-1, 4, 4, -1, 2, 2, 2, 2]
    )


@pytest.mark.parametrize("answer", [3.5, 2**24, [1, 2], {"a": 1}])
def test_answers_that_cannot_be_compared_are_refused(rows, answer):
    with pytest.raises(RewardError, match=r"compared by equality: return a text, or one whole|must return one number"):
        fill(rows, "answer_id", lambda completions: [answer] * len(completions))


def test_a_reading_may_say_something_of_each_token_or_a_list_of_numbers(rows):
    def steps(completion):
        count = len(completion.split())
        return [0.0] * (count - 1) + [1.0]

    labels = np.asarray(fill(rows, "step_labels", steps)["step_labels"])
    assert labels.shape == rows.tokens.shape
    for row, length in enumerate(rows.length.tolist()):
        assert labels[row, length - 1] == 1
        assert np.isnan(labels[row, length:]).all()
    vectors = fill(rows, "embedding", lambda completion: None if completion.count(" ") == 1 else [1.0, 2.0])
    np.testing.assert_array_equal(vectors["embedding"][:2], [[1, 2], [0, 0]])
    with pytest.raises(RewardError, match=r"'embedding' has shape \(1,\) at row 1, and \(2,\) at another"):
        fill(rows, "embedding", lambda completions: [[1.0, 2.0], *[[1.0]] * 7])


def test_shapes_are_known_before_anything_is_read(rows):
    terms = [Fill(("answer_id", "confidence", "step_labels"), lambda completions: 0, "read")]
    part = reading_part("reading", terms, {"read": terms[0].names}, "rows", 2)
    shapes = part.shapes(None, {"rows": rows})["rows"]
    assert shapes["answer_id"] == jax.ShapeDtypeStruct((8,), jnp.int32)
    assert shapes["confidence"] == jax.ShapeDtypeStruct((8,), jnp.float32)
    assert shapes["step_labels"] == jax.ShapeDtypeStruct((8, 6), jnp.float32)


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def at_row(value):
    return lambda completions: [value if row == 5 else 0.0 for row in range(len(completions))]


def raising(completions):
    return [1 / (text.count(" ") - 5) for text in completions]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            raising,
            r"'judge' raised ZeroDivisionError: .* at row 0 \(completion '.*'\); catch the case in the function .*, or "
            "give value_on_failure to go on$",
        ),
        (at_row(float("-inf")), r"'judge' returned -inf at row 5 .* must be finite .* return a number such as 0\.0"),
        (lambda completions: [0.0] * 7, "'judge' returned 7 values for 8 rows; it must return .* 8 floats"),
        (lambda completions: 0.5, "'judge' returned a float for 8 rows"),
    ],
)
def test_a_reading_that_fails_is_named_with_its_row_and_a_remedy(rows, function, message):
    with pytest.raises(RewardError, match=message):
        column(rows, function)


def test_of_a_shipped_function_the_remedy_is_not_to_edit_it():
    from jaxrl_llm.rewards import number_match

    for function in (number_match, Guarded(partial(number_match), "judge")):
        assert host._shipped(function)
        said = str(host._told(Reading(function, "judge"), ValueError("no number"), {}, 3))
        assert said.endswith("no number at row 3; give value_on_failure, the value of such completions, to go on")
    assert not host._shipped(guarded._staying(raising))
    assert not host._shipped(partial(raising))


@pytest.mark.parametrize("value", [float("nan"), None])
def test_what_does_not_apply_is_no_failure(rows, value):
    np.testing.assert_array_equal(column(rows, at_row(value)), [0, 0, 0, 0, 0, np.nan, 0, 0])


def failing(completion):
    return 1 / (completion.count(" ") - 5)


def test_a_failure_costs_its_own_row_where_a_value_is_given(rows):
    filled, numbers = read(rows, Reward(failing, 1.0, "judge", value_on_failure=-2.0))
    spaces = np.asarray(rows.length) - 1
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(filled["reward/judge"], np.where(spaces == 5, -2.0, 1 / (spaces - 5.0)))
    assert numbers["failures/judge"] == 2
    assert numbers["seconds/judge"] >= 0
    # Nothing is counted of a reading that may not fail.
    assert read(rows, lambda completions: [0.0] * 8)[1].keys() == {"seconds/judge"}


def late(completion):
    if completion.count(" ") == 5:
        time.sleep(0.4)
    return 1.0


async def awaited_late(completion):
    await asyncio.sleep(0.4 if completion.count(" ") == 5 else 0.0)
    return 1.0


@pytest.mark.parametrize("function", [late, awaited_late])
def test_a_call_that_is_late_is_named_or_gets_the_value_on_failure(rows, function):
    filled, numbers = read(rows, Reward(function, 1.0, "judge", deadline_s=0.1, value_on_failure=0.0))
    np.testing.assert_array_equal(filled["reward/judge"], np.asarray(rows.length) != 6)
    assert numbers["failures/judge"] == 2
    with pytest.raises(RewardError, match=r"'judge' took longer than its deadline of 0.1 s at row 0"):
        read(rows, Reward(function, 1.0, "judge", deadline_s=0.1))
