"""Checks of what a box driven by the agent can do beyond the protocol. Other boxes skip them."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import Awaitable, Callable
from unittest import SkipTest

from posttrain.protocols import Sandbox
from sandbox.client import AgentSandbox
from sandbox.expectations import expect, raises


def agent_box(box: Sandbox) -> AgentSandbox:
    if not isinstance(box, AgentSandbox):
        raise SkipTest(f"{type(box).__name__} is not driven by the agent")
    return box


async def a_named_command_runs_once(sandbox: Sandbox) -> None:
    box = agent_box(sandbox)
    count = "echo x >> log; wc -l < log"
    first = await box.exec(count, op_id="a")
    expect(await box.exec(count, op_id="a") == first == await box.result_of("a"), "a retry ran it again")
    slow = asyncio.create_task(box.exec(f"sleep 0.4; {count}", op_id="b"))
    await asyncio.sleep(0.1)
    late = await asyncio.gather(box.result_of("b"), box.exec(f"sleep 0.4; {count}", op_id="b"))
    expect([result.stdout for result in (await slow, *late)] == [b"2\n"] * 3, late)
    await box.acknowledge("a")
    await raises(KeyError, box.result_of("a"), "acknowledged")
    expect((await box.exec(count, op_id="a")).stdout == b"3\n", "an acknowledged name is free again")


async def trees_go_in_and_out(sandbox: Sandbox) -> None:
    box = agent_box(sandbox)
    files = {f"d{i % 5}/f{i}": bytes([i]) * i * 100 for i in range(60)}
    await box.upload(files, "in")
    expect(await box.download("in") == {f"in/{path}": data for path, data in files.items()}, "files differ")
    expect(await box.download("in/d1/f1") == {"in/d1/f1": files["d1/f1"]}, "one file")
    archive = await box.download_tar("in")
    await box.upload(archive, "again")
    expect((await box.exec("diff -r in again/in")).ok, "an archive came back otherwise")
    await box.upload(_archive(_member("run", b"#!/bin/sh\necho ran", mode=0o755)))
    expect((await box.exec("./run")).stdout == b"ran\n", "an executable lost its permission")
    await box.exec("rm -r in/d*; ln -s /etc/passwd in/link; mkfifo in/pipe; ln -s .. in/up; echo x > in/x")
    expect(await box.download("in") == {"in/x": b"x\n"}, await box.download("in"))
    kinds = {entry.path: (entry.kind, entry.size) for entry in await box.entries("in")}
    expect((kinds["in/x"], kinds["in/link"][0], kinds["in/pipe"][0]) == (("file", 2), "link", "other"), kinds)
    await box.exec("ln -s in away; truncate -s 5M sparse; seq 1 99 > many; mkdir -p $(seq -s / 1 80)")
    await raises(OSError, box.download("away"), "a link as the path")
    few = box.download("sparse", max_bytes=1 << 20), box.download("many", max_bytes=10)
    for refused in (*few, box.download("in", max_entries=1), box.download("1")):
        await raises(ValueError, refused, "beyond a cap")
    expect(await box.read("many", offset=2, max_bytes=4) == b"2\n3\n", "a part of a file")
    expect(await box.read("many", offset=9999) == b"", "beyond the end")


def _member(name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, link: str = "") -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.mode, member.linkname = len(data), kind, mode, link
    padding = bytes(-len(data) % tarfile.BLOCKSIZE)
    return member.tobuf(tarfile.GNU_FORMAT) + data + padding


def _archive(*members: bytes) -> bytes:
    return b"".join(members) + bytes(2 * tarfile.BLOCKSIZE)


async def bad_archives_are_refused(sandbox: Sandbox) -> None:
    box = agent_box(sandbox)
    good = _member("good", b"x")
    compressed = io.BytesIO()
    with tarfile.open(fileobj=compressed, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    bad = {
        "absolute": _archive(good, _member("/etc/passwd", b"x")),
        "climbs": _archive(good, _member("a/../../x", b"x")),
        "symbolic link": _archive(good, _member("l", kind=tarfile.SYMTYPE, link="/etc")),
        "hard link": _archive(good, _member("l", kind=tarfile.LNKTYPE, link="good")),
        "device": _archive(good, _member("d", kind=tarfile.CHRTYPE)),
        "fifo": _archive(good, _member("p", kind=tarfile.FIFOTYPE)),
        "setuid": _archive(good, _member("s", b"x", mode=0o4755)),
        "twice": _archive(good, good),
        "torn": (good + _member("t", b"x" * 600))[:-700],
        "compressed": compressed.getvalue(),
        "deep": _archive(_member("/".join(["d"] * 80), b"x")),
        "no archive": b"x" * 2000,
    }
    for what, data in bad.items():
        await raises(ValueError, box.upload(data), what)
    await raises(ValueError, box.upload(_archive(*(_member(f"f{i}") for i in range(9))), max_entries=8), "many")
    await raises(ValueError, box.upload({"a": bytes(100)}, max_bytes=99), "big")
    expect(await box.list() == [], "something of a refused archive was written")
    await box.exec("ln -s /tmp away; mkdir dir")
    await raises(OSError, box.upload({"away/x": b"x"}), "through a link")
    await raises(OSError, box.upload({"dir": b"x"}), "over a directory")


AGENT_CHECKS: tuple[Callable[[Sandbox], Awaitable[None]], ...] = (
    a_named_command_runs_once,
    trees_go_in_and_out,
    bad_archives_are_refused,
)
