"""The host's side of what goes on for longer than one request: shell sessions and jobs with streamed output."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections import deque
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING

from posttrain.errors import SandboxLost
from posttrain.types import ExecResult
from sandbox import agent, agent_streams

if TYPE_CHECKING:
    from sandbox.client import AgentSandbox, Fields

FEED_BYTES = 1 << 16
OFFSET_DEADLINE_S = 10.0
"""How long a job is waited for that has not printed as much as its reader has read, as in a replay."""
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

    async def run(
        self, command: str, *, timeout_s: float | None = None, max_output: int = 1 << 20, op_id: str = ""
    ) -> ExecResult:
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
                result, fields = await self._box.command(agent_streams.RUN, body, limit_s + END_GRACE_S, op_id=op_id)
            except ProcessLookupError as error:
                raise EOFError("the shell has ended; open another session") from error
            if fields[10] == b"0":
                self.ended = self.ended or f"{result.status.value} {result.exit_code}"
        return result

    async def interrupt(self, *, op_id: str = "") -> None:
        """Ctrl-C: the command that runs ends with 130, and what follows it in the same ``run`` is left out."""
        await self._box.signal(self._op, SIGINT, op_id=op_id)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a job has printed since some point."""

    stdout: bytes
    stderr: bytes
    """Empty for a job with a terminal, which has one stream."""
    offset: int
    """Bytes printed so far, both streams together, these included: where the next read goes on."""
    ended: bool
    """Whether nothing will follow."""


class Job:
    """A program that runs on while its output is read: ``async for chunk in job``, or ``read``.

    Its output waits in the box until it is read, so a program that prints much waits for its reader.
    """

    def __init__(self, box: AgentSandbox, op: int) -> None:
        self._box = box
        self._op = op
        self.waiting: deque[Chunk] = deque()
        """Output that has come and may still be asked for."""
        self.offset = 0
        """Bytes of output before those."""
        self._news = asyncio.Event()
        self._taken = 0
        self._rest: tuple[int, int, asyncio.Task[ExecResult]] | None = None
        """The last ``wait`` from an offset: that offset, its cap, and what it gives."""
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
        await self._wait_for_output(self.offset + 1)
        if not self.waiting:
            raise StopAsyncIteration
        chunk = self.waiting[0]
        await self._drop(len(chunk.data))
        return chunk

    async def read(self, *, offset: int | None = None, max_output: int = 1 << 20, wait_s: float = 10.0) -> Output:
        """Output from an offset on (default: what was not read yet), waiting up to ``wait_s`` for the first of it.

        What lies before the offset is forgotten, and makes room for more. ``ValueError`` for what was forgotten, or was
        not printed in that time.
        """
        await self._forget(offset, wait_s)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wait_for_output(self.offset + 1), wait_s)
        streams = {"stdout": bytearray(), "stderr": bytearray()}
        left = max_output
        for chunk in self.waiting:
            streams[chunk.stream] += chunk.data[:left]
            left -= len(chunk.data[:left])
        printed = max_output - left
        assert self.end is not None
        output = Output(
            stdout=bytes(streams["stdout"]),
            stderr=bytes(streams["stderr"]),
            offset=self.offset + printed,
            ended=self.end.done() and self.offset + printed == self._printed(),
        )
        if offset is None:
            await self._drop(printed)
        return output

    async def _wait_for_output(self, until: int) -> None:
        """Until so many bytes were printed, or the job has ended. ``SandboxLost`` when that is how it ended."""
        assert self.end is not None
        while self._printed() < until and not self.end.done():
            self._news.clear()
            await self._news.wait()
        if not self.waiting and self.end.done():
            self.end.result()

    def _printed(self) -> int:
        return self.offset + sum(len(chunk.data) for chunk in self.waiting)

    async def _forget(self, offset: int | None, wait_s: float) -> None:
        """Drop what lies before an offset, which has so long to be reached: a replay may read faster than before."""
        offset = self.offset if offset is None else offset
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wait_for_output(offset), wait_s)
        if not self.offset <= offset <= self._printed():
            raise ValueError(
                f"offset = {offset}: expected {self.offset} to {self._printed()}; a job keeps no output from before "
                "the offset it was last read from"
            )
        await self._drop(offset - self.offset)

    async def _drop(self, size: int) -> None:
        """Forget the first bytes of what waits, and let the box send as many more."""
        self.offset += size
        self._taken += size
        while size:
            chunk = self.waiting.popleft()
            if len(chunk.data) > size:
                self.waiting.appendleft(Chunk(chunk.stream, chunk.data[size:]))
            size -= min(size, len(chunk.data))
        assert self.end is not None
        if self._taken >= agent_streams.WINDOW // 4 and not self.end.done():
            taken, self._taken = self._taken, 0
            await self._box.tell(agent_streams.CREDIT, agent.pack(self._op, taken))

    async def write_stdin(self, data: bytes, *, eof: bool = False, op_id: str = "") -> None:
        """Write to standard input, and wait until it is written. ``BrokenPipeError`` when nobody reads it any more.

        With ``eof`` standard input ends after the data; a terminal gets Ctrl-D.
        """
        assert self.end is not None
        pieces = [data[at : at + FEED_BYTES] for at in range(0, len(data), FEED_BYTES)] or [b""]
        for index, piece in enumerate(pieces):
            # The last piece has the name: when the box knows that one, all are written.
            last = index == len(pieces) - 1
            body = agent.pack(self._op, piece, int(last and eof))
            try:
                await self._box.ask(agent_streams.FEED, body, deadline_s=None, op_id=op_id if last else "")
            except ProcessLookupError as error:
                raise BrokenPipeError(errno.EPIPE, "the job has ended") from error

    async def resize(self, rows: int, columns: int) -> None:
        """Tell the programs on the job's terminal its new size. ``ValueError`` without a terminal."""
        await self._box.ask(agent_streams.RESIZE, agent.pack(self._op, rows, columns))

    async def signal(self, number: int, *, op_id: str = "") -> None:
        """A signal to the process group; SIGKILL to everything the job started."""
        await self._box.signal(self._op, number, op_id=op_id)

    async def interrupt(self) -> None:
        """SIGINT to the process group, as Ctrl-C gives."""
        await self.signal(SIGINT)

    async def kill(self) -> None:
        """SIGKILL to everything the job started."""
        await self.signal(SIGKILL)

    async def __aenter__(self) -> Job:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Kill it, unless it has ended."""
        try:
            await self.kill()
            await self.wait()
        except (ProcessLookupError, SandboxLost):
            return

    async def wait(self, *, offset: int | None = None, max_output: int = 1 << 20) -> ExecResult:
        """How it ended, with the output that was not read (or that from an offset on), of which head and tail are kept.

        ``max_output`` bounds each stream. Asking again with the same offset gives the same.
        """
        if offset is None:
            return await self._drain(max_output)
        if self._rest is None or self._rest[:2] != (offset, max_output):
            await self._forget(offset, OFFSET_DEADLINE_S)
            rest = asyncio.create_task(self._drain(max_output))
            rest.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._rest = offset, max_output, rest
        # One that is cancelled goes on taking output, for whoever asks again.
        return await asyncio.shield(self._rest[2])

    async def _drain(self, max_output: int) -> ExecResult:
        captures = {"stdout": agent.Capture(max_output), "stderr": agent.Capture(max_output)}
        async for chunk in self:
            captures[chunk.stream].feed(chunk.data)
        assert self.end is not None
        return replace(
            await asyncio.shield(self.end),
            stdout=captures["stdout"].value(),
            stderr=captures["stderr"].value(),
            truncated_bytes=sum(capture.dropped for capture in captures.values()),
        )
