"""A box's way out: an HTTP proxy on the host, whose clients reach it through the agent in the box.

The box has no network. What a command sends to the proxy's port in the box comes here as bytes; here it is read, and a
destination on the box's allow-list is looked up and dialled. Every name is looked up once, and what is dialled is the
address that was checked. What is not public (local networks, metadata services) is dialled only if a block on the
list names it. The list can change while the box lives.

A client speaks HTTP/1.1: ``CONNECT`` for a tunnel, or one request with an absolute ``http://`` target, of which only
the request that was checked goes on, under the host name that was checked.

What it does not cover: what is said in a tunnel. Of several sites behind one address (a content network) the payload
can ask for any, once the name of one is allowed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from posttrain.errors import SandboxLost
from posttrain.network import Address, AllowList, unmapped
from sandbox import agent
from sandbox.agent_egress import LOOPBACK, MAX_CONNECTIONS, PIECE, WINDOW

HEAD_BYTES = WINDOW // 2
DIAL_S = 10.0
"""For the look-up and for the connection, each."""
HOLD_S = 0.05
"""How long at least a connection that leads nowhere takes up its place."""
CHANNEL_BYTES = WINDOW
"""On their way to the agent, of all connections of a box: what a command waits for at most, and little enough to lie in
the channel while the box is paused."""
MAX_LOGGED = 1000
"""Connections of a box that are remembered: the newest."""
AUTHORITY = r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]+))"
REQUEST = re.compile(
    rf"(?:CONNECT {AUTHORITY}:(?P<port>[0-9]{{1,5}})"
    rf"|(?P<method>[A-Z]+) (?i:http)://{AUTHORITY.replace('<', '<p_')}(?::(?P<p_port>[0-9]{{1,5}}))?"
    r"(?P<path>[/?][!-~]*)?) HTTP/1\.[01]"
)
HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)")
DROPPED = {"host", "connection", "proxy-connection", "proxy-authorization", "keep-alive", "te", "trailer", "upgrade"}
"""Headers between client and proxy, and the host name, which is written anew."""
PHRASES = {
    400: "Bad Request",
    403: "Forbidden",
    411: "Length Required",
    431: "Request Header Fields Too Large",
    502: "Bad Gateway",
    504: "Gateway Timeout",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NetLimits:
    """How much a box may use its way out."""

    max_bytes: int = 1 << 30
    """Of all its connections together, both directions, since it was opened."""
    idle_s: float = 60.0
    """A connection on which nothing moves this long is closed; a request must have come within it."""

    def __post_init__(self) -> None:
        if self.max_bytes < 0 or self.idle_s <= 0:
            raise ValueError(
                f"NetLimits: max_bytes={self.max_bytes}, idle_s={self.idle_s}: expected a size >= 0 and a time > 0"
            )


@dataclass(slots=True, kw_only=True)
class Connection:
    """One connection that a box has asked for."""

    host: str = ""
    """A name or an address, as it was asked for; empty when no request could be read."""
    port: int = 0
    address: str = ""
    """What was dialled."""
    verdict: str = "open"
    """``open`` while it is, then ``allowed``, ``refused`` by the list, or ``failed``."""
    reason: str = ""
    """Why it was refused, failed, or was ended by the host."""
    sent: int = 0
    """Bytes from the box."""
    received: int = 0
    started: float = field(default_factory=time.time)
    """In seconds since 1970."""


class Refused(Exception):
    """No connection is made. ``status`` is the HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Cut(Exception):
    """The host ends a connection."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a client wants."""

    host: str
    port: int
    head: bytes
    """What the server is to be sent of it; empty for a tunnel."""
    body_bytes: int | None
    """How much of what follows belongs to it; None for all."""


def parse_request(head: bytes) -> Request:
    """Read a request up to its empty line. ``Refused`` when it could be read in more than one way, or is no proxy's."""
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    matched = REQUEST.fullmatch(first)
    if matched is None:
        raise Refused(400, "expected CONNECT host:port or a method and an http:// URL; this is a proxy")
    found = matched.groupdict()
    host = (found["v6"] or found["host"] or found["p_v6"] or found["p_host"]).lower().removesuffix(".")
    if found["method"] is None:
        return Request(host, int(found["port"]), b"", None)
    port = int(found["p_port"] or 80)
    authority = (f"[{host}]" if ":" in host else host) + (f":{port}" if port != 80 else "")
    path = found["path"] or "/"
    kept = [
        f"{found['method']} {path if path[0] == '/' else '/' + path} HTTP/1.1",
        f"Host: {authority}",
        "Connection: close",
    ]
    body_bytes = 0
    seen = set()
    for line in lines:
        header = HEADER.fullmatch(line)
        if header is None:
            raise Refused(400, "a header is malformed")
        name, value = header[1].lower(), header[2].strip()
        if name == "transfer-encoding":
            raise Refused(411, "a request body needs a Content-Length")
        if name == "content-length":
            if name in seen or not value.isascii() or not value.isdigit():
                raise Refused(400, "Content-Length is malformed")
            body_bytes = int(value)
        seen.add(name)
        if name not in DROPPED:
            kept.append(f"{header[1]}: {value}")
    return Request(host, port, "\r\n".join([*kept, "", ""]).encode("latin-1"), body_bytes)


class Window:
    """Bytes that may be under way."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._opened = asyncio.Event()

    def add(self, size: int) -> None:
        self._left += size
        self._opened.set()

    def take(self, size: int) -> None:
        self._left -= size

    async def room(self) -> int:
        """How many more; waits until there is room for some."""
        while self._left <= 0:
            self._opened.clear()
            await self._opened.wait()
        return self._left


class Line:
    """One connection's bytes between the box and the host."""

    def __init__(self, number: int, egress: Egress) -> None:
        self.number = number
        self.record = Connection()
        self.task: asyncio.Task[None]
        self.clock: asyncio.Timeout | None = None
        """Set when the task runs."""
        self.ending = False
        self.incoming = asyncio.StreamReader(limit=HEAD_BYTES)
        self.window = Window(WINDOW)
        self._egress = egress
        self._unread = 0

    def feed(self, data: bytes) -> None:
        self._unread += len(data)
        if self._unread > WINDOW:
            raise ValueError("the agent sent more of a connection than was asked for")
        self.incoming.feed_data(data)

    async def took(self, size: int) -> None:
        """Have the box send that much more."""
        self._unread -= size
        await self.tell("took", size)

    async def send(self, data: bytes) -> None:
        await self._egress.channel.room()
        self._egress.channel.take(len(data))
        self.window.take(len(data))
        await self.tell("data", data)

    async def tell(self, what: str, *argument: bytes | int) -> None:
        await self._egress.tell(agent.pack(self.number, what, *argument))

    def cut(self, reason: str) -> None:
        if self.ending:
            return
        self.ending = True
        self.record.reason = reason
        if self.clock:
            # A task that is cancelled before it runs does not clean up.
            self.task.cancel()


class Egress:
    """The proxy of one box. ``tell`` sends the body of a frame to its agent."""

    def __init__(self, tell: Callable[[bytes], Awaitable[None]]) -> None:
        self.tell = tell
        self.channel = Window(CHANNEL_BYTES)
        self._allowed = AllowList()
        self._limits = NetLimits()
        self._lines: dict[int, Line] = {}
        self._log: deque[Connection] = deque(maxlen=MAX_LOGGED)
        self._moved = 0
        self.port = 0
        """Where it is reached in the box."""

    def environment(self) -> Mapping[str, str]:
        """The variables by which programs find the proxy; none while nothing is allowed."""
        if not self._allowed.entries:
            return {}
        proxies = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
        local = f"localhost,{LOOPBACK},::1"
        return {**dict.fromkeys(proxies, f"http://{LOOPBACK}:{self.port}"), "no_proxy": local, "NO_PROXY": local}

    def connections(self) -> list[Connection]:
        return [replace(record) for record in self._log]

    async def set(self, allowed: AllowList, limits: NetLimits) -> None:
        """Replace the list. On return no connection is open that it does not allow."""
        self._allowed, self._limits = allowed, limits
        ended = [line for line in self._lines.values() if not self._allows(line.record)]
        for line in ended:
            line.cut("the list has changed")
        if ended:
            await asyncio.wait([line.task for line in ended])

    def _allows(self, record: Connection) -> bool:
        """Whether a connection, as far as it has come, is allowed."""
        if not record.host:
            return bool(self._allowed.entries)
        address = _literal(record.host)
        named = address is None and self._allowed.has_name(record.host, record.port)
        if record.address:
            address = ipaddress.ip_address(record.address)
        return named if address is None else self._allowed.has_address(address, record.port, named=named)

    def close(self) -> None:
        """End all connections."""
        for line in self._lines.values():
            line.cut("the box has ended")

    def on_event(self, fields: list[bytes]) -> None:
        """What the agent says. ``ValueError`` when it does not keep to the limits."""
        number, what = int(fields[0]), fields[1]
        if what == b"open":
            if len(self._lines) == MAX_CONNECTIONS:
                raise ValueError("the agent opened more connections than a box may have")
            line = self._lines[number] = Line(number, self)
            self._log.append(line.record)
            line.task = asyncio.get_running_loop().create_task(self._serve(line))
        elif what == b"got":
            self.channel.add(int(fields[2]))
        elif number in self._lines:
            line = self._lines[number]
            if what == b"data":
                line.feed(fields[2])
            elif what == b"took":
                line.window.add(int(fields[2]))
            elif what == b"end":
                line.incoming.feed_eof()
            else:
                line.cut("the client closed it")

    async def _serve(self, line: Line) -> None:
        """A connection from its first byte to its last."""
        record = line.record
        try:
            async with asyncio.timeout(self._limits.idle_s) as line.clock:
                if line.ending:
                    raise Cut(record.reason)
                try:
                    await self._forward(line)
                except Refused as refusal:
                    record.verdict = "refused" if refusal.status == 403 else "failed"
                    record.reason = str(refusal)
                    await line.send(_answer(refusal))
        except (OSError, Cut, SandboxLost) as error:
            silent = f"nothing moved for {self._limits.idle_s:g} s"
            record.reason = record.reason or (silent if isinstance(error, TimeoutError) else str(error))
        finally:
            line.ending = True
            if record.verdict == "open":
                record.verdict = "allowed" if record.address else "failed"
            if record.verdict != "allowed":
                # Holds its place a little, which bounds how often a box can ask in vain.
                await asyncio.sleep(HOLD_S)
            del self._lines[line.number]
            with contextlib.suppress(SandboxLost):
                await line.tell("close")

    async def _forward(self, line: Line) -> None:
        request = await self._read_request(line)
        record = line.record
        record.host, record.port = request.host, request.port
        reader, writer = await self._dial(record)
        try:
            if request.head:
                writer.write(request.head)
            else:
                await line.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await self._relay(line, request, reader, writer)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        finally:
            writer.transport.abort()

    async def _read_request(self, line: Line) -> Request:
        try:
            head = await line.incoming.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            raise Cut("the client sent no request") from error
        except asyncio.LimitOverrunError as error:
            raise Refused(431, f"expected a request head of at most {HEAD_BYTES} bytes") from error
        await line.took(len(head))
        return parse_request(head)

    async def _dial(self, record: Connection) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to what the list allows."""
        if self._moved >= self._limits.max_bytes:
            raise Refused(403, f"the box has moved its {self._limits.max_bytes} bytes")
        if not self._allowed.entries:
            raise Refused(403, "the network is off")
        literal = _literal(record.host)
        if literal is None and not self._allows(record):
            # Not even looked up, since a look-up is a message, too.
            raise Refused(403, f"{record.host}:{record.port} is not on the allow-list")
        found = [literal] if literal else await _look_up(record.host)
        named = literal is None
        reachable = [each for each in found if self._allowed.has_address(each, record.port, named=named)]
        if not reachable:
            raise Refused(403, f"{record.host}:{record.port} has no address that the allow-list lets through")
        problem: OSError = TimeoutError(f"no connection within {DIAL_S:g} s")
        for address in reachable:
            record.address = str(address)
            try:
                return await asyncio.wait_for(asyncio.open_connection(record.address, record.port, limit=PIECE), DIAL_S)
            except OSError as error:
                problem = error
        raise Refused(504 if isinstance(problem, TimeoutError) else 502, f"{record.host}:{record.port}: {problem}")

    async def _relay(
        self, line: Line, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            async with asyncio.TaskGroup() as both:
                upward = both.create_task(self._send_up(line, writer, request.body_bytes))
                await self._send_down(line, reader)
                if request.head:
                    # The answer is complete. What else the client sends belongs to no request that was checked.
                    upward.cancel()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _send_up(self, line: Line, writer: asyncio.StreamWriter, most: int | None) -> None:
        while most is None or most > 0:
            data = await line.incoming.read(PIECE if most is None else min(PIECE, most))
            if most is not None:
                most -= len(data)
            line.record.sent += len(data)
            self._count(line, len(data))
            try:
                if not data:
                    writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()
            except OSError:
                # The server takes no more; it may still have an answer.
                return
            await line.took(len(data))

    async def _send_down(self, line: Line, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(min(PIECE, await line.window.room())):
            line.record.received += len(data)
            self._count(line, len(data))
            await line.send(data)
        await line.tell("end")

    def _count(self, line: Line, size: int) -> None:
        self._moved += size
        if self._moved > self._limits.max_bytes:
            raise Cut(f"the box has moved its {self._limits.max_bytes} bytes")
        assert line.clock is not None
        line.clock.reschedule(asyncio.get_running_loop().time() + self._limits.idle_s)


def _literal(host: str) -> Address | None:
    """The address that a host is; None for a name."""
    try:
        return unmapped(ipaddress.ip_address(host))
    except ValueError:
        return None


_lookups = ThreadPoolExecutor(16, "sandbox-lookup")
"""Threads of its own: a name server that does not answer must not hold up what else uses threads."""


async def _look_up(name: str) -> list[Address]:
    asked = asyncio.get_running_loop().run_in_executor(_lookups, _addresses, name)
    try:
        return await asyncio.wait_for(asked, DIAL_S)
    except TimeoutError as error:
        raise Refused(504, f"{name} could not be looked up within {DIAL_S:g} s") from error
    except OSError as error:
        raise Refused(502, f"{name} could not be looked up: {error}") from error


def _addresses(name: str) -> list[Address]:
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return [unmapped(ipaddress.ip_address(str(entry[4][0]).partition("%")[0])) for entry in found]


def _answer(refusal: Refused) -> bytes:
    body = f"sandbox: {refusal}\n"
    return (
        f"HTTP/1.1 {refusal.status} {PHRASES[refusal.status]}\r\nContent-Type: text/plain\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
    ).encode()
