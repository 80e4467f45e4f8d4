"""Connections between the processes of a run: lost processes, errors of other processes, and agreement on a stop.

Each process has an open connection to process 0. When a connection closes, its process is lost, and the others are
informed within a second, or within `SILENCE` if a whole machine is lost. jax's own heartbeats detect this later and
abort without naming the process; if process 0 is lost, that abort and the message here come at the same time.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

LOST = 75  # exit status: another process was lost or did not start; the run may be restarted
SILENCE = 60  # seconds after which a machine that does not answer counts as lost
GRACE = 3.0  # seconds in which a process may end by itself from the same cause as another one
_LONGEST = 1 << 20  # bytes of one message


class ProcessLost(RuntimeError):
    """Another process of the run did not start, or was lost."""


@dataclass(frozen=True)
class Place:
    """One process among the processes of a run.

    Attributes:
      coordinator: host:port of process 0, the same for all.
      processes: number of processes.
      process: number of this one, from 0.
      how: source of this information, for messages.
      local_devices: accelerators of this host for this process; None for all.
    """

    coordinator: str
    processes: int
    process: int
    how: str = "flags"
    local_devices: tuple[int, ...] | None = None


@dataclass
class Link:
    """An open connection and its process; `early` has messages received together with the greeting."""

    connection: socket.socket
    process: int = 0
    host: str = ""
    said: Mapping[str, Any] = field(default_factory=dict)
    early: list[dict[str, Any]] = field(default_factory=list)
    rest: bytes = b""

    def send(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # its end is noticed where it is read
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Messages that have arrived; None when the connection has closed."""
        try:
            data = self.connection.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data or len(self.rest) > _LONGEST:
            return None
        *lines, self.rest = (self.rest + data).split(b"\n")
        try:
            return [message for line in lines if isinstance(message := json.loads(line), dict)]
        except ValueError:  # not a process of this program
            return None

    @property
    def closed(self) -> bool:
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True


class Peers:
    """The open connections of a process: of process 0 to all others, of any other to process 0."""

    def __init__(self, place: Place, links: Sequence[Link], decided: Mapping[str, Any]):
        self.place, self.decided = place, dict(decided)
        self._links = {link.process: link for link in links}
        self._changed = threading.Condition()
        self._checks = 0  # number of calls of agreed_stop
        self._reports: dict[int, int] = {}  # process 0: number of calls of each process when a stop was requested
        self._asked = self._told = False
        self._stop_at: int | None = None
        self._leaving = self._over = False
        threading.Thread(target=self._listen, name="peers", daemon=True).start()

    def agreed_stop(self, wanted: bool, *, seconds: float = SILENCE) -> bool:
        """Whether all processes stop here; each calls it at the same points of its program.

        Args:
          wanted: whether this process requests a stop; the others are informed without waiting.
          seconds: time limit for the answers of the others.

        Returns:
          The same on every process at the same call: False until the first call that none of them has made yet.

        Raises:
          ProcessLost: when there is no agreement in time.
        """
        with self._changed:
            if wanted and not self._asked:
                self._asked = True
                self._tell({"stop": True})
            # From now on no call returns until all processes have reported their number of calls.
            if self._told and not self._changed.wait_for(lambda: self._stop_at is not None, seconds):
                raise ProcessLost(f"the other processes did not agree within {seconds:g} s on a step to stop at")
            self._checks += 1
            return self._stop_at is not None and self._checks >= self._stop_at

    def leave(self, status: int = 0, why: str = "") -> None:
        """Say that this process ends, and with which status; with another than 0 the others end with it too."""
        if status:
            time.sleep(
                GRACE
            )  # the failure here may be caused by the loss of another process: its message will end this process
        with self._changed:
            self._leaving = True
            self._tell({"bye": status, "why": why})
        if self.place.process == 0:
            self._broadcast({"over": True})
            if status:  # jax aborts the others as soon as this process has ended: let them end by themselves first
                with self._changed:
                    self._changed.wait_for(lambda: not self._links, GRACE + 2)

    # Messages go to process 0, which tells everyone.

    def _tell(self, message: Mapping[str, Any]) -> None:
        if self.place.process == 0:
            self._collect(0, message)
        else:
            for link in self._links.values():  # the one to process 0, while it is there
                link.send(message)

    def _broadcast(self, message: Mapping[str, Any]) -> None:
        with self._changed:
            for link in self._links.values():
                link.send(message)
        self._hear(message)

    def _collect(self, sender: int, message: Mapping[str, Any]) -> None:
        """Process 0: handle a message of a process."""
        if "stop" in message and not self._told:
            self._broadcast({"stop": True})
        if "bye" in message:
            self._reports.setdefault(sender, 0)  # it makes no more checks
        elif "checks" in message:
            self._reports[sender] = message["checks"]
        if self._told and self._stop_at is None and len(self._reports) == self.place.processes:
            # The first call that nobody has made yet.
            self._broadcast({"stop_at": max(self._reports.values()) + 1})
        if "bye" in message:
            link = self._links.pop(sender, None)
            self._changed.notify_all()
            if message["bye"]:
                where = link.host if link else socket.gethostname()
                text = f"process {sender} on {where} ended with status {message['bye']}: {message['why']}"
                self._broadcast({"ended": message["bye"], "text": text, "by": sender})

    def _hear(self, message: Mapping[str, Any]) -> None:
        """Handle a message of process 0."""
        with self._changed:
            if "stop" in message and not self._told:
                self._told = True
                self._tell({"checks": self._checks})
            self._stop_at = message.get("stop_at", self._stop_at)
            self._over |= "over" in message
            self._changed.notify_all()
        if "ended" in message and message["by"] != self.place.process:
            # The cause, for instance a non-finite number, is about to end this process as well.
            threading.Thread(target=self._end, args=(message["ended"], message["text"], GRACE), daemon=True).start()

    def _listen(self) -> None:
        watched = selectors.DefaultSelector()
        for link in list(self._links.values()):
            watched.register(link.connection, selectors.EVENT_READ, link)
            self._take(link, link.early)
        while watched.get_map():
            for key, _ in watched.select():
                messages = key.data.receive()
                self._take(key.data, messages or ())
                if messages is None:
                    watched.unregister(key.fileobj)
                    self._closed(key.data)

    def _take(self, link: Link, messages: Sequence[Mapping[str, Any]]) -> None:
        for message in messages:
            if self.place.process == 0:
                with self._changed:
                    self._collect(link.process, message)
            elif "lost" in message:
                self._end(LOST, message["lost"])
            else:
                self._hear(message)

    def _closed(self, link: Link) -> None:
        with self._changed:
            known = self._links.pop(link.process, None)
            self._changed.notify_all()
            if known is None or self._over or self._leaving:
                return
            text = f"process {link.process} on {link.host} was lost: killed, out of memory, or its machine is gone"
            if self.place.process == 0:
                for other in self._links.values():
                    other.send({"lost": text})
        # As in `leave`: the others read before jax aborts them.
        self._end(LOST, text, 1.0 if self.place.process == 0 else 0.0)

    def _end(self, status: int, text: str, after: float = 0.0) -> None:
        """End this process from a thread: the main thread may be blocked, waiting for the lost process."""
        time.sleep(after)
        if not self._leaving:
            ends = f"process {self.place.process} of {self.place.processes} ends with it"
            print(f"error: {text}; {ends}", file=sys.stderr, flush=True)
            exit_now(status)


def exit_now(status: int) -> NoReturn:
    """End this process without the interpreter's exit handlers, in which jax would wait for lost processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
