"""A small text game: rooms in a row, with a key in one of them and a chest in another."""

from __future__ import annotations

import random

ROOMS = ("cellar", "hall", "kitchen", "garden", "attic", "study")
COMMANDS = ("go east", "go west", "take key", "open chest")


class TreasureHunt:
    """A game with the interface of TextWorld: `reset` and `step`. The score is 0.5 with the key, 1 with the open chest.

    The name of a game is its seed and number of rooms: "12:4" has the seed 12 and four rooms.

    >>> game = TreasureHunt("3:3")
    >>> game.reset()[0]
    'study, room 3 of 3. the chest is in room 3. the key is in room 2.'
    >>> [game.step(command)[:3] for command in ("go west", "take key")]
    [('attic.', 0.0, False), ('you have the key.', 0.5, False)]
    >>> [game.step(command)[:3] for command in ("go east", "open chest")]
    [('study.', 0.5, False), ('the chest is open.', 1.0, True)]
    """

    def __init__(self, game: str):
        seed, _, size = game.partition(":")
        if not (seed.isdigit() and size.isdigit() and 2 <= int(size) <= len(ROOMS)):
            raise ValueError(f"{game!r} is not a treasure hunt; a name is SEED:ROOMS with 2 to {len(ROOMS)} rooms")
        rng = random.Random(int(seed))
        self.rooms = rng.sample(ROOMS, int(size))
        self.key, self.chest = rng.sample(range(len(self.rooms)), 2)
        self.first = rng.randrange(len(self.rooms))

    def reset(self) -> tuple[str, dict[str, bool]]:
        """(first observation, infos)."""
        self.here, self.score = self.first, 0.0
        count = len(self.rooms)
        told = f"the chest is in room {self.chest + 1}. the key is in room {self.key + 1}."
        return f"{self.rooms[self.here]}, room {self.here + 1} of {count}. {told}", {"won": False}

    def step(self, command: str) -> tuple[str, float, bool, dict[str, bool]]:
        """(observation, score so far, whether it is over, infos)."""
        text = "nothing happens."
        move = {"go east": 1, "go west": -1}.get(command, 0)
        if move and 0 <= self.here + move < len(self.rooms):
            self.here += move
            text = f"{self.rooms[self.here]}."
        elif command == "take key" and self.here == self.key and self.score == 0:
            self.score, text = 0.5, "you have the key."
        elif command == "open chest" and self.here == self.chest and self.score > 0:
            self.score, text = 1.0, "the chest is open."
        return text, self.score, self.score == 1.0, {"won": self.score == 1.0}

    def solution(self) -> list[str]:
        """The shortest list of commands that opens the chest."""
        walk = lambda start, end: [COMMANDS[0] if end > start else COMMANDS[1]] * abs(end - start)  # noqa: E731
        return [*walk(self.first, self.key), COMMANDS[2], *walk(self.key, self.chest), COMMANDS[3]]


def treasure_hunts(count: int, *, rooms: int = 3, first_seed: int = 0) -> list[str]:
    """Names of games that start with different texts, at most `count`."""
    found: dict[str, str] = {}
    for seed in range(first_seed, first_seed + 50 * count):
        if len(found) == count:
            break
        found.setdefault(TreasureHunt(f"{seed}:{rooms}").reset()[0], f"{seed}:{rooms}")
    return list(found.values())
