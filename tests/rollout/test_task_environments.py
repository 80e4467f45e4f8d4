"""The environments of the tasks: examples of their cards, and agreement of the program with the Python reference."""

from __future__ import annotations

import functools
import random
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data import CharacterTokenizer, encode_prompts, tasks
from jaxrl_llm.data.tasks import bargaining, calculator, grid, self_correction
from jaxrl_llm.data.tasks.items import record
from jaxrl_llm.experience import Source
from jaxrl_llm.rollout import StopReason, Turns, advanced, episode_metrics, replayed, require_environment, started
from jaxrl_llm.rollout.tasks import calculator_environment as in_graph
from jaxrl_llm.rollout.tasks import calculator_tool, grid_navigation, task_environment

TOKENIZER = CharacterTokenizer()
KEY = jax.random.key(0)


def padded(texts, width):
    """(tokens [B, width], lengths) of texts."""
    rows = [TOKENIZER.encode(text) for text in texts]
    tokens = np.zeros((len(rows), width), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    return jnp.asarray(tokens), jnp.asarray([len(row) for row in rows], jnp.int32)


def prompts_of(items):
    return encode_prompts(items, TOKENIZER, max_prompt_tokens=64, max_answer_tokens=64)


@partial(jax.jit, static_argnums=0)
def taken(environment, episodes, tokens, length):
    return advanced(environment, episodes, tokens, length, eos_ids=(TOKENIZER.eos_id,))


@partial(jax.jit, static_argnums=0)
def begun(environment, prompts):
    return started(environment, prompts, KEY, 0, jnp.zeros(prompts.length.shape, jnp.int32))


def played(environment, items, turns):
    """Observations of each turn as text, one list per item, and the final episodes; `turns[row]` are texts."""
    count, rows = len(items), max(32, len(items))
    # A fixed number of rows, so that an environment is compiled once; padding rows never take a turn.
    filled = [*[record(item, number) for number, item in enumerate(items)]]
    filled += [record(items[0], number) for number in range(count, rows)]
    episodes = begun(environment, prompts_of(filled))
    seen = [[] for _ in items]
    for number in range(max(map(len, turns))):
        texts = [texts[number] if number < len(texts) else "" for texts in turns] + [""] * (rows - count)
        tokens, length = padded(texts, environment.max_turn_tokens)
        episodes, *answered = taken(environment, episodes, tokens, length)
        observation, size = jax.device_get(answered)
        for row in range(len(items)):
            if size[row]:
                seen[row].append(TOKENIZER.decode(observation[row, : size[row]]))
    return seen, jax.tree.map(lambda x: x[:count], episodes)


@functools.cache
def environment_of(name, **options):
    return task_environment(tasks.task(name, **options))


# ---- grid -----------------------------------------------------------------------------------------------------------

EXAMPLE = ["S.#", ".#.", "..G"]
GRID = environment_of("grid", size=3)


def move(letter):
    return f"<a>{letter}</a><n>"


def test_the_grids_example():
    item = grid.item(EXAMPLE)
    assert (item.body, item.level) == ("G:S.#/.#./..G<o>.#.#.</o>", 4)
    seen, episodes = played(GRID, [item, item], [[move(m) for m in moves] for moves in ("DDRR", "RD")])
    assert seen[0] == ["<o>...##</o>", "<o>..##.</o>", "<o>.##.G</o>"]
    assert seen[1] == ["<o>.##.#</o>", "<o>x##.#</o>"]
    assert episodes.turns.tolist() == [4, 2]
    assert episodes.turn_rewards[:, :5].tolist() == [[0, 0, 0, 1, 0], [0] * 5]
    assert episodes.stop.tolist() == [StopReason.ENVIRONMENT, StopReason.RUNNING]
    total, count = episode_metrics(GRID, episodes, jnp.ones(2))["optimality"]
    assert (float(total), float(count)) == (1.0, 1.0)
    state, last, reward, done = grid.turn(grid.episode(record(item, 0))._replace(place=grid.Place(2, 1)), move("R"))
    assert (last, reward, done, state.place) == ("<o>!.#.#</o>", 1.0, True, (2, 2))


def test_a_way_that_is_not_the_shortest_is_less_than_optimal():
    _, episodes = played(GRID, [grid.item(EXAMPLE)], [[move(m) for m in "RLDDRR"]])
    metrics = episode_metrics(GRID, episodes, jnp.ones(1))
    assert float(metrics["optimality"][0]) == pytest.approx(4 / 6)
    assert float(metrics["goal"][0]) == 1


def test_the_potential_pays_for_progress_and_adds_up_to_the_way():
    environment = grid_navigation(size=3, potential=True)
    _, episodes = played(environment, [grid.item(EXAMPLE)] * 2, [[move(m) for m in way] for way in ("DDRR", "DUR")])
    np.testing.assert_allclose(episodes.turn_rewards[0, :4], [0.25, 0.25, 0.25, 1.25])
    np.testing.assert_allclose(episodes.turn_rewards[1, :3], [0.25, -0.25, -0.25])


def test_the_horizon_and_the_end_of_sequence_stop_an_episode():
    item = grid.item(EXAMPLE)
    seen, episodes = played(GRID, [item] * 3, [[move("U")] * 12, ["<a>D</a><eos>"], ["<a>D"]])
    assert episodes.stop.tolist() == [StopReason.TURN_LIMIT, StopReason.ANSWER, StopReason.RUNNING]
    assert episodes.turns.tolist() == [12, 1, 1]
    assert [len(each) for each in seen] == [11, 0, 1]
    assert seen[2] == ["<o>x#.#.</o>"]


def random_grid_turn(rng):
    pieces = ["<a>", "</a>", "<n>", "<eos>", "U", "D", "L", "R", " ", "<pad>", "7"]
    if rng.random() < 0.7:
        return f"<a>{rng.choice('UDLR')}</a><n>"
    return "".join(rng.choice(pieces) for _ in range(rng.randint(1, 8)))


@pytest.mark.parametrize(
    ("size", "view"),
    [(3, "blind"), pytest.param(5, "full", marks=pytest.mark.slow), pytest.param(7, "blind", marks=pytest.mark.slow)],
)
def test_the_grid_in_the_program_is_the_grid_in_python(size, view):
    task = tasks.task("grid", size=size, view=view, wall_probability=0.3)
    items = [item for level in (1, 3) for item in task.generate(level=level, count=12)]
    rng = random.Random(size)
    turns = [[random_grid_turn(rng) for _ in range(14)] for _ in items]
    environment = environment_of("grid", size=size)
    agree(environment, items, turns, grid.episode, grid.turn)


def agree(environment, items, turns, reset, turn):
    """Both forms of an environment give the same results for the same turns."""
    records = [record(item, number) for number, item in enumerate(items)]
    seen, episodes = played(environment, items, turns)
    for row, texts in enumerate(turns):
        state, done, observations, rewards = reset(records[row]), False, [], []
        for text in texts[: environment.max_turns]:
            if done:
                break
            state, observation, reward, done = turn(state, text)
            observations += [observation]
            rewards += [reward]
        stopped = done or len(rewards) == environment.max_turns
        assert seen[row] == (observations[:-1] if stopped else observations), texts
        assert int(episodes.turns[row]) == len(rewards)
        np.testing.assert_allclose(episodes.turn_rewards[row, : len(rewards)], rewards, rtol=1e-6)
        assert (int(episodes.stop[row]) != StopReason.RUNNING) == stopped


# ---- calculator -----------------------------------------------------------------------------------------------------

TOOL = environment_of("calculator")
ITEM = calculator.item("T:37*48+15")


def test_the_calculators_example():
    assert (ITEM.think, ITEM.answer, ITEM.level) == ("37*48=1776;1776+15=1791", "1791", 2)
    turns = ["<c>37*48</c><n>", "<c>1776+15</c><n>", "<a>1791</a><eos>"]
    seen, episodes = played(TOOL, [ITEM], [turns])
    assert seen == [["<o>1776</o>", "<o>1791</o>"]]
    assert episodes.turn_rewards[0, :3].tolist() == [0, 0, 1]
    assert episodes.stop.tolist() == [StopReason.ANSWER]
    assert tasks.task("calculator").response(ITEM) == "".join(
        part for pair in zip(turns, [*seen[0], ""], strict=True) for part in pair
    )


CALLS = [
    ("12--5", "17"),
    ("3+", "ERR"),
    ("", "ERR"),
    ("-", "ERR"),
    ("--1-1", "ERR"),
    ("1-+1", "ERR"),
    ("1+2+3", "ERR"),
    ("1 + 2", "ERR"),
    ("1/2", "ERR"),
    ("5-5", "0"),
    ("-0*3", "0"),
    ("007+1", "8"),
    ("-5--5", "0"),
    ("9999999+9999999", "19999998"),
    ("-9999999-9999999", "-19999998"),
    ("99999999+1", "ERR"),
    ("1+99999999", "ERR"),
    ("100000*10000", "1000000000"),
    ("-100000*10000", "-1000000000"),
    ("99999*10001", "ERR"),
    ("31623*31623", "ERR"),
    ("31622*31622", "999950884"),
    ("65536*65536", "ERR"),
    ("9999999*9999999", "ERR"),
    ("-9999999*-9999999", "ERR"),
    ("9999999*0", "0"),
    ("0*9999999", "0"),
    ("x+1", "ERR"),
    ("-1234567*-12", "14814804"),
    ("1234567+12345678901234567890", "ERR"),
]


def one_call(text):
    return f"<c>{text}</c><n>"


def test_calls_and_what_they_return():
    seen, _ = played(TOOL, [ITEM] * len(CALLS), [[one_call(call)] for call, _ in CALLS])
    for (call, wanted), found in zip(CALLS, seen, strict=True):
        assert found == [f"<o>{wanted}</o>"], call
        assert calculator.result(call) == wanted


def test_every_product_is_exact_or_refused():
    rng = np.random.default_rng(0)
    size = 10.0 ** rng.uniform(0, 7, (2000, 2))
    pairs = np.minimum(size, 9_999_999).astype(int) * rng.choice([-1, 1], (2000, 2))
    texts = [f"{a}*{b}" for a, b in pairs]
    tokens, length = padded(texts, in_graph.CALL_TOKENS)
    tokens = jnp.where(jnp.arange(in_graph.CALL_TOKENS) < length[:, None], tokens, -1)
    fine, value = jax.jit(jax.vmap(in_graph.result))(tokens, length)
    exact = [int(a) * int(b) for a, b in pairs]
    assert fine.tolist() == [abs(product) <= 10**9 for product in exact]
    assert 0.2 < float(fine.mean()) < 0.9
    assert value.tolist() == [product if abs(product) <= 10**9 else 0 for product in exact]


def random_tool_turn(rng):
    if rng.random() < 0.1:
        return f"<a>{rng.choice(['1791', '0', ''])}</a>{rng.choice(['<n>', '<eos>'])}"
    if rng.random() < 0.3:
        pieces = ["<c>", "</c>", "<a>", "</a>", "<eos>", "1", "2", "-", "+", "*", "1791"]
        return "".join(rng.choice(pieces) for _ in range(rng.randint(1, 8))) + "<n>"
    number = lambda: rng.choice(["", "-"]) + str(rng.randrange(10 ** rng.randint(1, 8)))  # noqa: E731
    return one_call(number() + rng.choice("+-*/") + number())


@pytest.mark.parametrize(
    "probability", [pytest.param(0.0, marks=pytest.mark.slow), 0.5, pytest.param(1.0, marks=pytest.mark.slow)]
)
def test_the_calculator_in_the_program_is_the_calculator_in_python(probability):
    task = tasks.task("calculator", fault_probability=probability)
    items = [item for level in (1, 2, 3) for item in task.generate(level=level, count=10)]
    rng = random.Random(1)
    turns = [[random_tool_turn(rng) for _ in range(6)] for _ in items]
    # Repeated calls test the memory of faults.
    turns[::2] = [[text for text in texts[:3] for _ in range(2)] for texts in turns[::2]]
    environment = task_environment(task, error_penalty=0.05)
    reset = partial(calculator.episode, fault_probability=probability)
    agree(environment, items, turns, reset, partial(calculator.turn, error_penalty=0.05))


def test_faults_are_addressed_by_item_and_call_and_are_served_when_repeated():
    tool = calculator_tool(fault_probability=1.0)
    seen, episodes = played(tool, [ITEM], [[one_call("37*48")] * 4])
    assert episodes.turn_rewards.tolist() == [[0] * 6]
    assert seen == [["<o>ERR</o>", "<o>1776</o>", "<o>ERR</o>", "<o>1776</o>"]]
    assert float(episode_metrics(tool, episodes, jnp.ones(1))["tool_faults_per_episode"][0]) == 2
    share = np.mean([calculator.fault(item, call, 0.3) for item in range(500) for call in range(4)])
    assert abs(share - 0.3) < 0.05
    bits = jax.vmap(in_graph.fault_bits)(jnp.arange(50), jnp.arange(50) % 5)
    assert bits.tolist() == [calculator.mixed(calculator.mixed(i + 1) + i % 5) for i in range(50)]


def test_calls_beyond_those_granted_end_the_episode():
    item = calculator.item("T:10+10")
    seen, episodes = played(TOOL, [item], [[one_call("1+1")] * 6])
    assert [len(each) for each in seen] == [3]
    assert episodes.turns.tolist() == [4]
    assert episodes.stop.tolist() == [StopReason.ENVIRONMENT]


# ---- two attempts ---------------------------------------------------------------------------------------------------


def test_the_request_to_revise_is_the_same_whatever_the_answer():
    item = tasks.addition.item(47, 85, level=2)
    turns = [
        ["<a>132</a><n>", "<a>132</a><eos>"],
        ["<a>133</a><n>", "<a>132</a><eos>"],
        ["<a>132</a><eos>", "<a>1</a><n>"],
        ["132", "nothing<eos>"],
    ]
    environment = environment_of("self_correction")
    seen, episodes = played(environment, [item] * 4, turns)
    assert seen == [["<r>\n"]] * 4
    assert episodes.turn_rewards.tolist() == [[1, 1], [0, 1], [1, 0], [0, 0]]
    found = {name: float(s / n) for name, (s, n) in episode_metrics(environment, episodes, jnp.ones(4)).items()}
    wanted = {"first_right": 0.5, "second_right": 0.5, "delta": 0.0, "wrong_to_right": 0.25, "right_to_wrong": 0.25}
    assert {name: found[name] for name in wanted} == wanted
    agree(environment, [item] * 4, turns, self_correction.episode, self_correction.turn)


# ---- bargaining -----------------------------------------------------------------------------------------------------

BARGAINING = task_environment(tasks.task("bargaining"), counter_duration=4.0)


def says(text):
    return f"<a>{text}</a><n>"


def test_a_bargain_by_hand():
    item = bargaining.item((2, 1), (4, 2), (1, 3))  # the pool's value is 10 for the policy, 5 for the partner
    assert (item.body, item.answer) == ("D:21/42", "21/42/13")
    # It demands 4 of 5, then 3.5, then 3: one of each kind is nearest to nothing; finally the second kind is enough.
    turns = [
        [says("21"), says("20"), says("20")],
        [says("21"), says(" y ")],
        [says("y")],
        [says("31"), says("7")],
        ["<a>20</a><eos>"],
    ]
    seen, episodes = played(BARGAINING, [item] * 5, turns)
    assert seen == [["<o>10</o>", "<o>10</o>"], ["<o>10</o>"], [], ["<o>00</o>", "<o>00</o>"], []]
    np.testing.assert_allclose(
        episodes.turn_rewards[:, :3], [[0, 0, 0.8], [0, 0.4, 0], [0] * 3, [0] * 3, [0] * 3], atol=1e-6
    )
    assert episodes.stop.tolist() == [StopReason.ENVIRONMENT] * 3 + [StopReason.RUNNING, StopReason.ANSWER]
    # The partner makes a counter-offer only here.
    assert episodes.durations[:, :3].tolist() == [[5, 5, 1], [5, 1, 0], [1, 0, 0], [1, 1, 0], [5, 0, 0]]


def random_bargaining_turn(rng):
    pieces = ["<a>", "</a>", "<n>", "<eos>", "y", "0", "1", "2", "3", " ", "7"]
    if rng.random() < 0.8:
        return says(rng.choice(["y", *("".join(rng.choice("0012") for _ in range(n)) for n in (2, 3, 3, 4))]))
    return "".join(rng.choice(pieces) for _ in range(rng.randint(1, 8)))


@pytest.mark.parametrize("progress", [pytest.param(False, marks=pytest.mark.slow), True])
def test_bargaining_in_the_program_is_bargaining_in_python(progress):
    task = tasks.task("bargaining")
    items = [item for level in (2, 3) for item in task.generate(level=level, count=14)]
    items += task.generate(level=4, count=4, split="extrapolation")
    rng = random.Random(5)
    turns = [[random_bargaining_turn(rng) for _ in range(4)] for _ in items]
    environment = task_environment(task, progress=progress)
    agree(environment, items, turns, bargaining.episode, partial(bargaining.turn, progress=progress))


def test_progress_adds_up_to_the_deal_and_reference_conversations_are_answered_as_they_say():
    task = tasks.task("bargaining")
    items = [item for level in (2, 3) for item in task.generate(level=level, count=8)]
    said = [task.segments(record(item, 0)) for item in items]
    turns = [[s.text for s in parts if s.source != Source.OBSERVATION] for parts in said]
    found = [played(task_environment(task, progress=progress), items, turns) for progress in (False, True)]
    (seen, plain), (_, paid) = found
    assert seen == [[s.text for s in parts if s.source == Source.OBSERVATION] for parts in said]
    np.testing.assert_allclose(plain.turn_rewards.sum(1), paid.turn_rewards.sum(1), atol=1e-6)
    metrics = {name: float(a) / float(b) for name, (a, b) in episode_metrics(BARGAINING, plain, jnp.ones(16)).items()}
    assert metrics["deal"] == 1
    assert metrics["own_share"] > 0.3 < metrics["partner_share"]
    assert set(plain.stop.tolist()) == {StopReason.ENVIRONMENT}


# ---- all tasks ------------------------------------------------------------------------------------------------------

TASKS = [
    ("grid", {}, 5),
    ("grid", {"size": 3, "view": "blind"}, 2),
    ("calculator", {}, 3),
    ("calculator", {"fault_probability": 0.4}, 2),
    ("calculator", {"repeated": 0.5}, 1),
    ("self_correction", {}, 3),
    ("self_correction", {"problem": "chain"}, 2),
]


@pytest.mark.parametrize(("name", "options", "level"), TASKS)
def test_reference_conversations_are_what_the_environment_says_and_earn_everything(name, options, level):
    task = tasks.task(name, **options)
    items = task.generate(level=level, count=16)
    environment = environment_of(name, **options)
    require_environment(environment, prompts_of(items), vocabulary_size=TOKENIZER.vocabulary_size)
    conversations = [task.segments(record(item, number)) for number, item in enumerate(items)]
    turns = [[s.text for s in said if s.source != Source.OBSERVATION] for said in conversations]
    seen, episodes = played(environment, items, turns)
    assert seen == [[s.text for s in said if s.source == Source.OBSERVATION] for said in conversations]
    last = np.take_along_axis(np.asarray(episodes.turn_rewards), np.asarray(episodes.turns)[:, None] - 1, axis=1)
    assert last.tolist() == [[1.0]] * 16
    assert set(episodes.stop.tolist()) <= {StopReason.ANSWER, StopReason.ENVIRONMENT}


@pytest.mark.parametrize(
    ("name", "options", "level"),
    [TASKS[0], *(pytest.param(*task, marks=pytest.mark.slow) for task in (TASKS[3], TASKS[5], ("bargaining", {}, 2)))],
)
def test_replay_to_a_turn_is_exact(name, options, level):
    task = tasks.task(name, **options)
    items = task.generate(level=level, count=6)
    environment = environment_of(name, **options)
    rng = random.Random(2)
    wild = {
        "bargaining": random_bargaining_turn,
        "grid": random_grid_turn,
        "calculator": random_tool_turn,
        "self_correction": lambda rng: "<a>1</a><n>",
    }
    texts = [[wild[name](rng) for _ in range(environment.max_turns)] for _ in items]
    columns = [padded([row[turn] for row in texts], environment.max_turn_tokens) for turn in range(len(texts[0]))]
    turns = Turns(*(jnp.stack(parts, axis=1) for parts in zip(*columns, strict=True)))
    start = begun(environment, prompts_of(items))
    again = jax.jit(partial(replayed, environment, eos_ids=(TOKENIZER.eos_id,)))
    episodes, before = start, [start]
    for tokens, length in columns:
        episodes, _, _ = taken(environment, episodes, tokens, length)
        before.append(episodes)
    for upto in (0, 1, len(columns)):
        same(again(start, turns, jnp.full(6, upto)), before[upto])
    ragged = again(start, turns, jnp.asarray([0, 1, 2, 0, 1, 2]))
    for row in range(6):
        one = jax.tree.map(lambda x, row=row: x[row], (ragged.state, ragged.turns, ragged.turn_rewards))
        there = before[row % 3]
        same(one, jax.tree.map(lambda x, row=row: x[row], (there.state, there.turns, there.turn_rewards)))


def same(left, right):
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(data(x), data(y)), left, right)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: task_environment(tasks.task("addition")), "has no environment"),
        (lambda: task_environment(tasks.task("grid"), size=4), "'size' .* is an option of the task"),
        (lambda: task_environment(tasks.task("grid"), dense=True), "'dense' .* is unknown; it takes potential"),
        (lambda: calculator_tool(fault_probability=1.5), "fault_probability is 1.5"),
        (lambda: calculator_tool(error_penalty=-1), "error_penalty is -1"),
        (lambda: grid_navigation(size=1), "size is 1"),
        (
            lambda: require_environment(grid_navigation(size=9), prompts_of([grid.item(EXAMPLE)])),
            "room for 64 tokens, but a grid of 9 rows has 89",
        ),
    ],
)
def test_bad_input_is_refused_with_a_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()
