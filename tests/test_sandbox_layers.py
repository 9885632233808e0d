from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.errors import SandboxError, Unsupported
from posttrain.protocols import Substrate
from posttrain.types import SandboxSpec
from sandbox import layers
from sandbox.client import AgentSandbox
from sandbox.container import Container
from sandbox.function import Function
from sandbox.gvisor import Gvisor
from sandbox.layers import Draft, Node, commit, put, split
from sandbox.local import LocalUnsafe
from sandbox.log import TrajectoryLog
from sandbox.pool import close_pools
from sandbox.process import Process
from sandbox.recorded import RecordedSandbox, Recorder, creation, fork_at, replay
from tests.boxes import require

SPEC = SandboxSpec(memory_mb=64, disk_mb=8, max_processes=32)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(layers, "_folder", lambda: tmp_path / "layers")
    return tmp_path / "layers"


@pytest.fixture
def substrate(request: pytest.FixtureRequest) -> Substrate:
    return require(getattr(request, "param", Process()))


EVERYWHERE = pytest.mark.parametrize(
    "substrate",
    [Process(), pytest.param(Container(), marks=pytest.mark.docker), Gvisor(), Function(warm=1)],
    indirect=True,
    ids=["process", "container", "gvisor", "function"],
)


def archive(*members: tarfile.TarInfo, data: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname, found.mode = kind, link, 0o750 if kind == tarfile.DIRTYPE else 0o640
    return found


def content(digest: str) -> list[tuple[Node, bytes]]:
    return [(node, b"".join(pieces)) for node, pieces in layers.members(layers.opened(digest))]


# The store.


def test_a_layer_is_named_by_its_content_and_kept_once(folder: Path) -> None:
    whole = archive(member("d", tarfile.DIRTYPE), member("d/a"), member("l", tarfile.SYMTYPE, "/etc"), data=b"1234")
    first, second = put(whole), put(whole)
    assert first == second
    assert (first.num_files, first.num_bytes) == (1, 4)
    (path,) = folder.iterdir()
    assert path.name == f"{hashlib.sha256(path.read_bytes()).hexdigest()}.tar" == f"{first.digest}.tar"
    assert content(first.digest[:16]) == [
        (Node(path="d", kind="directory", mode=0o750), b""),
        (Node(path="d/a", kind="file", mode=0o640, size=4), b"1234"),
        (Node(path="l", kind="link", target="/etc"), b""),
    ]


def test_names_and_times_survive(folder: Path) -> None:
    nodes = [
        Node(path="x" * 120 + "/" + "y" * 200, kind="file", mode=0o755, modified_ns=1_700_000_000_123_456_789, size=3),
        Node(path="gr\xfc\xdfe \udcff", kind="link", target="\udcfe/" + "t" * 300),
    ]
    with Draft() as draft:
        draft.add(nodes[0])
        draft.feed(b"ab")
        draft.feed(b"c")
        draft.add(nodes[1])
        kept = draft.keep()
    assert content(kept.digest) == [(nodes[0], b"abc"), (nodes[1], b"")]


def test_only_users_of_the_box_own_what_is_in_a_layer(folder: Path) -> None:
    nodes = [
        Node(path="zoe", kind="user"),
        Node(path="alice", kind="user"),
        Node(path="d", kind="directory", mode=0o700, owner="alice"),
        Node(path="l", kind="link", target="d", owner="zoe"),
        Node(path="x", kind="directory", mode=0o700),
    ]
    with Draft() as draft:
        for node in nodes:
            draft.add(node)
        kept = draft.keep()
    assert [node for node, _ in content(kept.digest)] == nodes
    packed = member("d", tarfile.DIRTYPE)
    packed.uname = "alice"
    assert [node.owner for node, _ in content(put(archive(packed)).digest)] == [""]
    with Draft() as draft:
        draft.add(Node(path="alice", kind="user"))
        alone = draft.keep()
    assert [node.kind for node, _ in content(alone.digest)] == ["user"]
    for name, data in (("root/x", b""), ("Alice", b""), ("a", b"1")):
        bad = member(name)
        bad.type, bad.size = layers.USER_TYPE, len(data)
        with pytest.raises(ValueError, match="expected a file"):
            put(bad.tobuf() + data.ljust(512 * bool(data), b"\0") + bytes(1024))


@pytest.mark.parametrize(
    "bad",
    [
        archive(member("/etc/passwd")),
        archive(member("a/../../b")),
        archive(member("a", tarfile.CHRTYPE)),
        archive(member("a", tarfile.FIFOTYPE)),
        archive(member("a"), member("b", tarfile.LNKTYPE, "a")),
        archive(member("."), data=b"1"),
        b"no archive" * 100,
    ],
    ids=["absolute", "climbs", "device", "fifo", "hard link", "no name", "no archive"],
)
def test_what_may_not_be_in_a_layer_is_refused(bad: bytes, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a (file|path)|not an uncompressed tar"):
        put(bad)
    assert list(folder.iterdir()) == []


def test_caps_and_sizes_hold(folder: Path) -> None:
    for caps in ({"max_entries": 1}, {"max_bytes": 5}):
        with Draft(**caps) as draft:
            draft.add(Node(path="a", kind="file", size=3))
            draft.feed(b"123")
            with pytest.raises(ValueError, match="max_entries or max_bytes"):
                draft.add(Node(path="b", kind="file", size=3))
    with Draft() as draft:
        draft.add(Node(path="a", kind="file", size=3))
        draft.feed(b"12")
        for attempt in (draft.keep, lambda: draft.add(Node(path="b", kind="directory"))):
            with pytest.raises(ValueError, match="lacks 1 bytes"):
                attempt()
        with pytest.raises(ValueError, match="more content than its size"):
            draft.feed(b"34")
    assert list(folder.iterdir()) == [], "what is not kept is deleted"


def test_a_layer_that_is_not_what_it_is_named_for_is_not_used(folder: Path) -> None:
    kept = put(archive(member("a"), data=b"1234"))
    path = folder / f"{kept.digest}.tar"
    path.write_bytes(path.read_bytes().replace(b"1234", b"1235"))
    with pytest.raises(SandboxError, match="not the bytes it is named for"):
        layers.opened(kept.digest)
    path.unlink()
    with pytest.raises(SandboxError, match=r"no layer .* take the snapshot again"):
        layers.opened(kept.digest)


def test_an_image_is_a_base_and_layers() -> None:
    digest = "0123456789abcdef" * 4
    assert split("default") == ("default", ())
    assert split(commit("default", digest)) == ("default", ("0123456789abcdef",))
    assert split(commit(f"py311+{digest}", digest)) == ("py311", ("0123456789abcdef",))
    assert split(f"default+{digest}+{digest[:16]}") == ("default", (digest, digest[:16]))
    for bad in ("default+", "+0123456789abcdef", "default+012", "default+../../etc/passwd"):
        with pytest.raises(ValueError, match=r"SandboxSpec\.image = .* expected the name of an image"):
            split(bad)


# Boxes.


FILL = """
mkdir -p d/e empty locked; echo hi > d/e/f; printf '#!/bin/sh\\necho ran\\n' > run; chmod 755 run
chmod 600 d/e/f; ln -s /etc/passwd link; ln -s ../nowhere d/dangling; touch -d '2020-02-03 04:05:06.789' old
echo x > locked/in; chmod 500 locked; : > none; head -c 3000000 /dev/urandom > big; sha256sum big > sum
"""
DESCRIBE = """
import os, stat
for folder, folders, files in os.walk("."):
    for name in sorted(folders + files):
        path = os.path.join(folder, name)
        s = os.lstat(path)
        kind = stat.S_IFMT(s.st_mode)
        print(path, oct(kind), 0 if kind == stat.S_IFLNK else oct(s.st_mode),
              s.st_mtime_ns if kind == stat.S_IFREG else 0, s.st_uid == os.getuid(),
              os.readlink(path) if kind == stat.S_IFLNK else "")
"""


async def describe(box: AgentSandbox) -> list[str]:
    result = await box.exec(["python3", "-I", "-S", "-c", DESCRIBE])
    assert result.ok, result
    return sorted(result.stdout.decode().splitlines())


@EVERYWHERE
def test_a_restored_box_is_the_same_and_apart(substrate: Substrate) -> None:
    async def play() -> None:
        async with substrate.open(SPEC) as box:
            assert isinstance(box, AgentSandbox)
            assert substrate.capabilities()["snapshot"] == "fs"
            assert (await box.exec(FILL)).ok
            before = await describe(box)
            snapshot = await box.snapshot()
            assert await box.snapshot() == snapshot, "the same content has the same name"
            await box.exec("echo changed > d/e/f; rm run")
            spec = replace(SPEC, image=snapshot.image, files={"new": b"1", "none": b"2"})
            async with substrate.open(spec) as restored:
                assert isinstance(restored, AgentSandbox)
                assert (await restored.exec("./run; cat d/e/f; sha256sum -c sum")).stdout == b"ran\nhi\nbig: OK\n"
                assert (await restored.read("new"), await restored.read("none")) == (b"1", b"2")
                await restored.exec("rm new; : > none; touch -d @0 none")
                after = [line for line in await describe(restored) if "./none" not in line]
                assert after == [line for line in before if "./none" not in line]
                assert await box.list() != await restored.list()
        await close_pools()

    asyncio.run(play())


def test_layers_are_laid_one_over_the_other_and_links_are_not_followed(substrate: Substrate) -> None:
    first = put(archive(member("d", tarfile.DIRTYPE), member("d/a"), member("both"), data=b"first"))
    second = put(archive(member("both", tarfile.SYMTYPE, "/etc/passwd"), member("d/b"), data=b"second"))
    through = put(archive(member("both"), data=b"third"))
    below = put(archive(member("both/x"), data=b"fourth"))

    async def play() -> None:
        image = f"default+{first.digest[:16]}+{second.digest[:16]}"
        async with substrate.open(replace(SPEC, image=image)) as box:
            assert isinstance(box, AgentSandbox)
            assert (await box.exec("readlink both; cat d/a d/b")).stdout == b"/etc/passwd\nfirstsecond"
            own = await box.snapshot()
            assert own.image == f"default+{own.digest[:16]}", "a snapshot holds the layers it was made from"
        async with substrate.open(replace(SPEC, image=f"{image}+{through.digest[:16]}")) as box:
            assert await box.read("both") == b"third"
        with pytest.raises(SandboxError, match="a layer does not fit"):
            async with substrate.open(replace(SPEC, image=f"{image}+{below.digest[:16]}")):
                raise AssertionError("a link was followed")
        for image, message in (
            ("default+" + "0" * 16, "no layer '0000"),
            ("other+" + first.digest, "no image 'other'"),
        ):
            with pytest.raises(SandboxError, match=message):
                async with substrate.open(replace(SPEC, image=image)):
                    raise AssertionError(image)
        local = LocalUnsafe(i_accept_that_model_written_code_runs_unisolated=True)
        with pytest.raises(Unsupported, match="has no layers"):
            async with local.open(replace(SPEC, image=image)):
                raise AssertionError("a local box had layers")

    asyncio.run(play())


@EVERYWHERE
def test_what_no_snapshot_keeps_is_refused_by_name(substrate: Substrate, folder: Path) -> None:
    makes = {
        "mkfifo d/pipe": "d/pipe",
        "python3 -c 'import socket; socket.socket(1).bind(\"d/s\")'": "d/s",
        # gVisor shows no holes, but what would fill them does not fit.
        "truncate -s 5M d/holes; cp --sparse=always d/holes d/more": "d/(holes|more)",
    }

    async def play() -> None:
        async with substrate.open(SPEC) as box:
            assert isinstance(box, AgentSandbox)
            for command, name in makes.items():
                assert (await box.exec(f"mkdir d; {command}")).ok, command
                with pytest.raises(ValueError, match=f"^{name}: "):
                    await box.snapshot()
                await box.exec("rm -r d")
            await box.exec("echo x > secret; chmod 0 secret")
            with pytest.raises(PermissionError, match="secret: Permission denied"):
                await box.snapshot()
            await box.exec("rm -f secret; mkdir -p $(seq -s / 1 80)")
            with pytest.raises(ValueError, match="deeper than"):
                await box.snapshot()
            await box.exec("rm -r 1; echo ok > ok")
            assert (await box.snapshot()).num_files == 1
        await close_pools()

    asyncio.run(play())
    assert len(list(folder.iterdir())) == 1


def test_a_snapshot_holds_what_other_uids_keep_to_themselves(substrate: Substrate) -> None:
    async def play() -> None:
        async with substrate.open(SPEC) as box:
            assert isinstance(box, AgentSandbox)
            async with await box.session() as shell:
                beside = asyncio.create_task(box.exec("sleep 0.3"))
                await shell.run("umask 077; mkdir own; echo mine > own/file")
                snapshot = await box.snapshot()
                await beside
            async with substrate.open(replace(SPEC, image=snapshot.image)) as restored:
                assert (await restored.exec("cat own/file; stat -c %a own own/file")).stdout == b"mine\n700\n600\n"

    asyncio.run(play())


@EVERYWHERE
def test_a_snapshot_of_files_that_are_being_written_is_whole(substrate: Substrate, folder: Path) -> None:
    program = """
import os
n = 0
while True:
    n += 1
    with open(f"grow{n % 5}", "ab" if n // 5 % 40 else "wb") as f:
        f.write(b"x" * 5000)
    os.makedirs(f"dir{n % 7}", exist_ok=True)
    with open(f"dir{n % 7}/f", "w") as f:
        f.write("y" * (n % 3000))
    os.truncate(f"dir{n % 7}/f", n % 2000)
    if n % 3 == 0:
        os.unlink(f"dir{n % 7}/f"); os.rmdir(f"dir{n % 7}")
"""

    async def play() -> None:
        async with substrate.open(SPEC) as box:
            assert isinstance(box, AgentSandbox)
            async with await box.spawn(["python3", "-I", "-S", "-c", program]):
                await asyncio.sleep(0.3)
                snapshots = []
                while len(snapshots) < 8:
                    # A file that was just cut short and made longer has a hole for a moment, which is refused.
                    with contextlib.suppress(ValueError):
                        snapshots.append(await box.snapshot())
            assert len({snapshot.digest for snapshot in snapshots}) > 1, "nothing was written, so this proves nothing"
            for snapshot in snapshots:
                sizes = [(node.size, len(data)) for node, data in content(snapshot.digest)]
                assert all(size == length for size, length in sizes)
                assert sum(length for _, length in sizes) == snapshot.num_bytes
            assert (await box.exec("echo alive")).ok
        await close_pools()

    asyncio.run(play())
    assert not [path for path in folder.iterdir() if path.name.startswith(layers.PARTIAL)]


# Going on from a snapshot.


def test_a_fork_begins_at_the_last_snapshot_that_is_all_of_the_box(substrate: Substrate, tmp_path: Path) -> None:
    async def play() -> None:
        async with substrate.open(SPEC) as box:
            log = TrajectoryLog.create(tmp_path / "one", creation(substrate, SPEC))
            recorded = RecordedSandbox(Recorder(box, log))
            # Not the same when it is done again, so that what was done again can be told from what was kept.
            await recorded.exec("head -c 16 /dev/urandom | sha256sum > a; cat a")
            await recorded.set_net(["example.org:443"])
            await recorded.snapshot()
            await recorded.exec("echo b > b; cat a")
            shell = await recorded.session()
            await shell.run("cd /tmp")
            open_shell = await recorded.snapshot()
            await shell.close()
            await recorded.exec("cat a b; echo c > c")
            slow = asyncio.create_task(recorded.exec("sleep 0.2"))
            await asyncio.sleep(0)
            busy = await recorded.snapshot()
            await slow
            end = len(log) - 1
            kept = await recorded.read("a")
        assert [record.data["digest"] for record in log.snapshots][1:] == [open_shell.digest, busy.digest]
        clean = log.snapshots[0].data["intent"]

        async with fork_at(log, end, substrate=substrate, folder=tmp_path / "two") as (fork, report):
            assert (report.begun_at, report.left_out, report.differences) == (clean, [], [])
            assert report.num_replayed == 8
            assert await fork.read("a") == kept
            assert await fork.list() == ["a", "b", "c"]
            assert (await fork.exec("echo ${HTTPS_PROXY:+set}")).stdout == b"set\n"
            # Whoever begins anew on the fork is answered from the first call on.
            again = RecordedSandbox(fork.recorder)
            assert (await again.exec("head -c 16 /dev/urandom | sha256sum > a; cat a")).stdout == kept
            await again.set_net(["example.org:443"])
            assert (await again.snapshot()).digest == log.snapshots[0].data["digest"]
        # The fork's own log is as good a beginning.
        forked = TrajectoryLog.open(tmp_path / "two")
        async with fork_at(forked, len(forked) - 1, substrate=substrate, folder=tmp_path / "three") as (fork, report):
            assert (report.begun_at > 0, report.differences) == (True, [])
            assert await fork.read("a") == kept
        assert (await replay(log, substrate, upto=clean)).num_replayed == 0
        whole = await replay(log, substrate, whole=True, upto=clean)
        assert (whole.begun_at, whole.num_replayed, [found.part for found in whole.differences]) == (0, 3, ["stdout"])
        async with fork_at(log, 1, substrate=substrate, folder=tmp_path / "four") as (fork, report):
            assert report.begun_at == 0, "the snapshot came later"
        for path in (tmp_path / "layers").iterdir():
            path.unlink()
        report = await replay(log, substrate, upto=clean + 3)
        assert (report.begun_at, report.ok) == (0, False), "without its layer a snapshot is no beginning"

    asyncio.run(play())


def test_taking_a_snapshot_that_fails_leaves_nothing(substrate: Substrate, folder: Path) -> None:
    async def play(attempt: Callable[[AgentSandbox], object]) -> None:
        async with substrate.open(SPEC) as box:
            assert isinstance(box, AgentSandbox)
            await box.exec("head -c 2000000 /dev/zero | tr '\\0' x > big")
            taking = asyncio.create_task(box.snapshot())
            await asyncio.sleep(0.002)
            attempt(box)
            taking.cancel()
            await asyncio.wait({taking})

    asyncio.run(play(lambda box: None))
    asyncio.run(play(lambda box: box.kill()))
    assert not [path for path in folder.glob("*") if path.name.startswith(layers.PARTIAL)]
