"""The tools a model calls, each on a real box."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from posttrain.config import Workers
from posttrain.conversation.tool_calls import describe_tools, format_tool_call, parse_tool_call
from posttrain.errors import SandboxLost, Unsupported
from posttrain.protocols import Tools
from posttrain.rollout.environments import ToolCalling
from posttrain.rollout.player import GroupJob, Play, Player
from posttrain.types import Observation, Request, Sampling, SandboxSpec, StopReason, Task, ToolCall
from sandbox.client import AgentSandbox
from sandbox.local import LocalUnsafe
from sandbox.process import Process
from sandbox.tools import BoxTools
from tests.boxes import require
from tests.tiny_models import ScriptedEngine, tiny_chat

Call = Callable[..., Awaitable[Observation]]
TOOLS = BoxTools(timeout_s=10.0, max_chars=400, max_file_bytes=2000)
CODE = "def f(x):\n    return x\n\n\ndef g(x):\n    return x\n"


@pytest.fixture(scope="module")
def isolated() -> Process:
    return require(Process())


def use(substrate: Process, work: Callable[[Call, AgentSandbox], Awaitable[None]], **files: bytes) -> None:
    """Do something with the tools in a fresh box."""

    async def play() -> None:
        async with substrate.open(SandboxSpec(files=files, timeout_s=20.0, disk_mb=1)) as box:
            session = TOOLS.start(box)

            async def call(name: str, **arguments: Any) -> Observation:
                return await session.call(ToolCall(name, arguments))

            await work(call, box)

    asyncio.run(play())


def test_bash_keeps_its_state_and_says_how_commands_end(isolated):
    async def work(call: Call, box: AgentSandbox) -> None:
        said = [
            (await call("bash", command=command)).text
            for command in ("mkdir d; cd d; x=7; f() { echo $x; }", "f; pwd", "false", "echo out; echo err >&2; exit 3")
        ]
        ended = "out\nerr\n(exit code 3)\n(the shell has ended; the next command gets a new one)"
        assert said == ["(no output)", "7\n/work/d", "(no output)\n(exit code 1)", ended]
        assert (await call("bash", command="pwd; echo $x")).text == "/work\n"
        assert (await call("bash", command="echo a; sleep 60", timeout_s=0.3)).text == "a\n(killed: timeout)"
        assert (await call("bash", command="cat")).text == "(no output)"
        flood = (await call("bash", command="yes | head -c 100000")).text
        assert (len(flood) < 500, flood.count("left out")) == (True, 1)
        assert flood.endswith("y\ny")
        assert "NUL" in (await call("bash", command="echo \0")).text
        assert "surrogates not allowed" in (await call("bash", command="echo \ud800")).text

    use(isolated, work)


def test_read_numbers_lines_and_takes_ranges(isolated):
    async def work(call: Call, box: AgentSandbox) -> None:
        assert (await call("read", path="code")).text.split("\n")[:2] == ["     1\tdef f(x):", "     2\t    return x"]
        assert (await call("read", path="/work/code", first_line=5, num_lines=1)).text == "     5\tdef g(x):"
        assert (await call("read", path="code", first_line=7)).text == "(the file has only 6 lines)"
        assert (await call("read", path="empty")).text == "(the file is empty)"
        clipped = (await call("read", path="long")).text
        assert clipped.startswith("     1\t0\n")
        assert clipped.endswith("\n   300\t299")
        assert len(clipped) < 450
        assert "no UTF-8 text" in (await call("read", path="binary")).text
        assert "No such file" in (await call("read", path="absent")).text
        assert "2000" in (await call("read", path="big")).text
        for path in ("/etc/passwd", "../etc/passwd", "/work/../etc/passwd"):
            assert "relative to the workdir" in (await call("read", path=path)).text
        await call("bash", command="ln -s /etc/passwd link; mkfifo fifo")
        assert (await call("read", path="fifo")).text == "(read failed: not a regular file)"
        assert "read failed" in (await call("read", path="link")).text

    long = "".join(f"{i}\n" for i in range(300)).encode()
    use(isolated, work, code=CODE.encode(), empty=b"", long=long, binary=b"\xff\xfe", big=b"x" * 2001)


def test_write_and_edit_change_files_that_the_shell_sees(isolated):
    async def work(call: Call, box: AgentSandbox) -> None:
        assert (await call("write", path="a/b.sh", content="echo \u00e9\n")).text == "(wrote 8 bytes to a/b.sh)"
        await call("bash", command="cp a/b.sh c.sh; chmod 755 c.sh; cd a")
        shown = (await call("edit", path="c.sh", old="echo \u00e9", new="echo 1\necho 2")).text
        assert shown == "     1\techo 1\n     2\techo 2\n     3\t"
        assert (await call("bash", command="/work/c.sh; ls /work")).text == "1\n2\na\nc.sh"
        assert "Is a directory" in (await call("write", path="a", content="")).text
        assert (
            await call("write", path="full", content="x" * (2 << 20))
        ).text == "(write failed: No space left on device)"
        assert (await call("edit", path="c.sh", old="echo 2\n", new="")).text == "     1\techo 1\n     2\t"
        assert await box.read("c.sh") == b"echo 1\n"
        await call("bash", command="chmod 400 /work/a/b.sh")
        await call("edit", path="a/b.sh", old="echo", new="Echo")
        assert (
            await call("bash", command="cat b.sh; ls /work /work/a")
        ).text == "Echo \u00e9\n/work:\na\nc.sh\n\n/work/a:\nb.sh"

    use(isolated, work)


@pytest.mark.parametrize(
    ("old", "why"),
    [
        ("return x", "old occurs 2 times, in lines 2, 6; add what is around one of them"),
        ("\n", "old occurs 6 times, in lines 1, 2, 3, 4, 5 and more; add"),
        ("def h", "old does not occur in the file"),
        ("def f(x):\n\treturn x", "except with other white space"),
        ("", "old: String should have at least 1 character"),
    ],
)
def test_an_edit_that_is_not_unique_changes_nothing(isolated, old, why):
    async def work(call: Call, box: AgentSandbox) -> None:
        assert why in (await call("edit", path="code", old=old, new="y")).text
        assert await box.read("code") == CODE.encode()

    use(isolated, work, code=CODE.encode())


def test_submit_takes_the_files_as_they_are_or_nothing(isolated):
    async def work(call: Call, box: AgentSandbox) -> None:
        for paths, why in (
            (["code", "absent"], "absent: No such file or directory; nothing was submitted"),
            (["."], "submit failed"),
            (["code", "big"], "submit failed"),
            ([], "paths: List should have at least 1 item"),
            (["code"] * 101, "101 files: expected at most 100"),
            (["/etc/passwd"], "relative to the workdir"),
        ):
            refused = await call("submit", paths=paths)
            assert (why in refused.text, refused.submitted) == (True, None), refused
        done = await call("submit", paths=["/work/code", "./d/e"])
        assert done == Observation("(submitted code, d/e)", {"code": CODE.encode(), "d/e": b"1"})

    use(isolated, work, **{"code": CODE.encode(), "big": b"x" * 2000, "d/e": b"1"})


def test_wrong_calls_are_told_to_the_model(isolated):
    async def play() -> None:
        async with isolated.open(SandboxSpec()) as box:
            session = TOOLS.start(box)
            for call, why in (
                (ToolCall("rm", {}), "there is no tool 'rm'; there are bash, read, write, edit, submit"),
                (ToolCall("x" * 10_000, {}), "characters left out"),
                (ToolCall("bash", {}), "bash was not run: command: Field required"),
                (ToolCall("bash", "ls"), "bash was not run: arguments: Input should be"),
                (ToolCall("bash", {"command": ["ls"]}), "command: Input should be a valid string"),
                (ToolCall("bash", {"command": "ls", "cwd": "/"}), "cwd: Extra inputs are not permitted"),
                (ToolCall("bash", {"command": "ls", "timeout_s": -1}), "timeout_s: Input should be greater than 0"),
                (ToolCall("read", {"path": "a", "first_line": "1"}), "first_line: Input should be a valid integer"),
                (ToolCall("read", {"path": "\ud800"}), "surrogates not allowed"),
            ):
                assert why in (await session.call(call)).text

    asyncio.run(play())


def test_a_lost_box_is_not_an_observation(isolated):
    async def play() -> None:
        async with isolated.open(SandboxSpec()) as box:
            session = TOOLS.start(box)
            await session.call(ToolCall("bash", {"command": "true"}))
            box.kill()
            for call in (ToolCall("bash", {"command": "true"}), ToolCall("read", {"path": "a"})):
                with pytest.raises(SandboxLost):
                    await session.call(call)

    asyncio.run(play())


def test_a_box_without_sessions_is_refused():
    async def play() -> None:
        local = LocalUnsafe(i_accept_that_model_written_code_runs_unisolated=True)
        async with local.open(SandboxSpec()) as box:
            with pytest.raises(Unsupported, match="shell sessions, which a LocalSandbox has not"):
                TOOLS.start(box)

    asyncio.run(play())


def test_the_definitions_are_what_a_model_needs_to_know():
    assert isinstance(TOOLS, Tools)
    assert pickle.loads(pickle.dumps(TOOLS)) == TOOLS
    tools = {tool.name: tool for tool in TOOLS.definitions}
    assert list(tools) == ["bash", "read", "write", "edit", "submit"]
    assert tools["edit"].description == "Replace a text that occurs exactly once in a file."
    assert tools["edit"].parameters["required"] == ["path", "old", "new"]
    assert tools["read"].parameters["properties"]["first_line"] == {"default": 1, "minimum": 1, "type": "integer"}
    assert "line numbers" in describe_tools(TOOLS.definitions)
    assert "title" not in json.dumps([tool.parameters for tool in tools.values()])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("nothing", None),
        ("```python\nx\n```", None),
        ('so:\n```tool\n{"name": "a", "arguments": {"b": "c\\n```\\n"}}\n```\nthen', ToolCall("a", {"b": "c\n```\n"})),
        ('```tool\n{"name": "a", "arguments": {"b": "1\n2"}}\n```', ToolCall("a", {"b": "1\n2"})),
        ('```tool\n{"name":\n "a", "arguments": 1}\n```\n```tool\n{}\n```', ToolCall("a", 1)),
        ("```tool\n{\n```", "not JSON"),
        ("```tool\n" + "[" * 100_000 + "\n```", "not JSON"),
        ('```tool\n{"name": "a"}\n```', 'not {"name"'),
        ('```tool\n{"name": 1, "arguments": {}}\n```', 'not {"name"'),
    ],
)
def test_calls_are_found_in_what_a_model_says(text, found):
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            parse_tool_call(text)
        return
    assert parse_tool_call(text) == found
    if found:
        assert parse_tool_call(format_tool_call(found)) == found


def test_an_episode_with_tools_ends_with_what_was_submitted(isolated):
    said = [
        format_tool_call(ToolCall("bash", {"command": "mkdir -p src; cd src; echo 'x = 1' > a.py"})),
        "```tool\n{oops\n```",
        format_tool_call(ToolCall("edit", {"path": "src/a.py", "old": "1", "new": "2"})),
        format_tool_call(ToolCall("submit", {"paths": ["a.py"]})),
        format_tool_call(ToolCall("bash", {"command": "cat a.py; echo 'x = 3' > planted.py"})),
        format_tool_call(ToolCall("submit", {"paths": ["src/a.py"]})),
    ]

    def script(request: Request) -> str:
        return said[int(request.id.rpartition("/")[2])]

    play = Play(
        environment=ToolCalling(tools=TOOLS),
        reward=None,
        sampling=Sampling(max_tokens=200),
        max_sequence_tokens=4000,
    )
    prompt = ({"role": "user", "content": "set x to 2"},)
    task = Task(id="t", domain="d", prompt=prompt, sandbox=SandboxSpec(timeout_s=20.0))
    player = Player(
        engine=ScriptedEngine(script), judge_engine=None, chat=tiny_chat(), substrate=isolated, workers=Workers()
    )
    [group] = asyncio.run(player.play([GroupJob(id="s", task=task, num_rollouts=1, play=play, seed=1)]))
    [rollout] = group.rollouts
    assert (rollout.stop, rollout.error) == (StopReason.FINISHED, None)
    assert [message["content"].split(":")[0] for message in rollout.messages if message["role"] == "tool"] == [
        "(no output)",
        "(not run",
        "     1\tx = 2\n     2\t",
        "(submit failed",
        "x = 2",
    ]
    assert rollout.artifacts == {"src/a.py": b"x = 2\n"}
