"""Tasks of several turns: their cards' examples, splits, reference conversations, and what a warm start trains on."""

from __future__ import annotations

from dataclasses import asdict
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import losses
from jaxrl_llm.data import CharacterTokenizer, DataSpec, split_of, supervised_batches, tasks
from jaxrl_llm.data.tasks import addition, bargaining, calculator, chain, corruption, grid, self_correction
from jaxrl_llm.data.tasks.items import record
from jaxrl_llm.experience import Source
from jaxrl_llm.rows import Written, demonstrations
from jaxrl_llm.training import make_train_step

TOKENIZER = CharacterTokenizer()
VARIANTS = [
    ("grid", {}, 4),
    ("grid", {"view": "blind", "size": 3}, 2),
    ("bargaining", {}, 2),
    ("calculator", {"fault_probability": 0.3}, 3),
    ("calculator", {"repeated": 0.5}, 1),
    ("self_correction", {"problem": "chain"}, 4),
    ("self_correction", {"problem": "deduction", "problem_options": {"scratchpad": False}}, 2),
]
EVERY = pytest.mark.parametrize(("name", "options", "level"), VARIANTS)


def said(task, item, number=0):
    return task.segments(record(item, number))


@EVERY
def test_items_are_distinct_deterministic_and_split_by_what_tells_them_apart(name, options, level):
    task = tasks.task(name, **options)
    sets = {
        split: task.generate(level=level, count=25, seed=1, split=split) for split in ("train", "validation", "test")
    }
    identities = {split: {task.identity(item) for item in items} for split, items in sets.items()}
    assert all(len(found) == 25 for found in identities.values())
    assert all(split_of(identity) == split for split, found in identities.items() for identity in found)
    assert sets["train"][:10] == task.generate(level=level, count=10, seed=1)
    assert {(item.task, item.level) for item in sets["train"]} == {(name, level)}
    spec = DataSpec(name, (level,), "train", 4, options=options)
    assert spec.items() == task.generate(level=level, count=4)


@EVERY
def test_reference_conversations_are_text_of_the_tokenizer_and_alternate(name, options, level):
    task = tasks.task(name, **options)
    for number, item in enumerate(task.generate(level=level, count=20)):
        parts = said(task, item, number)
        assert all(TOKENIZER.decode(TOKENIZER.encode(part.text)) == part.text for part in parts)
        assert [part.source == Source.OBSERVATION for part in parts] == [bool(n % 2) for n in range(len(parts))]
        assert all(part.text.endswith(("<n>", "<eos>")) for part in parts[::2])
        assert not any(part.trained for part in parts[1::2])
        assert said(task, item, number) == parts
        if number == 0:
            assert task.response(item) == "".join(part.text for part in parts)


def test_a_task_of_one_completion_has_that_as_its_response():
    assert tasks.task("addition").response(addition.item(4, 8, level=1)) == "<t>4+8+0=12</t><a>12</a><eos>"


# ---- grid -----------------------------------------------------------------------------------------------------------


def test_grid_example_in_both_views():
    rows = ["S.#", ".#.", "..G"]
    assert grid.item(rows).body == "G:S.#/.#./..G<o>.#.#.</o>"
    assert grid.item(rows, view="blind").body == "G:3<o>.#.#.</o>"
    assert grid.shortest_path(rows) == "DDRR"
    assert (grid.item(rows).level, grid.item(rows).answer) == (4, "S.#/.#./..G")
    assert tasks.task("grid", size=3).response(grid.item(rows)) == (
        "<a>D</a><n><o>...##</o><a>D</a><n><o>..##.</o><a>R</a><n><o>.##.G</o><a>R</a><n>"
    )
    assert [grid.verify(grid.item(rows), moves) for moves in ("DDRR", "DDR", "RLDDRR", "", None)] == [1, 0, 1, 0, 0]
    assert grid.verify(grid.item(rows), "U" * 12 + "DDRR") == 0


@pytest.mark.parametrize(("size", "level"), [(3, 1), (3, 5), (7, 9)])
def test_the_level_of_a_grid_is_its_shortest_path(size, level):
    task = tasks.task("grid", size=size, wall_probability=0.3)
    for item in task.generate(level=level, count=5, split="extrapolation"):
        rows = item.answer.split("/")
        assert [len(row) for row in rows] == [size] * size
        assert item.answer.count("S") == item.answer.count("G") == 1
        assert grid.distances(rows, grid.find(rows, "S"))[grid.find(rows, "G")] == level
        assert grid.verify(item, grid.shortest_path(rows)) == 1


# ---- calculator -----------------------------------------------------------------------------------------------------


def test_calculator_problems_stay_within_what_the_tool_takes():
    for item in tasks.task("calculator").generate(level=3, count=100):
        start, steps = calculator.operations(item.body)
        assert all(10 <= number <= 999 for number in (start, *(operand for _, operand in steps)))
        value = start
        for operator, operand in steps:
            value = {"+": value + operand, "-": value - operand, "*": value * operand}[operator]
            assert abs(value) < 10**7
        assert item.answer == str(value)


def test_faults_appear_in_reference_conversations_and_are_made_up():
    task = tasks.task("calculator", fault_probability=0.5)
    conversations = [
        [part.text for part in said(task, item, number)] for number, item in enumerate(task.generate(level=2, count=60))
    ]
    faults = [texts.count("<o>ERR</o>") for texts in conversations]
    assert set(faults) == {0, 1, 2}
    for texts in conversations:
        for place, text in enumerate(texts):
            if text == "<o>ERR</o>":
                assert texts[place - 1] == texts[place + 1]
                assert texts[place + 2] != "<o>ERR</o>"


# ---- self-correction ------------------------------------------------------------------------------------------------


def test_corruption_example():
    assert corruption.addition("A:47+85", 0, 1) == ("7+5+0=13;4+8+1=13", "133")
    assert corruption.addition("A:5+4", 0, 1) == ("5+4+0=10", "10")
    assert corruption.addition("A:99+99", 0, 2) == ("9+9+0=00;9+9+0=18", "180")
    assert corruption.addition("A:905+7", 1, 9) == ("5+7+0=12;0+0+1=10;9+0+1=10", "1002")
    assert corruption.modular_chain("M13:0-1*12+5", 1, 12) == ("0-1=12;12*12=0;0+5=5", "5")


@pytest.mark.parametrize("problem", ["addition", "chain", "deduction"])
def test_corrupted_attempts_are_wrong_and_the_second_is_the_reference(problem):
    task = tasks.task("self_correction", problem=problem, corrupted=1.0)
    for item in task.generate(level=3, count=60):
        first, request, second = said(task, item)
        assert not first.trained
        assert second.trained
        assert request.text == self_correction.REVISE
        assert second.text == f"<t>{item.think}</t><a>{item.answer}</a><eos>"
        answer = first.text.partition("<a>")[2].partition("</a>")[0]
        assert task.verify(item, answer) == 0
        assert first.text.endswith("</a><n>")


def test_the_share_of_corrupted_attempts():
    for share in (0.0, 0.5, 1.0):
        task = tasks.task("self_correction", corrupted=share)
        items = task.generate(level=3, count=300)
        found = np.mean([not said(task, item)[0].trained for item in items])
        assert abs(found - share) <= (0.1 if share == 0.5 else 0)


def test_an_error_that_a_factor_of_zero_would_hide_is_not_drawn():
    item = chain.item(7, 3, [("+", 5), ("*", 0), ("+", 1)])
    for seed in range(30):
        assert corruption.random_chain(Random(seed), item.body, item.think, item.answer).answer != item.answer


def test_the_direct_variant_has_no_scratch_in_either_attempt():
    task = tasks.task("self_correction", problem_options={"scratchpad": False}, corrupted=1.0)
    assert "<t>" not in task.response(task.generate(level=2, count=1)[0])


# ---- what is trained on ---------------------------------------------------------------------------------------------


@EVERY
def test_supervised_batches_train_on_the_policys_own_words(name, options, level):
    task = tasks.task(name, **options)
    items = task.generate(level=level, count=8)
    limits = {"max_prompt_tokens": 80, "max_completion_tokens": 260}
    batches = supervised_batches(items, TOKENIZER, sequences_per_step=4, seed=0, segments=task.segments, **limits)
    batch = batches[1]
    for row, item in enumerate(batch.items):
        parts = task.segments(item)
        length = batch.length[row]
        assert TOKENIZER.decode(batch.tokens[row, :length]) == "".join(part.text for part in parts)
        trained = batch.tokens[row][batch.mask[row] > 0]
        assert TOKENIZER.decode(trained) == "".join(part.text for part in parts if part.trained)
        observed = batch.tokens[row][batch.source[row] == Source.OBSERVATION]
        assert TOKENIZER.decode(observed) == "".join(part.text for part in parts[1::2])
        assert (batch.source[row, length:] == Source.PAD).all()
        for number in range((len(parts) + 1) // 2):
            of_turn = batch.tokens[row, :length][batch.turn[row, :length] == number]
            assert TOKENIZER.decode(of_turn) == "".join(part.text for part in parts[2 * number : 2 * number + 2])


def test_a_completion_is_one_turn_that_is_trained_on_whole():
    items = tasks.task("addition").generate(level=2, count=4)
    batch = supervised_batches(
        items, TOKENIZER, sequences_per_step=4, max_prompt_tokens=14, max_completion_tokens=30, seed=0
    )[0]
    inside = np.arange(30) < batch.length[:, None]
    np.testing.assert_array_equal(batch.mask, inside)
    np.testing.assert_array_equal(batch.source, np.where(inside, Source.DEMONSTRATION, Source.PAD))
    assert not batch.turn.any()


def test_a_warm_start_does_not_learn_to_err_or_to_speak_for_the_environment(make_bigram):
    task = tasks.task("self_correction", corrupted=1.0)
    items = [asdict(item) for item in task.generate(level=1, count=4)]
    sizes = {"sequences_per_step": 4, "max_prompt_tokens": 8, "max_completion_tokens": 48, "seed": 0}
    rows = demonstrations(supervised_batches(items, TOKENIZER, segments=task.segments, **sizes)[0])
    model = make_bigram(TOKENIZER.vocabulary_size)
    step = make_train_step(model, optax.sgd(1.0), source=Written(4), losses=[losses.negative_log_likelihood])
    state = step.init(jax.random.key(0))
    before = np.asarray(state.params["scores"])
    state, metrics = step(state, written=rows)
    moved = np.flatnonzero(np.abs(np.asarray(state.params["scores"]) - before).sum(axis=1) > 1e-6)
    # A row of the table changes where a token that is trained on follows it: never behind the first attempt.
    tokens, mask = np.asarray(rows.tokens), np.asarray(rows.mask)
    follow = {int(tokens[r, t - 1]) for r in range(4) for t in range(1, 48) if mask[r, t]}
    assert set(moved.tolist()) == follow
    assert TOKENIZER.id("<r>") not in follow
    assert np.isfinite(float(metrics["loss"]))
    counted = jnp.sum(rows.mask)
    assert float(counted) == sum(len(TOKENIZER.encode(said(task, tasks.Item(**i))[2].text)) for i in items)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tasks.task("grid", size=8), "size is 8; it must be between 3 and 7"),
        (lambda: tasks.task("grid", wall_probability=0.5), r"wall_probability is 0\.5"),
        (lambda: tasks.task("grid", view="half"), "view is 'half'"),
        (lambda: grid.find(["..", ".S"], "G"), "has no 'G'"),
        (
            lambda: tasks.task("grid", size=3, wall_probability=0.0).generate(level=5, count=1, split="extrapolation"),
            "only 0",
        ),
        (lambda: tasks.task("calculator", fault_probability=2), "fault_probability is 2"),
        (lambda: calculator.operations("T:3"), "must look like"),
        (lambda: tasks.task("self_correction", problem="sorting"), "problem is 'sorting'"),
        (
            lambda: tasks.task("calculator", repeated=0.5, fault_probability=0.1),
            "repeated is 0.5 and fault_prob.*set one",
        ),
        (lambda: bargaining.problem("21/40"), "'21/40' is not a problem of bargaining; it must look like"),
        (lambda: tasks.task("self_correction", corrupted=-1), "corrupted is -1"),
        (lambda: tasks.task("self_correction", problem_options={"modulus": 7}), "which addition does not accept"),
        (lambda: tasks.task("self_correction", problem_options=[1]), "must map options"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()
