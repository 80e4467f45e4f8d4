"""Credit of steps: the worked example of each card, absent rows, completions without a border."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import advantages, rewards
from jaxrl_llm.advantages.process.step_credit import min_form_rewards
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.rewards.process.step_borders import steps_of

NAN = float("nan")
TOKENS_OF_STEPS = [[0, 0, 1, -1], [0, 1, 1, 1]]
COUNTED = [[1.0, 1, 1, 0], [1, 1, 1, 1]]
TWO = {"turn_rewards": [[0.5, -0.2], [0.4, 0.3]], "turn": TOKENS_OF_STEPS, "mask": COUNTED, "correct": [0.0, 1]}
ONE_A_TURN = [[0, 1, 2]]
# Three of four rows begin with 3, two of these go on with 4; the mean reward is 1/2.
TREE = {
    "tokens": [[3, 4, 5], [3, 4, 6], [3, 7, 5], [8, 4, 5]],
    "length": [3, 3, 3, 3],
    "rewards": [1.0, 0, 0, 1],
    "mask": [[1.0] * 3] * 4,
}
GLOBAL = [[-1 / 6, 0, 0.5], [-1 / 6, 0, -0.5], [-1 / 6, -0.5, -0.5], [0.5, 0.5, 0.5]]
LOCAL = [[-1 / 6, 1 / 6, 0.5], [-1 / 6, 1 / 6, -0.5], [-1 / 6, -1 / 3, -1 / 3], [0.5, 0.5, 0.5]]
THROUGH = [[3, 2, 1], [3, 2, 1], [3, 1, 1], [1, 1, 1]]

EXAMPLES = {
    "pure, strict": (
        advantages.min_form_returns,
        {"turn_rewards": [[0.5, -0.2, 0.8, 0.3]], "turn": [[0, 1, 2, 3]], "mask": [[1.0] * 4]},
        [[-0.2, -0.2, 0.3, 0.3]],
    ),
    "pure, token": (
        advantages.min_form_advantages,
        TWO,
        [[-1.444533, -1.444533, -1.281541, 0], [1.59271, 1.41868, 1.41868, 1.41868]],
    ),
    "pure, step": (
        partial(advantages.min_form_advantages, baseline="step"),
        TWO,
        [[-1.526256, -1.526256, -1.363265, 0], [1.526256, 1.318999, 1.318999, 1.318999]],
    ),
    "salt": (
        advantages.merged_transitions,
        {
            "advantages": [1.0, -1],
            "state_id": [[0, 1], [0, 1]],
            "action_id": [[7, 8], [7, 9]],
            "turn": [[0, 1], [0, 1]],
            "mask": [[1.0, 1], [1, 1]],
        },
        [[0, 1], [0, -1]],
    ),
    "thoughts": (
        advantages.judged_thoughts,
        {
            "correct": [1.0, 0],
            "turn_labels": [[1.0, 1, 0], [1, 0, 0]],
            "turn": [[0, 1, 2], [0, 1, 1]],
            "mask": [[1.0] * 3, [1, 1, 0]],
        },
        [[0.707106, 0.707106, 0.207106], [0, -0.707106, 0]],
    ),
    "vine": (
        advantages.step_value_gains,
        {
            "turn_labels": [[0.75, 0.25, 1.0], [0.5, NAN, 0.0]],
            "correct": [1.0, 0],
            "turn": ONE_A_TURN * 2,
            "mask": [[1.0] * 3] * 2,
        },
        [[0.25, -0.5, 0.75], [0, 0, -0.5]],
    ),
    "vine, pivotal": (
        partial(advantages.step_value_gains, least=0.5),
        {
            "turn_labels": [[0.75, 0.25, 1.0], [0.5, 0.5, 0.0]],
            "correct": [1.0, 0],
            "turn": ONE_A_TURN * 2,
            "mask": [[1.0] * 3] * 2,
        },
        [[0, -0.5, 0.75], [0, 0, -0.5]],
    ),
    "tree, global": (partial(advantages.tree_advantages, form="global"), TREE, GLOBAL),
    "tree, local": (partial(advantages.tree_advantages, form="local"), TREE, LOCAL),
    "tree": (advantages.tree_advantages, TREE, (np.array(GLOBAL) + LOCAL) / np.sqrt(THROUGH)),
    "igpo": (
        advantages.information_gain,
        {
            "turn_answer_logprobs": [[-2.0, -1.5, -0.5, -9], [-2, -2.5, -2.2, -1]],
            "rewards": [1.0, 0.2],
            "turn": ONE_A_TURN * 2,
            "mask": [[1.0, 1, 0], [1, 1, 1]],
        },
        [[1.648866, 0.707106, 0], [-1.648866, -0.599379, -0.707106]],
    ),
}


def given(function, data):
    """The data with an absent row behind it, which holds NaN, and room for one more turn and one more token."""
    made = {}
    for name, value in data.items():
        value = np.asarray(value)
        row = np.full((1, *value.shape[1:]), NAN) if value.dtype.kind == "f" else np.zeros_like(value[:1])
        made[name] = jnp.asarray(np.concatenate([value, row if name != "mask" else row * 0 + 1]))
    count = len(next(iter(data.values())))
    made["weight"] = jnp.array([1.0] * count + [0.0])
    target = function.func if isinstance(function, partial) else function
    if target not in (advantages.min_form_returns,):
        made["group"] = jnp.array([1] * count + [1], jnp.int32)
    return made


def test_worked_examples_in_one_program():
    data = {name: given(function, data) for name, (function, data, _) in EXAMPLES.items()}
    found = jax.jit(lambda data: {name: EXAMPLES[name][0](**one) for name, one in data.items()})(data)
    for name, (_, _, expected) in EXAMPLES.items():
        np.testing.assert_allclose(found[name][:-1], expected, rtol=2e-5, atol=2e-6, err_msg=name)
        assert not np.asarray(found[name][-1]).any(), name


def test_states_and_actions_are_known_by_their_tokens():
    """Move 7 is answered by 9 from the start, and from elsewhere, too: only with a history is the place another."""
    tokens, turn = jnp.array([[7, 9, 7, 9], [7, 9, 7, 9], [8, 9, 7, 9]]), jnp.array([[0, 0, 1, 1]] * 3)
    source, length = jnp.array([[1, 3, 1, 3]] * 3), jnp.array([4, 3, 4])
    state, action = rewards.transition_ids(tokens, turn, source, length, max_turns=3)
    np.testing.assert_array_equal(state[:, 0], 0)
    assert state[0, 1] == state[1, 1] == state[2, 1] != 0
    assert action[0, 0] == action[0, 1] == action[2, 1] != action[2, 0]
    assert state[0, 2] != state[1, 2] == 0  # the second row was not answered
    longer, _ = rewards.transition_ids(tokens, turn, source, length, max_turns=3, history=1)
    assert longer[0, 1] == longer[1, 1] != longer[2, 1]
    marks = rewards.turn_marks(tokens, turn, length, mark_ids=(9, 8), max_turns=3)
    np.testing.assert_array_equal(marks[1], [[1, 0], [0, 0], [0, 0]])
    np.testing.assert_array_equal(marks[2], [[1, 1], [1, 0], [0, 0]])


def test_rewards_in_the_min_form_add_up_to_about_the_least():
    taken = jnp.array([[True, True, True, False]])
    found = min_form_rewards(jnp.array([[0.5, -0.2, 0.8, 9.0]]), taken)
    np.testing.assert_allclose(found, [[0.000455505, -0.199809, 3.62852e-05, 0]], rtol=1e-4)


def test_steps_without_reward_change_nothing_where_they_are_split():
    whole = {
        "turn_rewards": [[0.5, 0.0, 0.0], [0.4, 0.0, 0.0]],
        "turn": [[0, 0, 1], [0, 1, 1]],
        "mask": [[1.0] * 3] * 2,
    }
    split = whole | {"turn": [[0, 0, 1], [0, 1, 2]]}
    function = advantages.min_form_returns
    np.testing.assert_array_equal(function(**given(function, whole)), function(**given(function, split)))


class Pieces:
    """A tokenizer whose tokens are pieces of text."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def token_bytes(self):
        return [piece.encode() if piece is not None else None for piece in self.pieces]


@pytest.mark.parametrize(
    ("border", "pieces", "expected"),
    [
        ("line", ["a", "\n", "b\nc", "d", None], [0, 0, 1, 2, 2]),
        ("blank_line", ["a\n", "\n", "b", "\n", "c"], [0, 0, 1, 1, 1]),
        ("sentence", ["It is 3.5", ". ", "Or", " not!", " é", "."], [0, 0, 1, 1, 2, 2]),
        ("closing_tag", ["<t>", "1+2", "</t>", "<a>3", "</a>"], [0, 0, 0, 1, 1]),
        ("tool_call", ["<call>1", "</call>", " 2 ", "so"], [0, 0, 1, 1]),
        ("thought_switch", ["So 3. ", "Wait", ", 4", " But 5"], [0, 1, 1, 1]),
        ("line", ["nothing", " here"], [0, 0]),
        ("line", [], []),
    ],
)
def test_borders_of_steps(border, pieces, expected):
    read = rewards.step_borders(tokenizer=Pieces(*pieces), border=border)
    ids = np.arange(len(pieces) + 1)[None] % max(len(pieces), 1)
    (found,) = read(completions=[""], tokens=ids, length=np.array([len(pieces)]))
    assert found.tolist() == expected


def test_borders_with_a_tokenizer_and_a_pattern_of_the_users():
    tokenizer = CharacterTokenizer()
    ids = np.array([tokenizer.encode("1+2=3+3=6")])
    read = rewards.step_borders(tokenizer=tokenizer, pattern="=")
    (found,) = read(completions=["1+2=3+3=6"], tokens=ids, length=np.array([ids.shape[1]]))
    assert found[-1] == 2
    assert (np.diff(found) >= 0).all()
    assert steps_of([b"x"], re.compile(b"x"), False).tolist() == [0]
    with pytest.raises(ValueError, match="which is not a valid regular expression"):
        rewards.step_borders(tokenizer=tokenizer, pattern="(")
    with pytest.raises(ValueError, match="border is 'word'; it must be one of line"):
        rewards.step_borders(tokenizer=tokenizer, border="word")
