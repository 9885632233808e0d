from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from posttrain.errors import RecipeError, SandboxUnavailable, Unsupported
from posttrain.types import ExecStatus, SandboxSpec
from sandbox import agent
from sandbox.client import check_argv, check_env, check_path
from sandbox.images import build
from sandbox.local import LocalUnsafe
from sandbox.process import Process
from tests.boxes import require


def test_local_must_be_asked_for() -> None:
    with pytest.raises(RecipeError, match="i_accept_that_model_written_code_runs_unisolated"):
        LocalUnsafe()


def test_local_runs_reads_writes_and_times_out() -> None:
    async def play() -> None:
        async with LocalUnsafe(True).open(SandboxSpec(files={"a/b": b"12"})) as box:
            assert await box.read("a/b") == b"12"
            assert await box.list() == ["a/b"]
            result = await box.exec("cat a/b; cat; exit 4", stdin=b"34")
            assert (result.exit_code, result.stdout) == (4, b"1234")
            late = await box.exec("echo begun; sleep 30 & sleep 30", timeout_s=0.5)
            assert (late.status, late.stdout) == (ExecStatus.TIMEOUT, b"begun\n")
            assert (await box.exec(["yes"], max_output=10)).status is ExecStatus.OUTPUT_LIMIT
            assert (await box.exec(["no-such-program"])).exit_code == 127
            with pytest.raises(ValueError, match="max_bytes=1"):
                await box.read("a/b", max_bytes=1)
            with pytest.raises(Unsupported, match="user = 'alice'"):
                await box.exec("true", user="alice")

    asyncio.run(play())


def test_a_missing_binary_is_named() -> None:
    with pytest.raises(SandboxUnavailable, match="apt-get install bubblewrap"):
        Process(binary="no-such-bwrap").check()


def test_process_without_an_image_uses_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require(Process())
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    assert Process().capabilities()["image"] == "host"

    async def play() -> None:
        async with Process().open(SandboxSpec()) as box:
            result = await box.exec("python3 -c 'print(6 * 7)'; ls /root /home /etc/shadow")
            assert result.stdout == b"42\n"

    asyncio.run(play())


@pytest.mark.parametrize("path", ["/a", "../a", "a/../../b", "", ".", "a\0", "x" * 256])
def test_bad_paths_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="relative to the workdir"):
        check_path(path)


def test_bad_commands_and_environments_are_refused() -> None:
    for command in ([], [""], "a\0b"):
        with pytest.raises(ValueError, match="command"):
            check_argv(command)
    for env in ({"a=b": "c"}, {"": "c"}, {"a": "\0"}):
        with pytest.raises(ValueError, match="env"):
            check_env(env)


@pytest.mark.parametrize("cap", [0, 1, 7, 100, 10_000])
def test_capture_keeps_head_and_tail(cap: int) -> None:
    data = bytes(i % 251 for i in range(300_000))
    capture = agent.Capture(cap)
    for start in range(0, len(data), 999):
        capture.feed(data[start : start + 999])
    value = capture.value()
    head, tail = data[: cap - cap // 2], data[len(data) - cap // 2 :]
    assert capture.dropped == len(data) - cap
    assert value == head + b"\n[... %d bytes left out ...]\n" % (len(data) - cap) + tail
    short = agent.Capture(10)
    short.feed(b"0123456789")
    assert (short.value(), short.dropped) == (b"0123456789", 0)


def test_frames_round_trip_and_reject_torn_ones() -> None:
    body = agent.pack(b"\0\xff", "text", 12, b"")
    assert agent.unpack(body) == [b"\0\xff", b"text", b"12", b""]
    with pytest.raises(ValueError, match="frame ends"):
        agent.unpack(body[:-2])


def test_an_image_is_stripped_packed_and_unpacked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    rootfs = tmp_path / "rootfs"
    for folder in ("usr/share/doc", "usr/bin", "dev"):
        (rootfs / folder).mkdir(parents=True)
    (rootfs / "usr/bin/tool").write_text("x")
    image = build.pack(rootfs, "tiny")
    assert build.find("tiny") == image
    assert build.find("other") is None
    root = build.unpacked(image)
    assert (root / "usr/bin/tool").read_text() == "x"
    assert not (root / "usr/share/doc").exists()
