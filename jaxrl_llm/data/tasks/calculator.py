"""Arithmetic with a tool, in turns: `T:37*48+15` -> `<c>37*48</c>` `<o>1776</o>` `<c>1776+15</c>` ... -> 1791."""

from __future__ import annotations

import re
from collections.abc import Mapping
from random import Random
from typing import Any, NamedTuple

from jaxrl_llm.data.tasks.items import Item, Segment, Task, equality, observed, require_int, require_share, tagged

ERROR = "ERR"
MOST_DIGITS, LARGEST_RESULT = 7, 10**9
# Calls allowed beyond the operations of an item, and the largest number of faults: each fault can be retried.
SPARE_CALLS = MOST_FAULTS = 2

_CALL = re.compile(rf"(-?[0-9]{{1,{MOST_DIGITS}}})([-+*])(-?[0-9]{{1,{MOST_DIGITS}}})")
_BODY = re.compile(r"T:([0-9]+)((?:[-+*][0-9]+)+)")


def result(call: str) -> str:
    """What the tool returns: the exact value of one operation on two integers, or `ERR`.

    >>> result("37*48"), result("12--5"), result("3+")
    ('1776', '17', 'ERR')
    """
    parts = _CALL.fullmatch(call)
    if parts is None:
        return ERROR
    left, operator, right = int(parts[1]), parts[2], int(parts[3])
    value = left + right if operator == "+" else left - right if operator == "-" else left * right
    return str(value) if abs(value) <= LARGEST_RESULT else ERROR


def fault(item_id: int, call: int, probability: float) -> bool:
    """Whether a fault is injected into a valid call; the same for every sample of an item.

    Args:
      item_id: number of the item.
      call: number of the call in its episode, from 0.
      probability: share of the calls.
    """
    return mixed(mixed(item_id + 1) + call) >> 8 < round(probability * 2**24)


def mixed(bits: int) -> int:
    """A hash of 32 bits (the finaliser of MurmurHash3)."""
    bits &= 0xFFFFFFFF
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return bits ^ (bits >> 16)


class Tool(NamedTuple):
    """The tool during one episode.

    Attributes:
      item_id: number of the item, from which its faults follow.
      fault_probability: share of valid calls that fail.
      calls: number of calls so far.
      faults: number of injected faults so far.
      failed: the last call, if an injected fault made it fail; else empty.
    """

    item_id: int = 0
    fault_probability: float = 0.0
    calls: int = 0
    faults: int = 0
    failed: str = ""


def called(tool: Tool, call: str) -> tuple[Tool, str]:
    """(the tool after a call, the result). A call that failed by an injected fault succeeds when it is repeated."""
    value = result(call)
    spared = value == ERROR or call == tool.failed or tool.faults == MOST_FAULTS
    if not spared and fault(tool.item_id, tool.calls, tool.fault_probability):
        return tool._replace(calls=tool.calls + 1, faults=tool.faults + 1, failed=call), ERROR
    return tool._replace(calls=tool.calls + 1, failed=""), value


def operations(body: str) -> tuple[int, list[tuple[str, int]]]:
    """Start value and (operator, operand) of a body.

    >>> operations("T:37*48+15")
    (37, [('*', 48), ('+', 15)])
    """
    parts = _BODY.fullmatch(body)
    if parts is None:
        raise ValueError(f"{body!r} is not a problem of the calculator; it must look like 'T:37*48+15'")
    return int(parts[1]), [(step[0], int(step[1:])) for step in re.findall(r"[-+*][0-9]+", parts[2])]


def item(body: str) -> Item | None:
    """The problem of a body, evaluated strictly from left to right; None if the tool refuses one of the steps."""
    start, steps = operations(body)
    value, written = str(start), []
    for operator, operand in steps:
        call = f"{value}{operator}{operand}"
        value = result(call)
        if value == ERROR or len(value.lstrip("-")) > MOST_DIGITS:
            return None
        written.append(f"{call}={value}")
    return Item(body, ";".join(written), value, "calculator", len(steps), f"calculator-{len(steps)}")


class Episode(NamedTuple):
    """The state of an episode: the item's record and its tool."""

    record: Mapping[str, Any]
    tool: Tool


def episode(record: Mapping[str, Any], *, fault_probability: float = 0.0) -> Episode:
    """The start of an episode."""
    return Episode(record, Tool(record["item_id"], fault_probability))


def turn(
    state: Episode, text: str, *, error_penalty: float = 0.0, spare_calls: int = SPARE_CALLS
) -> tuple[Episode, str, float, bool]:
    """(state, observation, reward, whether the episode is over) after a turn's text, its end included."""
    answer = tagged(text, "<a>", "</a>")
    if answer is not None:
        return state, "", float(answer.strip(" \n") == state.record["answer"]), True
    tool, returned = called(state.tool, tagged(text, "<c>", "</c>") or "")
    over = text.endswith("<eos>") or tool.calls > len(operations(state.record["body"])[1]) + spare_calls
    reward = -error_penalty if returned == ERROR else 0.0
    return state._replace(tool=tool), f"<o>{returned}</o>", reward, over


def task(*, fault_probability: float = 0.0, repeated: float = 0.0, spare_calls: int = SPARE_CALLS) -> Task:
    """`level` operations on integers of two and three digits, each done by a tool; at most level + `spare_calls` calls.

    Args:
      fault_probability: share of the valid calls that return ERR once, 0 to 1; at most two in an episode.
      repeated: probability with which a reference conversation repeats a call, while spare calls are left, so that a
        policy trained on it makes unnecessary calls; excludes faults, which need the spare calls.
      spare_calls: calls allowed beyond the operations of an item, at least 2.
    """
    require_share("fault_probability", fault_probability)
    require_share("repeated", repeated)
    require_int("spare_calls", spare_calls, low=SPARE_CALLS)
    if repeated and fault_probability:
        raise ValueError(
            f"repeated is {repeated} and fault_probability is {fault_probability}, but both use the {spare_calls} "
            "spare calls of an item; set one of them to 0"
        )

    def draw(rng: Random, level: int) -> Item | None:
        numbers = [rng.randint(10, 99) if rng.random() < 0.5 else rng.randint(100, 999) for _ in range(level + 1)]
        return item(f"T:{numbers[0]}" + "".join(f"{rng.choice('+-*')}{number}" for number in numbers[1:]))

    def segments(record: Mapping[str, Any]) -> tuple[Segment, ...]:
        """Every call with its result, repeated where a fault was injected, and the answer."""
        tool, parts = Tool(record["item_id"], fault_probability), []
        start, steps = operations(record["body"])
        value, rng, again = str(start), Random(record["body"]), 0
        for operator, operand in steps:
            call, returned = f"{value}{operator}{operand}", ERROR
            if result(call) == ERROR:
                raise ValueError(f"the tool refuses {call!r} of {record['body']!r}; remove the item")
            while returned == ERROR:
                tool, returned = called(tool, call)
                parts += [Segment(f"<c>{call}</c><n>"), observed(f"<o>{returned}</o>")]
            while again < spare_calls and rng.random() < repeated:
                again, parts = again + 1, parts + parts[-2:]
            value = returned
        return (*parts, Segment(f"<a>{value}</a><eos>"))

    # Options at their defaults are omitted: they are part of the random seed, and existing data must not change.
    further = ({"repeated": repeated} if repeated else {}) | (
        {"spare_calls": spare_calls} if spare_calls != SPARE_CALLS else {}
    )
    return Task(
        name="calculator",
        draw=draw,
        verify=equality,
        levels=(1, 2, 3),
        last_level=5,
        description="arithmetic with a calculator tool; the level is the number of operations",
        options={"fault_probability": fault_probability} | further,
        scratchpad=False,
        reward="episode_reward",
        segments=segments,
        environment=("calculator_tool", {"fault_probability": fault_probability, "spare_calls": spare_calls}),
    )
