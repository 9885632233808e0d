"""A door out of the box: a part of the agent that is sent when a box first has an allow-list.

It listens on the loopback interface and carries each connection's bytes to the host and back, without a look at them:
the host speaks HTTP with whoever connected, looks names up, dials, and decides. So a payload reaches nothing that the
host does not dial for it, and what it can do to the agent is to send bytes.

Each direction of a connection has a window: bytes that the other side has not passed on. What exceeds it is not read,
so a sender waits at its socket. One turn of the agent's loop moves at most one piece per connection and takes one frame
of the host's, so commands wait for pieces, not for transfers.

A message about a connection is its number, what happened, and perhaps an argument: ``open`` (from here only), ``data``
and the bytes, ``end`` of the data in this direction, ``took`` and how many bytes were passed on, ``got`` and how many
have arrived here, ``close``: from here that the connection broke, from the host that it is to end when what was sent is
delivered, and that its place is free.
"""

from __future__ import annotations

import select
from _socket import AF_INET, SOCK_STREAM, socket

from sandbox.agent import EVENT, OK, READABLE, Agent, pack, send

LISTEN, CARRY = 40, 41

PORT = 3128
"""Where the door is, unless the payload listens there itself."""
MAX_CONNECTIONS = 32
"""Open at the same time; more wait to be accepted."""
WINDOW = 1 << 16
"""Bytes of one direction of a connection between the host and the payload."""
PIECE = 1 << 15
"""Most bytes of a frame."""
LOOPBACK = "127.0.0.1"
SHUT_WR = 1


def install(agent: Agent) -> None:
    doors: list[Door] = []

    def listen(op: int, fields: list[bytes]) -> None:
        if not doors:
            doors.append(Door(agent))
        doors[0].op = op
        send(op, OK, pack(doors[0].socket.getsockname()[1]))

    agent.handlers[LISTEN] = listen
    agent.handlers[CARRY] = lambda op, fields: doors[0].carry(int(fields[0]), fields[1], fields[2:])


class Door:
    """The listening socket, and the connections by number."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.op = 0
        self.lines: dict[int, Line] = {}
        self.count = 0
        self.socket = socket(AF_INET, SOCK_STREAM)
        try:
            self.socket.bind((LOOPBACK, PORT))
        except OSError:
            self.socket.bind((LOOPBACK, 0))
        self.socket.listen(MAX_CONNECTIONS)
        self.socket.setblocking(False)
        agent.streams[self.socket.fileno()] = (self, 0)  # type: ignore[assignment]
        agent.poller.register(self.socket.fileno(), READABLE)

    def pump(self, fd: int, which: int) -> None:
        try:
            accepted, _ = self.socket._accept()  # type: ignore[attr-defined]
        except OSError:
            # It was taken back meanwhile.
            return
        self.count += 1
        self.tell(self.count, "open")
        self.lines[self.count] = Line(self, self.count, socket(fileno=accepted))
        if len(self.lines) == MAX_CONNECTIONS:
            self.agent.poller.unregister(fd)

    def carry(self, number: int, what: bytes, argument: list[bytes]) -> None:
        """What the host says about a connection, which may be gone."""
        if what == b"data":
            self.tell(number, "got", len(argument[0]))
        line = self.lines.get(number)
        if line is None:
            return
        if what == b"took":
            line.window += int(argument[0])
        elif what == b"data":
            line.pending += argument[0]
        else:
            line.ends = True
            line.closes = what == b"close"
        line.pump(line.fd, 0)

    def tell(self, number: int, what: str, *argument: bytes | int) -> None:
        send(self.op, EVENT, pack(number, what, *argument))

    def forget(self, number: int) -> None:
        if len(self.lines) == MAX_CONNECTIONS:
            self.agent.poller.register(self.socket.fileno(), READABLE)
        del self.lines[number]


class Line:
    """One connection. Whatever happens to it ends in ``pump``, which moves what can be moved."""

    def __init__(self, door: Door, number: int, socket: socket) -> None:
        self.door = door
        self.number = number
        self.socket = socket
        self.fd = socket.fileno()
        self.window = WINDOW
        """How much more the host takes."""
        self.pending = bytearray()
        """What the host sent and the payload has not taken: at most a window."""
        self.reads = True
        """The payload may send more."""
        self.ends = self.closes = False
        """The host sends no more; and wants to hear no more."""
        self.events = 0
        """What the descriptor is watched for."""
        socket.setblocking(False)
        door.agent.streams[self.fd] = (self, 0)  # type: ignore[assignment]
        self._watch()

    def pump(self, fd: int, which: int) -> None:
        try:
            self._write()
            self._read()
        except OSError:
            self.reads = False
            self.pending.clear()
            self.door.tell(self.number, "close")
        self._watch()
        if self.closes and not self.pending:
            del self.door.agent.streams[self.fd]
            self.socket.close()
            self.door.forget(self.number)

    def _write(self) -> None:
        if self.pending:
            try:
                size = self.socket.send(self.pending[:PIECE])
            except BlockingIOError:
                return
            del self.pending[:size]
            self.door.tell(self.number, "took", size)
        if self.ends and not self.pending:
            self.socket.shutdown(SHUT_WR)
            self.ends = False

    def _read(self) -> None:
        if not self._may_read():
            return
        try:
            data = self.socket.recv(min(PIECE, self.window))
        except BlockingIOError:
            return
        if data:
            self.window -= len(data)
            self.door.tell(self.number, "data", data)
        else:
            self.reads = False
            self.door.tell(self.number, "end")

    def _may_read(self) -> bool:
        return self.reads and not self.closes and self.window > 0

    def _watch(self) -> None:
        """A descriptor is not watched for nothing, since its end would be reported all the time."""
        events = (select.POLLIN if self._may_read() else 0) | (select.POLLOUT if self.pending else 0)
        if events:
            self.door.agent.poller.register(self.fd, events)
        elif self.events:
            self.door.agent.poller.unregister(self.fd)
        self.events = events
