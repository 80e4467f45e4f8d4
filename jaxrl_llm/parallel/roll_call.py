"""A roll call before a run starts: checks that all processes are connected and have the same versions and config.

Process 0 listens on the port that jax's coordinator will use afterwards; the others connect and send their number,
versions and config. All wait for a bounded time, no process starts unless all may, and the connections stay open
(`peers`). jax's own start compares no versions, does not name missing processes, and aborts on a timeout.
"""

from __future__ import annotations

import socket
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrl_llm.parallel.peers import SILENCE, Link, Peers, Place, ProcessLost

_GREETING = "jaxrl roll call"


class Disagreement(ValueError):
    """The processes of a run have different versions or configs."""


def call_roll(
    place: Place,
    facts: Mapping[str, str],
    *,
    seconds: float,
    decide: Callable[[], Mapping[str, Any]] = dict,
) -> Peers:
    """Wait until all processes are connected, and check that they agree.

    Args:
      place: of this process.
      facts: values that must be equal on all processes: versions, the config.
      seconds: how long to wait for the others.
      decide: called on process 0 when all are connected; its result is `decided` on every process.

    Raises:
      Disagreement: on every process, naming the differing processes and values.
      ProcessLost: if some processes do not connect in time, or process 0 does not answer.
    """
    hello = {
        "greeting": _GREETING,
        "process": place.process,
        "host": socket.gethostname(),
        "facts": {"number of processes": str(place.processes), **facts},
    }
    until = time.monotonic() + seconds
    return _gather(place, hello, until, seconds, decide) if place.process == 0 else _join(place, hello, until, seconds)


def _gather(place: Place, hello: Mapping[str, Any], until: float, seconds: float, decide: Callable) -> Peers:
    port = int(place.coordinator.rpartition(":")[2])
    links: dict[int, Link] = {}
    came: list[Link] = []
    trouble = ""
    dual = socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=1024
        )
    except OSError as error:
        raise ProcessLost(
            f"process 0 cannot listen on port {port} ({error}); another run may hold it: end that one, or choose "
            "another port (JAX_COORDINATOR_PORT, or --coordinator HOST:PORT)"
        ) from None
    with listener:
        while not trouble and time.monotonic() < until:
            # A process that connected and ended does not count: it may be restarted.
            links = {number: link for number, link in links.items() if not link.closed}
            if len(links) == place.processes - 1:
                break
            listener.settimeout(min(1.0, max(0.01, until - time.monotonic())))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            link = _greeted(connection)
            if link is None:
                continue
            came.append(link)
            there = links.get(link.process)
            if not 0 < link.process < place.processes:
                trouble = (
                    f"process {link.process} on {link.host} came, but process 0 was started as one of "
                    f"{place.processes}, which are numbered from 0 to {place.processes - 1}"
                )
            elif there is not None and not there.closed:
                trouble = (
                    f"two processes, on {there.host} and {link.host}, both say that they are number {link.process}"
                )
            links[link.process] = link
            if link.said["facts"]["number of processes"] != str(place.processes):
                break  # the number of processes is wrong
    everyone = {0: hello} | {number: link.said for number, link in sorted(links.items())}
    trouble = trouble or _differences(everyone)
    missing = [number for number in range(1, place.processes) if number not in links]
    reply: dict[str, Any] = {"host": hello["host"], "decided": {}}
    if trouble:
        reply["disagreement"] = trouble
    elif missing:
        reply["missing"] = (
            f"{len(links) + 1} of {place.processes} processes came within {seconds:g} s; missing: "
            f"{', '.join(map(str, missing))}. See whether they were started, on all hosts, and why they ended (their "
            f"number comes from {place.how})"
        )
    else:
        reply["decided"] = dict(decide())
    for link in came:
        link.send(reply)
    _refused(reply)
    return Peers(place, list(links.values()), reply["decided"])


def _first(link: Link, until: float) -> dict[str, Any] | None:
    """The first message of a link; None if it closes or sends nothing in time."""
    while (left := until - time.monotonic()) > 0:
        link.connection.settimeout(min(1.0, left))
        messages = link.receive()
        if messages is None:
            return None
        if messages:
            link.early = messages[1:]
            link.connection.settimeout(None)
            return messages[0]
    return None


def _greeted(connection: socket.socket) -> Link | None:
    """A link to a process of this program; None for any other connection to the port."""
    link = Link(_lively(connection))
    hello = _first(link, time.monotonic() + 5)
    if hello is None or hello.get("greeting") != _GREETING:
        connection.close()
        return None
    link.process, link.host, link.said = hello["process"], hello["host"], hello
    return link


def _join(place: Place, hello: Mapping[str, Any], until: float, seconds: float) -> Peers:
    host, _, port = place.coordinator.rpartition(":")
    last = "nothing answered"
    while (left := until - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=min(5.0, left))
        except OSError as error:
            last = str(error)
            time.sleep(min(0.5, left))
            continue
        link = Link(_lively(connection))
        link.send(hello)
        # Process 0 waits as long as this one, and may have started a little later.
        reply = _first(link, until + 30)
        if reply is not None and "decided" in reply:
            _refused(reply)
            link.host = reply["host"]
            return Peers(place, [link], reply["decided"])
        connection.close()
        last = "process 0 closed the connection, or something else answers there"
        time.sleep(min(0.5, max(0.0, until - time.monotonic())))
    raise ProcessLost(
        f"process {place.process} of {place.processes} could not reach process 0 at {place.coordinator} within "
        f"{seconds:g} s: {last}. See whether it runs, and whether a firewall stops that port (JAX_COORDINATOR_PORT, or "
        "--coordinator HOST:PORT, chooses another)"
    )


def _lively(connection: socket.socket) -> socket.socket:
    """Set TCP keepalive, to detect within `SILENCE` seconds that the machine at the other end is lost."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE"  # as macOS calls it
    for name, value in ((idle, SILENCE // 2), ("TCP_KEEPINTVL", SILENCE // 6), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _refused(reply: Mapping[str, Any]) -> None:
    if "disagreement" in reply:
        raise Disagreement(reply["disagreement"])
    if "missing" in reply:
        raise ProcessLost(reply["missing"])


def _differences(everyone: Mapping[int, Mapping[str, Any]]) -> str:
    """Message with the differing processes and values; empty if all agree."""
    names = dict.fromkeys(name for hello in everyone.values() for name in hello["facts"])
    lines = []
    for name in names:
        values = defaultdict(list)
        for number, hello in everyone.items():
            values[hello["facts"].get(name, "not there")].append(f"{number} on {hello['host']}")
        if len(values) > 1:
            groups = sorted(values.items(), key=lambda item: -len(item[1]))
            lines.append(f"{name} is " + ", but ".join(f"{value} (process {_some(who)})" for value, who in groups))
    if not lines:
        return ""
    more = f"; and {len(lines) - 8} more" if len(lines) > 8 else ""
    return f"the processes differ: {'; '.join(lines[:8])}{more}. Start all of them with the same versions and config"


def _some(who: Sequence[str]) -> str:
    return ", ".join(who[:4]) + (f" and {len(who) - 4} more" if len(who) > 4 else "")
