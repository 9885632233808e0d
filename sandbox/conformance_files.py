"""Checks of files that change, lie or lead elsewhere while the host reads and writes them."""

from __future__ import annotations

import asyncio
import errno
import io
import tarfile
from collections.abc import Awaitable, Callable

from posttrain.protocols import Sandbox
from posttrain.types import ExecStatus
from sandbox.conformance_agent import agent_box
from sandbox.expectations import expect, python, raises, still_works

SWAPS = """
import os
os.mkdir("/tmp/outside", 0o777)
open("/tmp/outside/file", "wb").write(b"outside")
os.mkdir("d", 0o777)
open("d/file", "wb").write(b"inside")
open("ready", "w").close()
count = 0
while True:
    os.rename("d", "real")
    try:
        os.symlink("/tmp/outside", "d")
        os.unlink("d")
    except OSError:
        pass
    while os.path.exists("real"):
        try:
            os.rename("real", "d")
        except OSError:
            # A write has made it anew.
            count += 1
            os.rename("d", f"made-{count}")
"""
MAX_RACES = 2000


async def a_swapped_directory_leads_nowhere(box: Sandbox) -> None:
    """A directory that becomes a link, over and over, while files are read and written below it."""
    swapping = asyncio.create_task(python(box, SWAPS, timeout_s=30))
    outcomes = {"read": 0, "refused": 0}
    async with asyncio.timeout(10):
        while not await exists(box, "ready"):
            await asyncio.sleep(0.01)
    for _ in range(MAX_RACES):
        try:
            await box.write("d/new", b"x")
            data = await box.read("d/file")
        except OSError as error:
            # The moments in which it was a link, not those in which it was away.
            outcomes["refused"] += error.errno in (errno.ELOOP, errno.ENOTDIR)
            continue
        expect(data == b"inside", "a link was followed", data)
        outcomes["read"] += 1
        if min(outcomes.values()) >= 10:
            break
    swapping.cancel()
    await asyncio.wait({swapping})
    expect(min(outcomes.values()) > 0, "the race was never on", outcomes)
    left = await box.exec("ls -A /tmp/outside 2>/dev/null || find /tmp/outside -mindepth 1 -printf '%f\\n'")
    expect(left.stdout == b"file\n", "something was written through a link", left)


async def exists(box: Sandbox, path: str) -> bool:
    try:
        await box.read(path)
    except FileNotFoundError:
        return False
    return True


async def names_are_taken_as_they_are(sandbox: Sandbox) -> None:
    """Odd names are names; those that climb, start at the root or cannot exist are refused."""
    box = agent_box(sandbox)
    odd = ["a b", "new\nline", "\u00e9\u4e2d", "\udcff\udcfe", "-rf", "$(id)", "*", "\\", "'\"", "\x1b[2J", "x" * 255]
    for name in odd:
        await box.write(f"odd/{name}", name.encode("utf-8", "surrogateescape"))
        expect(await box.read(f"odd//./{name}") == name.encode("utf-8", "surrogateescape"), name)
    expect(await box.list("odd") == sorted(f"odd/{name}" for name in odd), "names differ")
    expect(set(await box.download("odd")) == {f"odd/{name}" for name in odd}, "names differ in a download")
    for path in ("//etc/passwd", "./../x", "odd/../../x", "odd/..", "..", "/", "./", "a\0b", "x" * 256):
        for refused in (box.read(path), box.write(path, b""), box.upload({path: b""})):
            await raises((OSError, ValueError), refused, path)
    await raises(OSError, box.write("\u00e9" * 200, b""), "a name of 400 bytes")


async def what_is_no_plain_file_is_not_read(box: Sandbox) -> None:
    script = "ln -s /dev/zero zero; ln -s /proc/self/mem mem; ln -s /proc/1/root root; mkfifo fifo; ln -s loop loop"
    await box.exec(script)
    await python(box, "import socket; socket.socket(socket.AF_UNIX).bind('socket')")
    for path in ("zero", "mem", "root/etc/passwd", "fifo", "loop", "loop/x", "socket"):
        await raises((OSError, ValueError), box.read(path), path)
    await still_works(box)


async def a_growing_file_is_read_up_to_a_cap(sandbox: Sandbox) -> None:
    box = agent_box(sandbox)
    grows = "import os\nfd = os.open('grows', os.O_CREAT | os.O_WRONLY)\nwhile True: os.write(fd, b'x' * 500)"
    growing = asyncio.create_task(python(box, grows, timeout_s=20))
    async with asyncio.timeout(15):
        while not growing.done():
            try:
                data = await box.read("grows", max_bytes=100_000)
            except FileNotFoundError:
                continue
            except ValueError:
                break
            expect(len(data) <= 100_000, len(data))
    await raises(ValueError, box.download(".", max_bytes=100_000), "a file that grows beyond the cap")
    growing.cancel()
    await asyncio.wait({growing})
    await still_works(box)


async def loops_and_crowds_are_listed_in_time(sandbox: Sandbox) -> None:
    box = agent_box(sandbox)
    await box.exec("mkdir -p t/u; ln -s .. t/u/up; ln -s . t/here; ln -s self t/self; ln t/u/../x y; echo x > t/f")
    expect(await box.download("t") == {"t/f": b"x\n"}, "a loop of links was walked")
    await python(box, "import os\nos.mkdir('crowd')\nfor i in range(10_001): os.mknod(f'crowd/{i}')", timeout_s=20)
    async with asyncio.timeout(10):
        await raises(ValueError, box.download("crowd"), "too many files")
        expect(len(await box.entries("crowd")) == 10_001, "entries")
    await still_works(box)


async def a_write_is_whole_or_not_at_all(box: Sandbox) -> None:
    await box.write("kept", b"old")
    await box.exec("mkdir full locked; echo x > locked/kept; chmod 555 locked; head -c 7500000 /dev/zero > filler")
    await raises(OSError, box.write("full", b"x"), "over a directory")
    await raises(PermissionError, box.write("locked/new", b"x"), "without permission")
    await raises(PermissionError, box.write("locked/kept", b"new"), "without permission")
    await raises(NotADirectoryError, box.write("kept/below", b"x"), "below a file")
    await raises(OSError, box.write("kept", bytes(4 << 20)), "on a full disk")
    expect(await box.read("kept") == b"old", "a failed write changed the file")
    expect(await box.list() == ["filler", "kept", "locked/kept"], await box.list())
    await box.exec("rm filler")
    await box.write("kept", b"new")
    expect(await box.read("kept") == b"new", "with room again")


async def links_keep_what_they_point_to(sandbox: Sandbox) -> None:
    """No write, upload or clean-up changes content, mode or owner of a link's target."""
    box = agent_box(sandbox)
    await box.exec("echo old > /tmp/victim; chmod 640 /tmp/victim; mkdir -m 750 /tmp/folder; echo x > /tmp/folder/x")
    described = "cd /tmp; find victim folder -printf '%p %m %U %s\\n'"
    before = await box.exec(described)
    await box.exec(
        "ln -s /tmp/victim link; ln /tmp/victim hard || true; ln -s /tmp/folder away; ln -s /tmp/none dangling"
    )
    for name in ("link", "hard", "dangling"):
        await box.write(name, b"mine")
        await box.upload(_executable(name))
    await raises(OSError, box.write("away/x", b"mine"), "below a link")
    # What a call leaves is deleted, and made accessible first where it has to be.
    await box.call(
        "import os; os.symlink('/tmp/folder', 'away'); os.mkdir('shut'); os.symlink('/tmp/victim', 'shut/v')"
    )
    await box.call("import os; os.symlink('/tmp/folder', '/tmp/away'); os.mkdir('shut'); os.chmod('shut', 0)")
    after = await box.exec(described)
    expect(before.stdout == after.stdout and before.stdout.count(b"\n") == 3, before, after)


def _executable(name: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.mode = 0o755
        archive.addfile(member)
    return buffer.getvalue()


async def archives_that_lie_are_refused(sandbox: Sandbox) -> None:
    """Names that only a header of a later standard reveals, more members than anybody needs, and bombs."""
    box = agent_box(sandbox)
    for headers in (
        {"path": "/etc/x"},
        {"path": "../x"},
        {"size": str(1 << 40)},
        {"GNU.sparse.realsize": str(1 << 40)},
    ):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
            member = tarfile.TarInfo("plain")
            member.pax_headers = dict(headers)
            archive.addfile(member)
        await raises(ValueError, box.upload(buffer.getvalue()), str(headers))
    for name in ("./../x", "a/./../../x", "a/" * 70 + "x"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
            archive.addfile(tarfile.TarInfo(name))
        await raises(ValueError, box.upload(buffer.getvalue()), name)
    header = tarfile.TarInfo("d")
    header.type = tarfile.DIRTYPE
    await raises(ValueError, box.upload(header.tobuf() * 20_000), "20,000 headers")
    expect(await box.list() == [], "something of a refused archive was written")
    bomb = await box.exec("head -c 50000000 /dev/zero | gzip -1 | gunzip > bomb || exit 1")
    expect(bomb.status is ExecStatus.DISK_FULL, bomb)
    await box.exec("rm bomb")
    await still_works(box)


FILE_CHECKS: tuple[Callable[[Sandbox], Awaitable[None]], ...] = (
    a_swapped_directory_leads_nowhere,
    names_are_taken_as_they_are,
    what_is_no_plain_file_is_not_read,
    a_growing_file_is_read_up_to_a_cap,
    loops_and_crowds_are_listed_in_time,
    a_write_is_whole_or_not_at_all,
    links_keep_what_they_point_to,
    archives_that_lie_are_refused,
)
