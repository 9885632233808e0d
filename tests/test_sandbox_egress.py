"""Allow-lists: what a box reaches through the host's proxy, and that it reaches nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import ensurepip
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from posttrain.errors import Unsupported
from posttrain.network import AllowList, parse
from posttrain.protocols import Substrate
from posttrain.types import ExecResult, SandboxSpec
from sandbox.agent_egress import MAX_CONNECTIONS, PIECE, WINDOW
from sandbox.client import AgentSandbox
from sandbox.container import Container
from sandbox.egress import CHANNEL_BYTES, MAX_LOGGED, Connection, Egress, NetLimits, Refused, parse_request
from sandbox.function import Function
from sandbox.gvisor import Gvisor
from sandbox.local import LocalUnsafe
from sandbox.log import TrajectoryLog
from sandbox.pool import close_pools
from sandbox.process import Process
from sandbox.qemu import MicroVM
from sandbox.recorded import creation, spec_of
from tests.boxes import require

KINDS = [Process(), pytest.param(Container(), marks=pytest.mark.docker), Gvisor()]
every_box = pytest.mark.parametrize("substrate", KINDS, indirect=True, ids=["process", "container", "gvisor"])
process_box = pytest.mark.parametrize("substrate", [Process()], indirect=True, ids=["process"])
RAW = """
import os, socket, struct, sys, time
def dial(**options):
    host, port = os.environ.get("http_proxy", sys.argv[1])[7:].split(":")
    made = socket.socket()
    for name, value in options.items():
        made.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    made.connect((host, int(port)))
    return made
def ask(request, **options):
    made = dial(**options)
    made.sendall(request.encode("latin-1"))
    return made
def first_line(made):
    return made.makefile("rb").readline().decode().strip()
"""
"""What raw requests are made with. Its first argument is where the proxy is when the environment does not say."""


@pytest.fixture
def substrate(request: pytest.FixtureRequest) -> Substrate:
    return require(request.param)


class Names:
    """The name server of these tests: which addresses a name has, and what was asked."""

    def __init__(self) -> None:
        self.addresses: dict[str, list[str]] = {}
        """Answers in turn, the last one for ever; several addresses are separated by spaces."""
        self.asked: list[str] = []

    def look_up(self, host: str, port: object, *_: object, **__: object) -> list[tuple[object, ...]]:
        self.asked.append(host)
        if host not in self.addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        answers = self.addresses[host]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in answer.split()]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    found = Names()
    monkeypatch.setattr(socket, "getaddrinfo", found.look_up)
    return found


class Site:
    """An HTTP server: ``GET /5`` gives five bytes, and a request's body is given back. Its requests are kept."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.requests.append(head)
                length = re.search(rb"(?i)content-length: (\d+)", head)
                body = await reader.readexactly(int(length[1])) if length else b""
                size = 0 if length else int(head.split()[1].rpartition(b"/")[2] or 2)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (size + len(body)) + body)
                while size > 0:
                    writer.write(b"x" * min(size, 1 << 16))
                    await writer.drain()
                    size -= 1 << 16
                if b"connection: close" in head.lower():
                    break
        writer.close()


@contextlib.asynccontextmanager
async def site(host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> AsyncIterator[Site]:
    made = Site()
    server = await asyncio.start_server(made.serve, host, 0, ssl=tls)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()


@contextlib.asynccontextmanager
async def echo() -> AsyncIterator[int]:
    """A server that sends back what it gets: its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def raw(box: AgentSandbox, program: str, *args: object, timeout_s: float = 20.0) -> ExecResult:
    return await box.exec(
        ["python3", "-I", "-S", "-c", RAW + program, "http://127.0.0.1:3128", *map(str, args)], timeout_s=timeout_s
    )


async def statuses(box: AgentSandbox, requests: Sequence[str]) -> list[int]:
    """The proxy's answer to each request, all of them from one command."""
    program = "for request in sys.argv[2:]: print(first_line(ask(request)).split()[1])"
    result = await raw(box, program, *requests)
    assert result.ok, result
    return [int(line) for line in result.stdout.split()]


def connect(host: str, port: int) -> str:
    return f"CONNECT {host}:{port} HTTP/1.1\r\n\r\n"


def get(host: str, port: int, path: str = "/5") -> str:
    return f"GET http://{host}:{port}{path} HTTP/1.1\r\nHost: {host}\r\n\r\n"


async def ended(box: AgentSandbox) -> Sequence[Connection]:
    """The box's connections when none is open any more, which is soon after the command that had them."""
    while any(c.verdict == "open" for c in box.connections()):
        await asyncio.sleep(0.01)
    return box.connections()


async def alive(box: AgentSandbox) -> None:
    result = await box.exec(["echo", "alive"])
    assert result.stdout == b"alive\n", result


def in_box(substrate: Substrate, test: Callable[[AgentSandbox], Awaitable[None]], *network: str) -> None:
    async def run() -> None:
        async with substrate.open(SandboxSpec(network=network, timeout_s=20)) as box:
            assert isinstance(box, AgentSandbox)
            await test(box)
            await alive(box)

    asyncio.run(run())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of files.test with its key, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate of the TLS server; apt-get install openssl")
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    argv += ["-keyout", str(file), "-out", f"{file}.crt", "-subj", "/CN=files.test"]
    subprocess.run([*argv, "-addext", "subjectAltName=DNS:files.test"], check=True, capture_output=True)
    file.write_text(file.read_text() + Path(f"{file}.crt").read_text())
    return file


FETCH = """
import ssl, sys, urllib.request
for url in sys.argv[1:]:
    context = ssl.create_default_context(cafile="ca.pem") if url.startswith("https") else None
    print(len(urllib.request.urlopen(url, context=context).read()))
"""


@every_box
def test_what_is_allowed_works_for_plain_and_tls_clients(substrate: Substrate, names: Names, certificate: Path) -> None:
    names.addresses["files.test"] = ["127.0.0.1"]
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)

    async def test(box: AgentSandbox) -> None:
        async with site() as plain, site(tls=tls) as secret:
            ports = (plain.port, secret.port)
            await box.set_net([f"{host}:{port}" for host in ("files.test", "127.0.0.1/32") for port in ports])
            await box.write("ca.pem", Path(f"{certificate}.crt").read_bytes())
            urls = [f"http://files.test:{plain.port}/70000", f"https://files.test:{secret.port}/80000"]
            result = await box.exec(["python3", "-c", FETCH, *urls])
            assert (result.stdout, result.stderr) == (b"70000\n80000\n", b"")
            first = plain.requests[0].decode()
            assert first.startswith("GET /70000 HTTP/1.1\r\n")
            assert f"\r\nHost: files.test:{plain.port}\r\n" in first
            kept = await ended(box)
            assert [(c.host, c.port, c.address, c.verdict) for c in kept] == [
                ("files.test", port, "127.0.0.1", "allowed") for port in ports
            ]
            assert kept[0].received > 70000
            assert kept[1].received > 80000
            assert kept[1].sent > 100

    in_box(substrate, test)


@every_box
def test_everything_else_is_refused_and_logged(substrate: Substrate, names: Names) -> None:
    names.addresses |= {"in.test": ["10.1.2.3"], "meta.test": ["169.254.169.254"], "up.test": ["127.0.0.1"]}

    async def test(box: AgentSandbox) -> None:
        async with site() as allowed, site() as other:
            await box.set_net(["in.test", "meta.test", f"up.test:{allowed.port}", f"127.0.0.1/32:{allowed.port}"])
            forbidden = [
                *(("127.0.0.1", other.port), ("up.test", other.port), ("up.test", 22), ("secret.evil.test", 443)),
                *(("localhost", allowed.port), ("127.0.0.2", allowed.port), ("[::1]", allowed.port)),
                *(("in.test", 443), ("meta.test", 80), ("169.254.169.254", 80), ("[::ffff:169.254.169.254]", 80)),
                *(("10.1.2.3", 80), ("[fd00::1]", 443), ("2130706433", allowed.port), ("0x7f.1", allowed.port)),
            ]
            requests = [connect(*pair) for pair in forbidden] + [get(*pair) for pair in forbidden]
            assert await statuses(box, requests) == [403] * len(requests)
            assert await statuses(box, [get("127.0.0.1", allowed.port), get("up.test", allowed.port)]) == [200, 200]
            refused = [c for c in box.connections() if c.verdict == "refused"]
            assert [(c.host, c.port) for c in refused] == [(h.strip("[]"), p) for h, p in forbidden] * 2
            assert all(c.reason and not c.address for c in refused)
            # A look-up is a message, so a name that is not on the list is not looked up.
            assert set(names.asked) == {"in.test", "meta.test", "up.test"}
            assert other.requests == []
            await no_way_around(box, allowed.port)

    in_box(substrate, test)


async def no_way_around(box: AgentSandbox, port: int) -> None:
    """The allow-list gives the box no network of its own."""
    program = f"""
targets = [("127.0.0.1", {port}), ("203.0.113.9", 80), ("169.254.169.254", 80), ("172.17.0.1", 22)]
for family, pairs in ((socket.AF_INET, targets), (socket.AF_INET6, [("2001:db8::1", 80), ("::ffff:203.0.113.9", 80)])):
    for pair in pairs:
        try:
            made = socket.socket(family)
            made.settimeout(1)
            made.connect(pair)
            print("reached", pair)
        except OSError: pass
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("203.0.113.9", 53))
    print("sent")
except OSError: pass
"""
    result = await raw(box, program)
    assert (result.stdout, result.stderr) == (b"", b"")


@process_box
def test_the_address_that_was_checked_is_the_one_that_is_dialled(substrate: Substrate, names: Names) -> None:
    names.addresses |= {"good-then-bad.test": ["127.0.0.1", "127.0.0.2"], "mixed.test": ["127.0.0.2 127.0.0.1"]}

    async def test(box: AgentSandbox) -> None:
        async with site("0.0.0.0") as both:
            allowed = ["good-then-bad.test", "mixed.test", "127.0.0.1/32"]
            await box.set_net([f"{entry}:{both.port}" for entry in allowed])
            asked = [get(host, both.port) for host in ("good-then-bad.test", "good-then-bad.test", "mixed.test")]
            assert await statuses(box, asked) == [200, 403, 200]
            assert [c.address for c in await ended(box)] == ["127.0.0.1", "", "127.0.0.1"]
            assert len(names.asked) == 3

    in_box(substrate, test)


@every_box
def test_the_list_changes_while_the_box_lives(substrate: Substrate, names: Names) -> None:
    async def test(box: AgentSandbox) -> None:
        async with echo() as first, echo() as second:
            assert "proxy" not in (await box.exec("env")).stdout.decode().lower()
            assert (await raw(box, "dial()")).exit_code == 1
            await box.set_net([f"127.0.0.1:{first}", f"127.0.0.1:{second}"])
            program = f"""
made = [ask("CONNECT 127.0.0.1:%d HTTP/1.1\\r\\n\\r\\n" % port) for port in ({first}, {second})]
print([first_line(each).split()[1] for each in made], flush=True)
print(made[0].recv(9), flush=True)
made[1].sendall(b"on")
print(made[1].recv(9), made[1].recv(9), flush=True)
"""
            async with await box.spawn(["python3", "-I", "-S", "-c", RAW + program, ""]) as job:
                lines = _lines(job)
                assert await anext(lines) == "['200', '200']"
                await box.set_net([f"127.0.0.1:{second}"])
                assert await anext(lines) == "b''"
                open_now = [c.port for c in box.connections() if c.verdict == "open"]
                assert open_now == [second]
                await asyncio.sleep(0.05)
                await box.set_net([])
                assert (await anext(lines)).startswith("b'on' b''")
            assert "proxy" not in (await box.exec("env")).stdout.decode().lower()
            assert await statuses(box, [connect("127.0.0.1", second)]) == [403]
            last = box.connections()[-1]
            assert (last.verdict, last.reason) == ("refused", "the network is off")
            await box.set_net([f"127.0.0.1:{first}"])
            assert await statuses(box, [connect("127.0.0.1", port) for port in (first, second)]) == [200, 403]

    in_box(substrate, test)


async def _lines(job: AsyncIterator) -> AsyncIterator[str]:
    text = b""
    async for chunk in job:
        text += chunk.data
        *whole, text = text.split(b"\n")
        for line in whole:
            yield line.decode()


@every_box
def test_a_large_transfer_waits_for_its_reader(substrate: Substrate, names: Names) -> None:
    size = 24 << 20
    program = f"""
made = ask("GET http://127.0.0.1:%s/{size} HTTP/1.1\\r\\n\\r\\n" % sys.argv[2], SO_RCVBUF=65536)
stream = made.makefile("rb")
while stream.readline() != b"\\r\\n": pass
print("head", flush=True)
sys.stdin.readline()
count = 0
while data := made.recv(1 << 20) if count else stream.read1(1 << 20): count += len(data)
print(count)
"""

    async def test(box: AgentSandbox) -> None:
        async with site() as big:
            await box.set_net([f"127.0.0.1:{big.port}"])
            argv = ["python3", "-I", "-S", "-c", RAW + program, "", str(big.port)]
            async with await box.spawn(argv, env={}) as job:
                lines = _lines(job)
                assert await anext(lines) == "head"
                received = -1
                while received != (received := box.connections()[0].received):
                    await asyncio.sleep(0.3)
                # What the kernel's buffers and the window hold of it.
                assert received < size // 2
                started = time.monotonic()
                await alive(box)
                assert time.monotonic() - started < 2
                await job.write_stdin(b"go\n")
                assert await anext(lines) == str(size)

    in_box(substrate, test)


@process_box
def test_traffic_does_not_wake_a_paused_box(substrate: Substrate, names: Names) -> None:
    size = 24 << 20
    read_all = "print(sum(map(len, iter(lambda: made.recv(1 << 20), b''))))"

    async def test(box: AgentSandbox) -> None:
        async with site() as big:
            await box.set_net([f"127.0.0.1:{big.port}"])
            program = f"made = ask(sys.argv[2]); print('on', flush=True); time.sleep(0.1); {read_all}"
            argv = ["python3", "-I", "-S", "-c", RAW + program, "", get("127.0.0.1", big.port, f"/{size}")]
            async with await box.spawn(argv) as job:
                lines = _lines(job)
                assert await anext(lines) == "on"
                try:
                    await box.pause()
                except Unsupported as error:
                    pytest.skip(str(error))
                await asyncio.sleep(0.3)
                assert box.paused
                assert box.connections()[0].received < size
                await box.resume()
                assert int(await anext(lines)) > size

    in_box(substrate, test)


@every_box
def test_an_upload_arrives_whole(substrate: Substrate, names: Names) -> None:
    program = """
import hashlib, threading
made = ask("CONNECT 127.0.0.1:%s HTTP/1.1\\r\\n\\r\\n" % sys.argv[2])
assert made.recv(100).endswith(b"\\r\\n\\r\\n")
sent = os.urandom(1 << 16) * 64
def write():
    made.sendall(sent)
    made.shutdown(socket.SHUT_WR)
threading.Thread(target=write).start()
back = b"".join(iter(lambda: made.recv(1 << 20), b""))
print(back == sent, len(back))
"""

    async def test(box: AgentSandbox) -> None:
        async with echo() as port:
            await box.set_net([f"127.0.0.1:{port}"])
            assert (await raw(box, program, port)).stdout.decode().split() == ["True", str(1 << 22)]
            assert ((await ended(box))[0].sent, box.connections()[0].reason) == (1 << 22, "")

    in_box(substrate, test)


@every_box
def test_a_flood_is_bounded_and_commands_go_on(substrate: Substrate, names: Names) -> None:
    """Connections that say nothing, many that ask in vain, and one that transfers, all at once."""
    program = """
import threading
def hoard():
    made = []
    for _ in range(60):
        made.append(socket.socket())
        made[-1].setblocking(False)
        made[-1].connect_ex(("127.0.0.1", 3128))
    time.sleep(60)
def ask_in_vain():
    while True:
        try: ask("GET http://no.test/ HTTP/1.1\\r\\n\\r\\n").recv(100)
        except OSError: pass
def hang_up():
    while True:
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        made.connect(("127.0.0.1", 3128))
        made.close()
def transfer():
    made = ask("GET http://127.0.0.1:%s/4000000000 HTTP/1.1\\r\\n\\r\\n" % sys.argv[2])
    while made.recv(1 << 20): pass
for each in (transfer, ask_in_vain, ask_in_vain, hang_up): threading.Thread(target=each).start()
time.sleep(0.3)
hoard()
"""

    async def test(box: AgentSandbox) -> None:
        async with site() as big:
            await box.set_net([f"127.0.0.1:{big.port}"])
            flood = asyncio.create_task(raw(box, program, big.port, timeout_s=1.5))
            slowest = 0.0
            while not flood.done():
                started = time.monotonic()
                await alive(box)
                slowest = max(slowest, time.monotonic() - started)
                assert sum(c.verdict == "open" for c in box.connections()) <= MAX_CONNECTIONS
            flooded = await flood
            assert flooded.status == "timeout", flooded
            assert slowest < 1.0
            kept = box.connections()
            assert any(c.verdict == "refused" for c in kept)
            assert len(kept) < MAX_LOGGED
            assert max(c.received for c in kept) > 10 * WINDOW
            # No place was lost.
            everything = f"""
made = [ask({connect("127.0.0.1", big.port)!r}) for _ in range({MAX_CONNECTIONS})]
print({{first_line(each).split()[1] for each in made}})
"""
            assert (await raw(box, everything)).stdout == b"{'200'}\n"

    in_box(substrate, test)


@process_box
def test_limits_end_connections(substrate: Substrate, names: Names) -> None:
    async def test(box: AgentSandbox) -> None:
        async with echo() as port, site() as big:
            network = [f"127.0.0.1:{port}", f"127.0.0.1:{big.port}"]
            await box.set_net(network, limits=NetLimits(idle_s=0.2))
            silent = "made = ask(sys.argv[2]); started = time.time(); made.recv(99); print(made.recv(9), made.recv(9))"
            assert (await raw(box, silent, connect("127.0.0.1", port))).stdout == b"b'' b''\n"
            assert (await raw(box, silent, "GET http://unfin")).stdout == b"b'' b''\n"
            assert [(c.verdict, c.reason) for c in await ended(box)] == [
                ("allowed", "nothing moved for 0.2 s"),
                ("failed", "nothing moved for 0.2 s"),
            ]
            await box.set_net(network, limits=NetLimits(max_bytes=1 << 20))
            read_all = "made = ask(sys.argv[2]); print(sum(map(len, iter(lambda: made.recv(1 << 20), b''))))"
            count = int((await raw(box, read_all, get("127.0.0.1", big.port, "/3000000"))).stdout)
            assert 0 < count <= 1 << 20
            assert await statuses(box, [get("127.0.0.1", big.port)]) == [403]
            assert [c.reason for c in (await ended(box))[2:]] == ["the box has moved its 1048576 bytes"] * 2

    in_box(substrate, test)


@pytest.mark.parametrize("substrate", [Process(), MicroVM()], indirect=True, ids=["process", "microvm"])
def test_only_the_request_that_was_checked_goes_on(substrate: Substrate, names: Names) -> None:
    names.addresses["up.test"] = ["127.0.0.1"]

    async def test(box: AgentSandbox) -> None:
        async with site() as one:
            await box.set_net([f"{host}:{one.port}" for host in ("up.test", "127.0.0.1/32")])
            request = (
                f"POST http://up.test:{one.port}/x?y HTTP/1.1\r\nHost: victim.test\r\nProxy-Connection: keep-alive\r\n"
                "Connection: keep-alive\r\nX-Kept: 1\r\nContent-Length: 4\r\n\r\nbody"
                "GET /5 HTTP/1.1\r\nHost: victim.test\r\n\r\n"
            )
            result = await raw(box, "print(ask(sys.argv[2]).makefile().read())", request)
            assert result.stdout.endswith(b"\nbody\n")
            assert result.stdout.count(b"HTTP/1.1") == 1
            head = f"POST /x?y HTTP/1.1\r\nHost: up.test:{one.port}\r\nConnection: close\r\nX-Kept: 1\r\n"
            assert one.requests == [f"{head}Content-Length: 4\r\n\r\n".encode()]

    in_box(substrate, test)


@process_box
def test_a_payload_that_listens_on_the_usual_port_only_moves_the_proxy(substrate: Substrate, names: Names) -> None:
    program = "made = socket.create_server(('127.0.0.1', 3128)); print('up', flush=True); time.sleep(60)"

    async def test(box: AgentSandbox) -> None:
        async with site() as one, await box.spawn(["python3", "-I", "-S", "-c", RAW + program]) as job:
            assert await anext(_lines(job)) == "up"
            await box.set_net([f"127.0.0.1:{one.port}"])
            assert ":3128" not in (await box.exec("echo $https_proxy")).stdout.decode()
            assert await statuses(box, [get("127.0.0.1", one.port)]) == [200]

    in_box(substrate, test)


@process_box
def test_a_box_that_had_a_network_is_not_used_again(substrate: Substrate) -> None:
    async def run() -> None:
        function = Function(warm=1)
        try:
            async with function.open(SandboxSpec(network=("up.test",))) as box:
                assert (
                    await box.call("import os; print(os.environ['https_proxy'])")
                ).stdout == b"http://127.0.0.1:3128\n"
                assert box.spoiled == "it had a network"
            async with function.open(SandboxSpec()) as other:
                assert other is not box
                assert (await other.call("import os; print('https_proxy' in os.environ)")).stdout == b"False\n"
        finally:
            await close_pools()

    asyncio.run(run())


def test_little_is_on_its_way_to_a_box_that_takes_nothing() -> None:
    async def run() -> None:
        told: list[bytes] = []

        async def tell(body: bytes) -> None:
            told.append(body)

        egress = Egress(tell)
        async with site() as big:
            await egress.set(parse([f"127.0.0.1:{big.port}"], field="allow"), NetLimits())
            for number in (b"1", b"2", b"3", b"4"):
                egress.on_event([number, b"open"])
                egress.on_event([number, b"data", get("127.0.0.1", big.port, "/9000000").encode()])
            size = -1
            while size != (size := sum(map(len, told))):
                await asyncio.sleep(0.1)
            assert CHANNEL_BYTES < size < CHANNEL_BYTES + 2 * PIECE
            egress.on_event([b"1", b"got", b"%d" % CHANNEL_BYTES])
            await asyncio.sleep(0.1)
            assert sum(map(len, told)) > size
            egress.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET / HTTP/1.1", 400),
        ("GET https://up.test/ HTTP/1.1", 400),
        ("GET http://user@up.test/ HTTP/1.1", 400),
        ("GET http://up.test:80:90/ HTTP/1.1", 400),
        ("GET http://up.test/ HTTP/2", 400),
        ("GET http://up.test\\@evil.test/ HTTP/1.1", 400),
        ("CONNECT up.test HTTP/1.1", 400),
        ("CONNECT up.test:443/x HTTP/1.1", 400),
        ("CONNECT [::1%lo]:443 HTTP/1.1", 400),
        ("POST http://up.test/ HTTP/1.1\r\nTransfer-Encoding: chunked", 411),
        ("POST http://up.test/ HTTP/1.1\r\nTransfer-Encoding : chunked", 400),
        ("POST http://up.test/ HTTP/1.1\r\nContent-Length: +5", 400),
        ("POST http://up.test/ HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 5", 400),
        ("GET http://up.test/ HTTP/1.1\r\nX: a\nHost: evil.test", 400),
        ("GET http://up.test/ HTTP/1.1\r\nX: a\r\n folded", 400),
    ],
)
def test_a_request_that_can_be_read_in_two_ways_is_refused(request_line: str, status: int) -> None:
    with pytest.raises(Refused) as caught:
        parse_request(f"{request_line}\r\n\r\n".encode())
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("https://pypi.org", "expected 'host'"),
        ("pypi.org:0", "expected a port from 1 to 65535"),
        ("pypi.org:70000", "expected a port"),
        ("PyPI.org", "in lower case"),
        ("*", "expected 'host'"),
        ("a.*.org", "expected 'host'"),
        ("10.0.0.1/8", "has host bits set"),
        ("2130706433", "expected 'host'"),
        ("127.1", "expected 'host'"),
        ("::ffff:10.0.0.0/104", "not wrapped in IPv6"),
        ("", "expected 'host'"),
        (5, "expected 'host'"),
    ],
)
def test_a_wrong_entry_is_an_error_that_names_it(entry: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"SandboxSpec\.network has ") as caught:
        SandboxSpec(network=(entry,))
    assert repr(entry) in str(caught.value)
    assert message in str(caught.value)


def test_a_bare_string_is_not_a_list() -> None:
    with pytest.raises(ValueError, match=r"SandboxSpec\.network = 'pypi\.org': expected a tuple"):
        SandboxSpec(network="pypi.org")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("entry", "reached", "missed"),
    [
        ("8.8.8.0/24", ["8.8.8.8:443", "8.8.8.8:80"], ["8.8.9.1:443", "8.8.8.8:22"]),
        ("0.0.0.0/0", ["8.8.8.8:443"], ["10.0.0.1:443", "169.254.169.254:80", "127.0.0.1:80", "0.0.0.0:80"]),
        ("10.0.0.0/8:5432", ["10.9.9.9:5432"], ["10.9.9.9:443", "192.168.0.1:5432"]),
        ("169.254.169.254", ["169.254.169.254:80", "[::ffff:169.254.169.254]:80"], ["169.254.169.253:80"]),
        (
            "::/0",
            ["[2a00::1]:443"],
            ["[::1]:443", "[fd00::1]:443", "[fe80::1]:80", "[64:ff9b::a00:1]:80", "8.8.8.8:80"],
        ),
        ("[fd00::/8]:80", ["[fd12::1]:80"], ["[fd12::1]:443", "[fe80::1]:80"]),
        ("2002::/16", ["[2002:a00:1::]:80"], ["[2001:0:a00:1::]:80"]),
    ],
)
def test_blocks(entry: str, reached: list[str], missed: list[str]) -> None:
    allowed = parse([entry], field="allow")
    assert [address for address in reached + missed if _reaches(allowed, address)] == reached


def _reaches(allowed: AllowList, target: str) -> bool:
    import ipaddress

    address, _, port = target.rpartition(":")
    return allowed.has_address(ipaddress.ip_address(address.strip("[]")), int(port), named=False)


def test_names() -> None:
    allowed = parse(["pypi.org", "*.pythonhosted.org:443", "db1:5432"], field="allow")
    for name, port in (("pypi.org", 80), ("pypi.org", 443), ("a.b.pythonhosted.org", 443), ("db1", 5432)):
        assert allowed.has_name(name, port)
    for name, port in (
        *(("pypi.org", 22), ("x.pypi.org", 443), ("xpypi.org", 443), ("pythonhosted.org", 443)),
        *(("evilpythonhosted.org", 443), ("a.pythonhosted.org", 80), (".pythonhosted.org", 443), ("db1", 443)),
    ):
        assert not allowed.has_name(name, port)


def test_the_list_is_part_of_the_spec_that_a_log_keeps(tmp_path: Path) -> None:
    spec = SandboxSpec(network=("pypi.org",))
    with contextlib.closing(TrajectoryLog.create(tmp_path / "log", creation(Process(), spec))) as log:
        assert spec_of(log) == spec


def test_a_box_on_the_hosts_network_has_no_list() -> None:
    async def run() -> None:
        async with LocalUnsafe(i_accept_that_model_written_code_runs_unisolated=True).open(
            SandboxSpec(network=("pypi.org",))
        ):
            raise AssertionError("opened")

    with pytest.raises(Unsupported, match=r"SandboxSpec\.network"):
        asyncio.run(run())


@process_box
def test_pip_downloads_a_package(substrate: Substrate) -> None:
    hosts = ("pypi.org", "files.pythonhosted.org")
    try:
        addresses = {entry[4][0] for host in hosts for entry in socket.getaddrinfo(host, 443)}
        for host in hosts:
            socket.create_connection((host, 443), timeout=5).close()
    except OSError as error:
        pytest.skip(f"PyPI cannot be reached from here: {error}")
    wheels = [
        *Path(ensurepip.__path__[0]).glob("_bundled/pip-*.whl"),
        *Path("/usr/share").glob("python-wheels/pip-*.whl"),
    ]
    if not wheels:
        pytest.skip("no pip to run in the box: neither ensurepip nor /usr/share/python-wheels has its wheel")

    async def test(box: AgentSandbox) -> None:
        await box.write("pip.whl", wheels[0].read_bytes())
        argv = ["python3", "pip.whl/pip", "download", "--no-deps", "--no-cache-dir", "six==1.17.0", "-d", "got"]
        env = {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        authorities = ssl.get_default_verify_paths().cafile
        if authorities:
            # Where the host reaches PyPI through a proxy with an authority of its own, so does the box.
            await box.write("ca.pem", Path(authorities).read_bytes())
            env["PIP_CERT"] = "ca.pem"
        result = await box.exec(argv, env=env, timeout_s=60)
        assert result.ok, result
        assert await box.list("got") == ["got/six-1.17.0-py2.py3-none-any.whl"]
        assert [(c.host, c.verdict) for c in await ended(box)] == [(host, "allowed") for host in hosts]

    # Addresses that are not public are named: some hosts reach PyPI through a proxy of their own network.
    in_box(substrate, test, *hosts, *(f"{address}:443" for address in addresses if ":" not in str(address)))
