"""The host's side of what goes on for longer than one request: shell sessions and jobs with streamed output."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from posttrain.errors import SandboxLost
from posttrain.types import ExecResult
from sandbox import agent, agent_streams

if TYPE_CHECKING:
    from sandbox.client import AgentSandbox, Fields

FEED_BYTES = 1 << 16
SIGINT, SIGKILL = 2, 9
END_GRACE_S = 2 * agent_streams.GRACE_S + 20.0
"""How long past a command's own limit a session's agent may take to answer."""


class Session:
    """A shell that keeps its directory, variables and functions from one command to the next.

    It holds a uid of its own until it is closed or has ended: what a command left in the background lives on, and
    ``AgentSandbox.exec`` beside it neither sees nor kills it. ``async with`` closes it.
    """

    def __init__(self, box: AgentSandbox, op: int) -> None:
        self._box = box
        self._op = op
        self._turn = asyncio.Lock()
        self.ended = ""
        """Why there is no shell any more; empty while there is one."""

    async def run(self, command: str, *, timeout_s: float | None = None, max_output: int = 1 << 20) -> ExecResult:
        """Run one command in the shell, with standard input closed. One at a time; more wait their turn.

        A command that runs out of time or prints too much is interrupted. Should it not end within a second, all
        processes but the shell are killed, and a second later the shell, too. What background processes have printed
        since the last command comes first. A shell that ends itself (``exit``, ``exec``, ``set -e``) gives its exit
        code as the result; every command after that raises ``EOFError``.
        """
        limit_s = self._box.spec.timeout_s if timeout_s is None else timeout_s
        if "\0" in command or limit_s <= 0 or max_output < 0:
            raise ValueError(
                f"command = {command[:80]!r}, timeout_s={limit_s}, max_output={max_output}: expected a command without "
                "NUL, a time > 0 and a size >= 0"
            )
        body = agent.pack(self._op, int(limit_s * 1e6), max_output, command)
        async with self._turn:
            if self.ended:
                raise EOFError(f"the shell has ended ({self.ended}); open another session")
            try:
                result, fields = await self._box.command(agent_streams.RUN, body, limit_s + END_GRACE_S)
            except ProcessLookupError as error:
                raise EOFError("the shell has ended; open another session") from error
            if fields[10] == b"0":
                self.ended = self.ended or f"{result.status.value} {result.exit_code}"
        return result

    async def interrupt(self) -> None:
        """Ctrl-C: the command that runs ends with 130, and what follows it in the same ``run`` is left out."""
        await self._box.signal(self._op, SIGINT)

    async def close(self) -> None:
        """Kill the shell and everything its commands left running."""
        if not self.ended:
            await self._box.ask(agent_streams.CLOSE, agent.pack(self._op))

    def on_event(self, fields: Fields) -> None:
        """The agent says that the shell has ended."""
        self.ended = self.ended or fields[1].decode()

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        try:
            await self.close()
        except SandboxLost:
            # It has ended with its box.
            return


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a job's output. A terminal has one stream for both."""

    stream: str
    """``stdout`` or ``stderr``."""
    data: bytes


class Job:
    """A program that runs on while its output is read: ``async for chunk in job``.

    Its output waits in the box until it is read, so a program that prints much waits for its reader.
    """

    def __init__(self, box: AgentSandbox, op: int) -> None:
        self._box = box
        self._op = op
        self.waiting: deque[Chunk] = deque()
        """Output that has come and was not read yet."""
        self._news = asyncio.Event()
        self._taken = 0
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.end: asyncio.Task[ExecResult] | None = None
        """Set by the box when the job runs."""

    def on_event(self, fields: Fields) -> None:
        """The agent sends output."""
        if fields[0] == b"started":
            if not self.started.done():
                self.started.set_result(None)
        else:
            self.waiting.append(Chunk("stdout" if fields[1] == b"1" else "stderr", fields[2]))
            self._news.set()

    def watch(self, end: asyncio.Task[ExecResult]) -> None:
        """Wake whoever waits when the job ends."""
        self.end = end
        end.add_done_callback(self._on_end)

    def _on_end(self, end: asyncio.Task[ExecResult]) -> None:
        self._news.set()
        if not end.cancelled():
            # Retrieved here, since nobody may be waiting for it.
            end.exception()

    def __aiter__(self) -> Job:
        return self

    async def __anext__(self) -> Chunk:
        assert self.end is not None
        while not self.waiting:
            if self.end.done():
                # Raises SandboxLost when that is how it ended.
                self.end.result()
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        chunk = self.waiting.popleft()
        self._taken += len(chunk.data)
        if self._taken >= agent_streams.WINDOW // 4 and not self.end.done():
            taken, self._taken = self._taken, 0
            await self._box.tell(agent_streams.CREDIT, agent.pack(self._op, taken))
        return chunk

    async def write_stdin(self, data: bytes, *, eof: bool = False) -> None:
        """Write to standard input, and wait until it is written. ``BrokenPipeError`` when nobody reads it any more.

        With ``eof`` standard input ends after the data; a terminal gets Ctrl-D.
        """
        assert self.end is not None
        pieces = [data[at : at + FEED_BYTES] for at in range(0, len(data), FEED_BYTES)] or [b""]
        for index, piece in enumerate(pieces):
            last = eof and index == len(pieces) - 1
            asked = self._box.ask(agent_streams.FEED, agent.pack(self._op, piece, int(last)), deadline_s=None)
            try:
                await asked
            except ProcessLookupError as error:
                raise BrokenPipeError("the job has ended") from error

    async def resize(self, rows: int, columns: int) -> None:
        """Tell the programs on the job's terminal its new size. ``ValueError`` without a terminal."""
        await self._box.ask(agent_streams.RESIZE, agent.pack(self._op, rows, columns))

    async def interrupt(self) -> None:
        """SIGINT to the process group, as Ctrl-C gives."""
        await self._box.signal(self._op, SIGINT)

    async def kill(self) -> None:
        """SIGKILL to everything the job started."""
        await self._box.signal(self._op, SIGKILL)

    async def __aenter__(self) -> Job:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Kill it, unless it has ended."""
        try:
            await self.kill()
            await self.wait()
        except (ProcessLookupError, SandboxLost):
            return

    async def wait(self) -> ExecResult:
        """How it ended, without the output, which is read by iterating; a job nobody reads may never end."""
        assert self.end is not None
        return await asyncio.shield(self.end)
