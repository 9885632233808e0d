from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.errors import SandboxError, SandboxLost, Unsupported
from posttrain.types import ExecStatus, SandboxSpec
from sandbox import layers
from sandbox.edge import serve_boxes
from sandbox.edge_server import SOCKET, serving
from sandbox.process import Process
from sandbox.sync import Box, SandboxClient
from tests.boxes import require

COUNT = "echo x >> counter; cat counter"


@pytest.fixture(autouse=True)
def can_isolate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require(Process())
    monkeypatch.setattr(layers, "_folder", lambda: tmp_path / "layers")


def use_all(box: Box) -> None:
    """What every box can do, whoever keeps it."""
    assert box.exec(["cat"], stdin=b"in").stdout == b"in"
    box.write("d/a", b"1", mode=0o600)
    assert (box.read("d/a"), box.list(), [entry.path for entry in box.entries()]) == (b"1", ["d/a"], ["d", "d/a"])
    box.upload({"b": b"2"}, "d")
    assert box.download("d") == {"d/a": b"1", "d/b": b"2"}
    assert box.call("print(1 + 1)").stdout == b"2\n"
    with pytest.raises(FileNotFoundError):
        box.read("absent")
    who = [box.exec("id -u", user=user).stdout for user in ("alice", "bob", "alice")]
    with box.session(user="alice") as shell, box.spawn("id -u", user="bob") as job:
        who += [shell.run("id -u").stdout, job.wait().stdout]
    assert who == [who[0], who[1], who[0], who[0], who[1]]
    assert len({*who, box.exec("id -u").stdout}) == 3
    box.exec("rm -r .home-alice", user="alice")
    box.exec("rm -r .home-bob", user="bob")
    for name in ("root", "0"):
        with pytest.raises(ValueError, match=f"user = '{name}'"):
            box.exec("true", user=name)
    with box.session() as shell:
        shell.run("cd d; X=kept")
        assert shell.run("pwd; echo $X").stdout == b"/work/d\nkept\n"
        assert shell.run("exit 3").exit_code == 3
        assert shell.ended
        with pytest.raises(EOFError):
            shell.run("true")
    job = box.spawn("echo one; read x; echo $x >&2; exit 4", tty=None)
    output = iter(job)
    assert next(output).data == b"one\n"
    job.write_stdin(b"two\n", eof=True)
    assert [(chunk.stream, chunk.data) for chunk in output] == [("stderr", b"two\n")]
    assert job.wait().exit_code == 4
    with box.spawn("sleep 60"):
        box.pause()
        box.resume()
    snapshot = box.snapshot()
    assert (snapshot.num_files, snapshot.num_bytes) == (2, 2)
    kids = box.fork(2)
    for kid in kids:
        kid.write("d/b", b"3")
        assert kid.read("d/a") == b"1"
        kid.close()
        kid.close()
    assert box.read("d/b") == b"2"


def test_a_box_of_this_process_does_all_of_it_and_goes_with_its_client() -> None:
    with SandboxClient() as client:
        assert client.capabilities("process")["snapshot"] == "fs"
        with client.create(SandboxSpec(), substrate="process") as box:
            use_all(box)
            snapshot = box.snapshot()
        with pytest.raises(SandboxLost):
            box.exec("true")
        left_open = client.restore(snapshot, SandboxSpec(files={"more": b""}))
        assert left_open.list() == ["d/a", "d/b", "more"]
        with pytest.raises(Unsupported, match="give SandboxClient the address of an edge"):
            client.attach("r")
        with pytest.raises(AttributeError, match="not for other threads"):
            left_open.kill()
    with pytest.raises(SandboxError, match="was closed"):
        left_open.list()
    client.close()


def test_threads_share_a_client() -> None:
    with SandboxClient() as client, client.create() as box:
        started, results = time.monotonic(), []

        def run(number: int) -> None:
            results.append(box.exec(f"sleep 0.5; echo {number}").stdout)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == [b"0\n", b"1\n", b"2\n", b"3\n"]
        assert time.monotonic() - started < 1.9, "one after the other"
        assert box.exec("sleep 5", timeout_s=0.1).status is ExecStatus.TIMEOUT


@pytest.fixture
def address(tmp_path: Path) -> Iterator[Path]:
    """The socket of an edge, served by another thread."""
    folder = Path("/tmp") / f"edge-{uuid.uuid4().hex[:8]}"
    folder.symlink_to(tmp_path)
    loop, ready = asyncio.new_event_loop(), threading.Event()
    stopped = asyncio.Event()

    async def serve() -> None:
        async with serve_boxes(folder, Process()) as edge, serving(edge, folder / SOCKET):
            ready.set()
            await stopped.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(20)
    yield folder / SOCKET
    loop.call_soon_threadsafe(stopped.set)
    thread.join()
    loop.close()
    folder.unlink()


def test_a_box_at_an_edge_does_all_of_it_too(address: Path) -> None:
    with SandboxClient(address) as client, client.create() as box:
        use_all(box)


def test_a_box_at_an_edge_is_found_again(address: Path) -> None:
    with SandboxClient(address) as client:
        box = client.create(SandboxSpec(), rollout_id="r")
        assert box.exec(COUNT).stdout == b"x\n"
    with SandboxClient(address) as client:
        again = client.attach("r")
        assert again.exec(COUNT).stdout == b"x\n"
        assert again.exec(COUNT).stdout == b"x\nx\n"
        with pytest.raises(KeyError):
            client.attach("another")
