"""Text worlds: games that are played by typing commands, as TextWorld, ALFWorld and Jericho have them, as environments.

Such a game is an object that changes when it is played: `reset() -> observation or (observation, infos)` and
`step(command) -> (observation, score, done[, infos])`. ALFWorld plays batches; of one with a single game, lists of one
are understood. The state of an episode here is the name of its game and the commands so far, so it can be sent to
another process and taken again; a game under way is kept at hand and played again from its start where it is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from jaxrl_llm.data.extras import imported
from jaxrl_llm.ranges import Count, Positive, ranged
from jaxrl_llm.rollout.host_environments import HostEnvironment

Make = Callable[[str], Any]
# Running games of this process, by (game, commands); the oldest are removed first.
_UNDER_WAY: dict[tuple[str, tuple[str, ...]], Any] = {}
_AT_HAND = 256


class World(NamedTuple):
    """An episode of a text world.

    Attributes:
      game: argument of `make`.
      commands: that were typed.
      score: so far.
    """

    game: str
    commands: tuple[str, ...] = ()
    score: float = 0.0


@ranged
def text_world(
    tokenizer: Any,
    *,
    make: Make,
    max_turns: Count = 20,
    max_turn_tokens: Count = 24,
    max_observation_tokens: Count = 128,
    most_score: Positive = 1.0,
    end_of_turn: str = "<n>",
    observation_format: str = "<o>{text}</o>",
    game_column: str = "answer",
) -> HostEnvironment:
    """Games as an environment of conversations: a turn is a command, the observation is the game's text.

    The reward of a turn is how much it adds to the score, as a share of `most_score`; a game whose `infos` say `won`
    has a score of `most_score` then. The content of tags in a turn (`<a>`, `<n>`) is not part of the command.

    Args:
      tokenizer: of the policy.
      make: name of a game -> the game; a function of a module, so that processes can call it.
      max_turns: commands of an episode at most.
      max_turn_tokens: tokens of a command at most, its end included.
      max_observation_tokens: tokens of an answer at most; a longer one ends with its last words.
      most_score: score of a game that is won.
      end_of_turn: what ends a command, one token; end of sequence does, too.
      observation_format: what the policy reads, with `{text}` where the game's text goes.
      game_column: column of the data with the name of the game.

    Returns:
      The environment. Data for it: `text_world_prompts`.

    Raises:
      ValueError: for an end of turn that is not one token, or a format without a place for the text.
    """
    ending = list(tokenizer.encode(end_of_turn))
    if len(ending) != 1:
        raise ValueError(
            f"end_of_turn is {end_of_turn!r}, which is {len(ending)} tokens; name a text that is one token"
        )
    if "{text}" not in observation_format:
        raise ValueError(f"observation_format is {observation_format!r}; write {{text}} where the game's text goes")
    around = len(tokenizer.encode(observation_format.replace("{text}", "")))
    if around >= max_observation_tokens:
        raise ValueError(
            f"max_observation_tokens is {max_observation_tokens}, but observation_format alone takes {around}; raise it"
        )
    shown = partial(_fitted, tokenizer, max_observation_tokens - around, observation_format)
    return HostEnvironment(
        partial(_started, game_column),
        partial(_stepped, make, shown, float(most_score)),
        max_turns=max_turns,
        max_turn_tokens=max_turn_tokens,
        max_observation_tokens=max_observation_tokens,
        end_of_turn_ids=(*ending, *tokenizer.eos_ids),
    )


def text_world_prompts(make: Make, games: Sequence[str]) -> list[dict[str, str]]:
    """Lines of a JSONL file: the first text of each game as the prompt, and its name as the answer.

    Raises:
      ValueError: for two games with the same first text, which splits could not distinguish.
    """
    lines = [{"prompt": _plain(make(game).reset()), "answer": game} for game in games]
    seen: dict[str, str] = {}
    for line in lines:
        if line["prompt"] in seen:
            raise ValueError(
                f"games {seen[line['prompt']]!r} and {line['answer']!r} start with the same text; leave one out"
            )
        seen[line["prompt"]] = line["answer"]
    return lines


def textworld_game(game: str) -> Any:
    """A game file of TextWorld or Jericho (.z8, .ulx, .json), for `make`. Needs the extra `textworld`.

    Raises:
      ValueError: if textworld is not installed.
    """
    gym = imported("textworld.gym", "textworld")
    infos = imported("textworld", "textworld").EnvInfos(won=True)
    return gym.make(gym.register_game(game, request_infos=infos))


def _started(column: str, item: Mapping[str, Any]) -> World:
    found = item.get(column) or item.get("raw", {}).get(column)
    if not found:
        raise ValueError(f"the record has no {column!r}, which names its game; set game_column")
    return World(str(found))


def _stepped(
    make: Make, shown: Callable[[str], str], most_score: float, state: World, turn: str
) -> tuple[World, str, float, bool]:
    command = " ".join(re.sub(r"<[^<>]*>", " ", turn).split())
    world = _UNDER_WAY.pop((state.game, state.commands), None) or _played_again(make, state)
    observation, score, done, infos = _answered(world.step(command))
    if infos.get("won"):
        score = most_score
    after = World(state.game, (*state.commands, command), score)
    if not done:
        _UNDER_WAY[after.game, after.commands] = world
        while len(_UNDER_WAY) > _AT_HAND:
            _UNDER_WAY.pop(next(iter(_UNDER_WAY)), None)
    return after, "" if done else shown(observation), (score - state.score) / most_score, done


def _played_again(make: Make, state: World) -> Any:
    """A separate game in its state after these commands."""
    world = make(state.game)
    world.reset()
    for command in state.commands:
        world.step(command)
    return world


def _answered(returned: Any) -> tuple[str, float, bool, Mapping[str, Any]]:
    """(text, score, whether it is over, infos) of one game, or of a batch of one."""
    observation, score, done, *more = returned
    infos = {name: _one(value) for name, value in dict(more[0] if more else {}).items()}
    return _plain(observation), float(_one(score) or 0.0), bool(_one(done)), infos


def _plain(returned: Any) -> str:
    text = returned[0] if isinstance(returned, (tuple, list)) else returned
    return " ".join(str(_one(text)).split())


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value


def _fitted(tokenizer: Any, room: int, form: str, text: str) -> str:
    ids = list(tokenizer.encode(text))
    return form.replace("{text}", text if len(ids) <= room else tokenizer.decode(ids[-room:]))
