"""Text worlds: games of commands as environments, on the small game that is shipped."""

from __future__ import annotations

import pickle

import pytest

from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.rollout import opened, text_worlds
from jaxrl_llm.rollout.host_environments import host_started, host_step
from jaxrl_llm.rollout.tasks.treasure_hunt import TreasureHunt, treasure_hunts
from jaxrl_llm.rollout.text_worlds import World, text_world, text_world_prompts, textworld_game

TOKENIZER = CharacterTokenizer()


class Batched(TreasureHunt):
    """The same with the interface of ALFWorld: batches of one, the score at the end alone, `won` in the infos."""

    def reset(self):
        text, infos = super().reset()
        return [text], {"won": [infos["won"]]}

    def step(self, commands):
        text, _, done, infos = super().step(commands)
        return [text], [0.0], [done], {"won": [infos["won"]]}


def items(count=3):
    return [
        {"body": line["prompt"], "answer": line["answer"]}
        for line in text_world_prompts(TreasureHunt, treasure_hunts(count))
    ]


def test_every_game_is_won_by_its_solution():
    for game in treasure_hunts(12, rooms=4):
        played = TreasureHunt(game)
        played.reset()
        *_, last = [played.step(command) for command in played.solution()]
        assert last[1:3] == (1.0, True)


@pytest.mark.parametrize(("make", "middle"), [(TreasureHunt, 0.5), (Batched, 0.0)])
def test_rewards_are_what_a_turn_adds_to_the_score(make, middle):
    environment = text_world(TOKENIZER, make=make, max_turns=8)
    (item,) = items(1)
    commands = TreasureHunt(item["answer"]).solution()
    with opened(environment) as call:
        states, rewards = host_started(environment, [item], call).states, []
        for command in commands:
            (made,) = host_step(environment, states, [f"<a>{command}</a><n>"], call)
            states, rewards = (made.state,), [*rewards, made.reward]
    assert made.done
    assert sum(rewards) == 1
    assert rewards[commands.index("take key")] == middle
    assert made.state == World(item["answer"], tuple(commands), 1.0)


def test_an_episode_is_its_state_alone():
    environment = text_world(TOKENIZER, make=TreasureHunt)
    state = environment.reset(items(1)[0])
    command = TreasureHunt(state.game).solution()[0]
    after = environment.step(state, command)
    text_worlds._UNDER_WAY.clear()  # as in another process
    assert environment.step(state, command) == after
    assert environment.step(state, "sing") == environment.step(state, "sing")
    again = pickle.loads(pickle.dumps(environment.step))(after[0], "go west")
    assert again == environment.step(after[0], "go west")
    assert len(text_worlds._UNDER_WAY) <= 256


def test_long_answers_end_with_their_last_words():
    environment = text_world(TOKENIZER, make=TreasureHunt, max_observation_tokens=8, observation_format="<o>{text}</o>")
    said = environment.step(environment.reset(items(1)[0]), "dance")[1]
    assert said == "<o>ppens.</o>"
    assert len(TOKENIZER.encode(said)) == 8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"end_of_turn": "go"}, "end_of_turn is 'go', which is 2 tokens"),
        ({"observation_format": "<o>"}, "write {text} where"),
        ({"max_observation_tokens": 2}, "observation_format alone takes 2"),
        ({"max_turns": 0}, "max_turns is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_is_said(changed, message):
    with pytest.raises(ValueError, match=message):
        text_world(TOKENIZER, make=TreasureHunt, **changed)


def test_games_and_data_that_cannot_be():
    with pytest.raises(ValueError, match="start with the same text"):
        text_world_prompts(TreasureHunt, ["3:3", "3:3"])
    with pytest.raises(ValueError, match="SEED:ROOMS with 2 to 6 rooms"):
        TreasureHunt("3:9")
    with pytest.raises(ValueError, match="has no 'game', which names its game"):
        text_world(TOKENIZER, make=TreasureHunt, game_column="game").reset({"body": "x", "answer": "1:3"})
    with pytest.raises(ValueError, match=r"textworld.*jaxrl_llm\[textworld\]"):
        textworld_game("game.z8")
