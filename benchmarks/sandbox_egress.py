"""What a box's traffic does to its commands: the latency of ``true`` while connections of the box carry data.

``python -m benchmarks.sandbox_egress [process|container|gvisor]...`` prints p50, p95 and the worst in milliseconds,
idle and under each load, and the load's throughput. The server, the proxy and the box share this machine. The first
load is a busy loop without traffic, since a box's commands share its processors.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time

from posttrain.types import SandboxSpec
from sandbox.client import AgentSandbox
from sandbox.conformance import find_substrate

NUM_COMMANDS = 100
CLIENT = """
import socket, sys, threading
kind, num, proxy, target = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
def run():
    made = socket.create_connection(("127.0.0.1", proxy))
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    made.sendall(f"CONNECT {target} HTTP/1.1\\r\\n\\r\\n".encode())
    made.recv(100)
    made.sendall(kind[:1].encode())
    while kind == "spin": pass
    while kind == "down" and made.recv(1 << 20): pass
    while kind == "up": made.sendall(bytes(1 << 20))
    while kind == "tiny": made.send(b"x")
for _ in range(num): threading.Thread(target=run).start()
"""
LOADS = (
    ("a busy loop", "spin", 1),
    ("one download", "down", 1),
    ("one upload", "up", 1),
    ("32 downloads", "down", 32),
    ("one-byte writes", "tiny", 1),
)


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        if await reader.read(1) == b"d":
            while True:
                writer.write(bytes(1 << 16))
                await writer.drain()
        while await reader.read(1 << 16):
            pass


async def latency(box: AgentSandbox) -> str:
    taken = []
    for _ in range(NUM_COMMANDS):
        started = time.perf_counter()
        await box.exec(["true"])
        taken.append(1e3 * (time.perf_counter() - started))
    taken.sort()
    return f"{taken[NUM_COMMANDS // 2]:8.2f} {taken[NUM_COMMANDS * 95 // 100]:8.2f} {taken[-1]:8.2f}"


def moved(box: AgentSandbox) -> int:
    return sum(connection.sent + connection.received for connection in box.connections())


async def measure(name: str) -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with find_substrate(name).open(SandboxSpec(network=(target,))) as box:
        assert isinstance(box, AgentSandbox)
        proxy = (await box.exec("echo ${http_proxy##*:}")).stdout.decode().strip()
        print(f"{name:10} {'idle':18} {await latency(box)}")
        for title, kind, num in LOADS:
            argv = ["python3", "-I", "-S", "-c", CLIENT, kind, str(num), proxy, target]
            async with await box.spawn(argv):
                await asyncio.sleep(0.5)
                before, started = moved(box), time.perf_counter()
                line = await latency(box)
                rate = (moved(box) - before) / (time.perf_counter() - started) / 1e6
            print(f"{name:10} {title:18} {line} {rate:10.2f} MB/s")


if __name__ == "__main__":
    print(f"{'':29} {'p50 ms':>8} {'p95 ms':>8} {'max ms':>8}")
    for each in sys.argv[1:] or ("process", "container", "gvisor"):
        asyncio.run(measure(each))
