"""Mutations of well-formed inputs: values, names, nesting and bytes."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Case(NamedTuple):
    """One input: its name, and the function that accepts or refuses it."""

    name: str
    run: Callable[[], Any]


# fmt: off
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 1.5, -0.5, 1e-9, 1e308, float("inf"), float("-inf"), float("nan")),
    *(2**31, 2**63, 2**64, 10**30, -(10**30), 10**9, 10**12),
    *("", " ", "x", "1", "1e3", "nan", "²", "٣", "none", "auto", "a b"),
    *("module:function", "os:getcwd", "::", "../..", "/"),
    *("\x00", "\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace"), "é" * 50, "{body}", "{}", "{x!z}"),
    *("a" * 5000, "%s%n", "!!python/object:os.system", [], {}, [[]], [{}], [None], {"": None}, {"a": {"b": {"c": []}}}),
    *([1, 2, 3], ["a", "b"], [1e400], {"x": 1}, {"python": 3}, {"python": "os:getcwd"}, {"name": []}, [[1], [2]]),
    *([0] * 300, {str(i): i for i in range(300)}, {"temperature": "high"}, {"grpo": 3}, {"extends": "x"}),
)

TOKENS = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\t", b"\r", b"\n", b"\n\n", b"  ", b": ", b"- ", b"? ", b"# ",
    b"---\n", b"...\n",
    b"&a ", b"*a ", b"<<: *a\n", b"{", b"}", b"[", b"]", b'"', b"'", b"| \n", b"> \n", b"%YAML 1.3\n", b"!!binary ",
    b"@", b"`",
    b"!!python/object/apply:os.system [ls]", b"!!set ", b"!!int ", b"!!float ", b"!!timestamp ", b"!x ", b"1:2:3",
    b"2024-13-45",
    b"0x", b"1_000", b".inf", b".nan", b"9" * 5000, b"[" * 3000, b"{" * 3000, b"- " * 3000, b"a: " * 50,
    b"extends: 3\n",
    b"extends: [demo.yaml]\n", b"extends: ../x.yaml\n", b"\xe2\x80\xa8", b"\xc2\x85", b"\xed\xa0\x80", b"&a [*a]\n",
    b"x: &a [*a, *a]\n",
)
# fmt: on


def paths(tree: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of values in nested mappings and lists."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield (*here, key)
        yield from paths(value, (*here, key))


def strange(random_: random.Random, tree: Any) -> Any:
    """A value that is unlikely to fit, or one from elsewhere in the tree."""
    if random_.random() < 0.25 and (known := list(paths(tree))):
        return copy.deepcopy(at(tree, random_.choice(known)))
    if random_.random() < 0.03:
        return nested(random_.choice((30, 48, 60, 90)))
    return copy.deepcopy(random_.choice(VALUES))


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def mutated(random_: random.Random, tree: Any, names: tuple[str, ...] = ()) -> Any:
    """The tree with one to three changes of values, names or nesting."""
    tree = copy.deepcopy(tree)
    for _ in range(random_.choice((1, 1, 1, 2, 3))):
        known = list(paths(tree))
        if not known:
            return tree
        *above, key = random_.choice(known)
        holder = at(tree, tuple(above))
        change = random_.random()
        number = isinstance(holder[key], int | float) and not isinstance(holder[key], bool)
        if number and change < 0.4:
            holder[key] = random_.choice(
                (holder[key] + 1, holder[key] * 2, holder[key] // 2, holder[key] / 3, -holder[key])
            )
        elif change < 0.6:
            holder[key] = strange(random_, tree)
        elif change < 0.7:
            del holder[key]
        elif change < 0.8:
            holder[key] = random_.choice(
                ([holder[key]], {str(key): holder[key]}, {"name": holder[key]}, [holder[key]] * 2)
            )
        elif isinstance(holder, dict):
            value = holder.pop(key) if change < 0.9 else strange(random_, tree)
            written = (
                random_.choice(
                    (f"{key}x", str(key)[:-1], str(key).upper(), *names[:0], *random_.sample(names, min(3, len(names))))
                )
                or "x"
            )
            holder[written] = value
    return tree


def damaged(random_: random.Random, content: bytes) -> bytes:
    """The bytes with one to four cuts, insertions, swaps or copies."""
    for _ in range(random_.randint(1, 4)):
        place = random_.randrange(len(content) + 1)
        span = random_.choice((1, 1, 3, 20, 200))
        change = random_.randrange(6)
        if change == 0:
            content = content[:place] + content[place + span :]
        elif change == 1:
            content = content[:place] + random_.choice(TOKENS) + content[place:]
        elif change == 2:
            content = content[:place] + bytes([random_.randrange(256)]) + content[place + 1 :]
        elif change == 3:
            content = content[:place] + content[place : place + span] * 2 + content[place + span :]
        elif change == 4:
            content = content[: max(place, 1)]
        else:
            other = random_.randrange(len(content) + 1)
            content = content[:place] + content[other : other + span] + content[place:]
    return content
