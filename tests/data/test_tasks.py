"""What every task family promises: its card's examples, splits, determinism, distinct items, a verifier that judges."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from jaxrl_llm.data import CharacterTokenizer, reference_response, split_of, tasks
from jaxrl_llm.data.tasks import addition, chain, composition, countdown, function_calls, sorting
from jaxrl_llm.rewards import countdown as countdown_reward
from jaxrl_llm.rewards import exact_match

TOKENIZER = CharacterTokenizer()
VARIANTS = [
    ("addition", {}, 3),
    ("addition", {"scratchpad": False}, 2),
    ("chain", {}, 3),
    ("chain", {"modulus": 13}, 5),
    ("chain", {"claims": True}, 3),
    ("chain", {"attempts": 0.5}, 3),
    ("composition", {}, 2),
    ("composition", {"functions": "KLMNOPQ", "scratchpad": False}, 6),
    ("countdown", {}, 3),
    ("countdown", {}, 4),
    ("countdown", {"operators": "+-", "largest_number": 100, "largest_target": 25, "scratchpad": False}, 3),
    ("deduction", {}, 0),
    ("deduction", {}, 2),
    ("deduction", {"domain": "uncertain"}, 4),
    ("function_calls", {}, 2),
    ("sorting", {}, 5),
    ("sorting", {"scratchpad": True}, 12),
    ("sorting", {"operation": "reverse"}, 3),
    ("grid_moves", {}, 3),
    ("two_chains", {}, 2),
]
EVERY = pytest.mark.parametrize(("name", "options", "level"), VARIANTS)


def test_names_are_the_families():
    several_turns = ("bargaining", "calculator", "grid", "self_correction")
    one_completion = ("addition", "chain", "composition", "countdown", "deduction", "function_calls")
    one_completion += ("grid_moves", "sorting", "two_chains")
    assert tasks.names() == tuple(sorted(several_turns + one_completion))
    assert [name for name in tasks.names() if tasks.task(name).segments] == list(several_turns)


@pytest.mark.parametrize(
    ("made", "body", "think", "answer"),
    [
        (addition.item(47, 85, level=2), "A:47+85", "7+5+0=12;4+8+1=13", "132"),
        (addition.item(905, 7, level=3), "A:905+7", "5+7+0=12;0+0+1=01;9+0+0=09", "912"),
        (chain.item(7, 3, [("+", 5), ("*", 2), ("-", 4)]), "M7:3+5*2-4", "3+5=1;1*2=2;2-4=5", "5"),
        (chain.item(13, 0, [("-", 1), ("*", 12), ("+", 5)]), "M13:0-1*12+5", "0-1=12;12*12=1;1+5=6", "6"),
        (composition.item("KM", "abgd"), "F:K(M(abgd))", "M(abgd)=bgda;K(bgda)=adgb", "adgb"),
        (
            composition.item("VTU", "aabch"),
            "F:V(T(U(aabch)))",
            "U(aabch)=abch;T(abch)=bahc;V(bahc)=ghaf",
            "ghaf",
        ),
        (
            function_calls.item([(47, "+", 85), (3, "*", 4)]),
            "C:47+85;3*4",
            "",
            "add(a=47, b=85)\nmul(a=3, b=4)",
        ),
        (sorting.item([5, 3, 9, 1]), "S:5 3 9 1", "", "1 3 5 9"),
        (sorting.item([5, 3, 9, 1], operation="reverse"), "R:5 3 9 1", "", "1 9 3 5"),
    ],
)
def test_examples_of_the_cards(made, body, think, answer):
    assert (made.body, made.think, made.answer) == (body, think, answer)


@pytest.mark.parametrize(
    ("name", "word", "image"),
    [
        ("K", "abgd", "dgba"),
        ("L", "dacb", "abcd"),
        ("M", "abgd", "bgda"),
        ("N", "abgd", "dabg"),
        ("O", "ahb", "bac"),
        ("P", "ahb", "hga"),
        ("Q", "abgd", "dbga"),
        ("Q", "a", "a"),
        ("R", "abg", "abgg"),
        ("S", "abg", "bg"),
        ("S", "a", "a"),
        ("T", "abgdc", "badgc"),
        ("U", "aabca", "abc"),
        ("V", "abgh", "hgba"),
    ],
)
def test_string_functions(name, word, image):
    assert composition.FUNCTIONS[name](word) == image


@pytest.mark.parametrize(("body", "split"), [("A:47+85", "train"), ("C:3 7 12>30", "train"), ("F:K(M(abgd))", "test")])
def test_split_examples(body, split):
    assert split_of(body) == split


@EVERY
def test_every_item_verifies_and_a_corrupted_answer_does_not(name, options, level):
    task = tasks.task(name, **options)
    for item in task.generate(level=level, count=60):
        assert (item.task, item.level) == (name, level)
        assert task.verify(item, item.answer) == 1
        assert task.verify(item, None) == 0
        wrong = {"T": "F", "F": "U", "U": "T"}[item.answer] if name == "deduction" else item.answer[:-1]
        wrong = wrong if name != "countdown" else item.answer + "+1"
        assert task.verify(item, wrong) < 1
        # The host reward that the task names agrees with the task's own verifier, on the reference response.
        response = reference_response(item, task.scratchpad).removesuffix("<eos>")
        rewards = countdown_reward([response], [item.body]) if task.reward == "countdown" else None
        assert (rewards or exact_match([response], [item.answer])) == [1.0]
        assert TOKENIZER.decode(TOKENIZER.encode(item.body + item.think)) == item.body + item.think


@EVERY
def test_items_are_distinct_deterministic_and_extend_smaller_sets(name, options, level):
    task = tasks.task(name, **options)
    items = task.generate(level=level, count=80, seed=1)
    assert len({item.body for item in items}) == 80
    assert items == tasks.task(name, **options).generate(level=level, count=80, seed=1)
    assert items[:30] == task.generate(level=level, count=30, seed=1)
    assert items != task.generate(level=level, count=80, seed=2)


@EVERY
def test_splits_are_disjoint_and_hold_their_own_hash(name, options, level):
    task = tasks.task(name, **options)
    bodies = {
        split: {task.identity(item) for item in task.generate(level=level, count=60, split=split)}
        for split in ("train", "validation", "test")
    }
    assert all(split_of(body) == split for split, found in bodies.items() for body in found)
    assert len(set.union(*bodies.values())) == 3 * 60


def test_extrapolation_ignores_the_hash_and_reaches_past_the_levels():
    items = tasks.task("addition").generate(level=10, count=60, split="extrapolation")
    assert {split_of(item.body) for item in items} == {"train", "validation", "test"}
    assert all(len(item.body) == 2 + 10 + 1 + 10 for item in items)


@pytest.mark.parametrize("name", tasks.names())
def test_last_level_can_be_generated_and_the_next_cannot(name):
    task = tasks.task(name)
    assert len(task.generate(level=task.last_level, count=20, split="extrapolation")) == 20
    with pytest.raises(ValueError, match="cannot be generated"):
        task.generate(level=task.last_level + 1, count=1, split="extrapolation")
    with pytest.raises(ValueError, match="extrapolation"):
        task.generate(level=task.levels[-1] + 1, count=1)


def test_addition_operands_have_exactly_the_digits_of_the_level():
    for level, low, high in ((1, 0, 9), (3, 100, 999)):
        items = tasks.task("addition").generate(level=level, count=60)
        numbers = [int(number) for item in items for number in item.body[2:].split("+")]
        assert low <= min(numbers)
        assert max(numbers) <= high


def test_exhausted_generator_stops_with_a_message():
    task = tasks.task("addition")
    train = sum(split_of(f"A:{a}+{b}") == "train" for a in range(10) for b in range(10))
    assert len(task.generate(level=1, count=train)) == train
    with pytest.raises(ValueError, match=f"has only {train} distinct items"):
        task.generate(level=1, count=train + 1)
    with pytest.raises(ValueError, match="has only 0 distinct items"):
        tasks.task("countdown", largest_number=2, smallest_target=99).generate(level=2, count=5)


def test_reference_responses():
    item = addition.item(4, 8, level=1)
    assert reference_response(item, True) == "<t>4+8+0=12</t><a>12</a><eos>"
    assert reference_response(item, False) == "<a>12</a><eos>"


def test_option_off_leaves_the_scratch_out():
    assert all(item.think == "" for item in tasks.task("chain", scratchpad=False).generate(level=3, count=20))
    assert all(item.think for item in tasks.task("chain").generate(level=3, count=20))


def test_countdown_solvable():
    assert countdown.solvable((3, 3, 8, 8), 24)
    assert not countdown.solvable((1, 1, 1), 9)
    assert countdown.solvable((3, 6, 12), 30, operators="+-*")


@pytest.mark.parametrize(("level", "operators"), [(2, "+-"), (3, "+-*"), (4, "+-*/")])
def test_countdown_problems_are_solvable_with_the_operators_of_their_level(level, operators):
    for item in tasks.task("countdown").generate(level=level, count=25):
        numbers, target = countdown.problem(item.body)
        assert len(numbers) == level
        assert 1 <= target <= 100
        assert all(1 <= number <= 20 for number in numbers)
        assert countdown.solvable(numbers, target, operators=operators)
        assert set(item.answer) <= set(operators + "()0123456789")
        assert item.think.endswith(f"={target};yes")


def test_countdown_shows_failed_attempts():
    thinks = [item.think for item in tasks.task("countdown", failed_attempts=2).generate(level=3, count=50)]
    assert {think.split(";").count("no") for think in thinks} == {0, 1, 2}
    none = tasks.task("countdown", failed_attempts=0).generate(level=3, count=50)
    assert not any("no" in item.think for item in none)


def test_composition_draws_only_the_functions_it_is_given():
    items = tasks.task("composition", functions="RSTUV").generate(level=3, count=50)
    used = Counter(character for item in items for character in item.body[2:] if character.isupper())
    assert set(used) == set("RSTUV")
    assert all(3 <= sum(c.islower() for c in item.body) <= 6 for item in items)


def test_sorting_scratch_takes_the_smallest_of_what_is_left():
    item = sorting.item([5, 3, 9], scratchpad=True)
    assert item.think == "min 3 from 5 3 9;min 5 from 5 9;min 9 from 9"
    rng = random.Random(0)
    numbers = [rng.randrange(4) for _ in range(8)]
    assert [int(step.split()[1]) for step in sorting.selections(numbers)] == sorted(numbers)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tasks.task("adition"), "did you mean 'addition'"),
        (lambda: tasks.task("items"), "there is no task 'items'"),
        (lambda: tasks.task("chain", modulo=7), "did you mean 'modulus'"),
        (lambda: tasks.task("chain", modulus=9), "modulus is 9"),
        (lambda: tasks.task("chain", modulus=True), "modulus is True"),
        (lambda: tasks.task("addition", scratchpad="yes"), "scratchpad is 'yes'"),
        (lambda: tasks.task("composition", functions="KX"), "functions is 'KX'"),
        (lambda: tasks.task("composition", functions="KK"), "distinct"),
        (lambda: tasks.task("countdown", operators=""), "operators is ''"),
        (lambda: tasks.task("countdown", largest_target=0), "at least 1"),
        (lambda: tasks.task("countdown", largest_number=2.5), "float"),
        (lambda: tasks.task("deduction", distractors=7), "between 0 and 6"),
        (lambda: tasks.task("deduction", domain="hard"), "'conjunctive'"),
        (lambda: tasks.task("sorting", operation="reverse", scratchpad=True), "has no scratch"),
        (lambda: tasks.task("addition").generate(level="2", count=1), "level is '2'"),
        (lambda: tasks.task("addition").generate(level=2, count=0), "count is 0"),
        (lambda: tasks.task("addition").generate(level=2, count=1, split="dev"), "split is 'dev'"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_chain_may_leave_its_scratch_empty_in_a_share_of_the_problems():
    def drawn(**options):
        return tasks.task("chain", **options).generate(level=6, count=200)

    mixed = drawn(direct_share=0.5)
    direct = [item for item in mixed if not item.think]
    assert 70 < len(direct) < 130
    assert {len(item.think) for item in mixed if item.think} == {35}
    assert all(item.think for item in drawn())
    assert not any(item.think for item in drawn(direct_share=1.0))
    assert not any(item.think for item in drawn(direct_share=0.5, scratchpad=False))
    with pytest.raises(ValueError, match=r"direct_share is 1.5; it must lie in \[0, 1\]"):
        tasks.task("chain", direct_share=1.5)


def test_a_chain_may_be_worked_out_twice_in_a_share_of_the_solutions():
    once, mixed = (tasks.task("chain", repeated_share=share).generate(level=3, count=200) for share in (0.0, 0.5))
    assert {len(item.think) for item in once} == {17}
    twice = [item for item in mixed if len(item.think) == 35]
    assert 70 < len(twice) < 130
    assert all(item.think[:17] == item.think[18:] for item in twice)
    assert {len(item.think) for item in mixed} == {17, 35}
    assert not any(
        item.think for item in tasks.task("chain", repeated_share=1.0, scratchpad=False).generate(level=3, count=9)
    )


def test_a_critic_is_asked_about_results_of_which_half_are_right():
    task = tasks.task("chain", attempts=0.5)
    items = task.generate(level=3, count=200)
    asked = [item for item in items if "?" in item.body]
    assert 0.35 < len(asked) / len(items) < 0.65
    assert 0.3 < sum(item.answer == "Y" for item in asked) / len(asked) < 0.7
    for item in asked:
        result = item.body.partition("?")[2]
        assert (task.columns({"body": item.body})["solution"] == result) == (item.answer == "Y")
        assert item.think.endswith("=" + task.columns({"body": item.body})["solution"])
    with pytest.raises(ValueError, match=r"attempts is 0.5 and claims is true, which exclude each other"):
        tasks.task("chain", attempts=0.5, claims=True)
