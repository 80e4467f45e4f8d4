"""Processes that agree on a step to stop at, with threads in their place."""

from __future__ import annotations

import random
import socket
import threading
import time

import pytest

from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.peers import Link, Peers, Place, ProcessLost


def connected(count: int) -> list[Peers]:
    pairs = [socket.socketpair() for _ in range(count - 1)]
    inner = [Link(pair[0], number, "here") for number, pair in enumerate(pairs, start=1)]
    outer = [Link(pair[1], 0, "here") for pair in pairs]
    return [
        Peers(Place("x:1", count, 0), inner, {}),
        *(Peers(Place("x:1", count, number), [link], {}) for number, link in enumerate(outer, start=1)),
    ]


def leave(peers: list[Peers]) -> None:
    for one in reversed(peers):
        one.leave()


@pytest.mark.parametrize("seed", range(12))
def test_all_stop_at_the_same_step_whoever_asks_and_whoever_is_ahead(seed):
    draw = random.Random(seed)
    count, steps = draw.choice([2, 3, 5]), 60
    peers, stops = connected(count), [None] * count
    barrier = threading.Barrier(count)
    askers = {draw.randrange(count): draw.randrange(30) for _ in range(draw.choice([1, 2]))}
    # With a barrier in the step a process that waited in its check for one behind it would wait for ever.
    together = draw.random() < 0.5

    def work(number: int) -> None:
        pause = random.Random(100 * seed + number)
        for step in range(steps):
            if together:
                barrier.wait(20)
            time.sleep(pause.random() * 0.003)
            if peers[number].agreed_stop(step >= askers.get(number, steps), seconds=20):
                stops[number] = step
                return

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
        assert not thread.is_alive()
    leave(peers)
    assert None not in stops
    assert len(set(stops)) == 1
    assert stops[0] >= min(askers.values())


def test_a_stop_that_nobody_asks_for_does_not_come():
    peers = connected(2)
    assert not any(one.agreed_stop(False) for one in peers for _ in range(5))
    leave(peers)


def test_no_agreement_in_time_is_an_error():
    here, there = socket.socketpair()
    alone = Peers(Place("x:1", 2, 0), [Link(here, 1, "silent")], {})  # nobody reads at the other end
    with pytest.raises(ProcessLost, match=r"did not agree within 0.2 s"):
        alone.agreed_stop(True, seconds=0.2)
    alone.leave()
    there.close()


def test_one_process_alone_stops_when_it_wants_to():
    assert hosts.peers() is None
    assert hosts.agreed_stop(True)
    assert not hosts.agreed_stop(False)
