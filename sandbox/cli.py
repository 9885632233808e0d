"""``posttrain sandbox doctor | run | shell | ps | log | replay | bench``, the command line of boxes and their logs."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import difflib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import RecipeError, SandboxError

if TYPE_CHECKING:
    from posttrain.protocols import Substrate
    from posttrain.types import ExecResult, SandboxSpec
    from sandbox.recorded import Difference

CODES = {"output_limit": 120, "oom": 121, "pids_limit": 122, "disk_full": 123, "timeout": 124, "cancelled": 130}
SANDBOX_FAILED = 125
INTERRUPTED = 130
CODES_HELP = (
    "Exit code: that of the program; 128 + N for signal N; "
    + ", ".join(f"{code} {status}" for status, code in CODES.items() if code != INTERRUPTED)
    + f"; {SANDBOX_FAILED} when there was no box or it was lost; {INTERRUPTED} when interrupted. How it ended is also "
    "written to standard error."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    failed = SANDBOX_FAILED if command in (_run, _shell) else 2
    try:
        return command(arguments)
    except KeyError as problem:
        return _complain(str(problem.args[0]), failed)
    except (RecipeError, SandboxError, ValueError, OSError) as problem:
        if isinstance(problem, BrokenPipeError):
            # Whoever reads has seen enough; Python would complain once more when it flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 128 + signal.SIGPIPE
        return _complain(str(problem), failed)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)


def _complain(text: str, code: int) -> int:
    print(f"posttrain sandbox: {text}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="posttrain sandbox", description="Boxes for code that nobody trusts.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, more: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, epilog=more)
        command.set_defaults(command=run)
        return command

    add("doctor", _doctor, "Check which kinds of box this machine can open, and what the others lack.")
    run = add("run", _run, "Run a program in a fresh box, with this terminal's input and output.", CODES_HELP)
    shell = add("shell", _shell, "Open an interactive shell in a fresh box, or go on in a kept one.", CODES_HELP)
    for command in (run, shell):
        command.add_argument(
            "--substrate", default="process", help="kind of box (default: process), or module:attribute"
        )
        command.add_argument("--memory", type=int, metavar="MB", help="memory of the box")
        command.add_argument(
            "--file", action="append", default=[], metavar="LOCAL:PATH", help="copy a file into the workdir"
        )
        command.add_argument("--user", metavar="NAME", help="run as this user of the box (default: a fresh one)")
    run.add_argument("--timeout", type=float, metavar="S", help="kill the program after this time (default: never)")
    run.add_argument("program", nargs="+", help="the program and its arguments")
    run.usage = "posttrain sandbox run [OPTIONS] -- PROGRAM [ARGUMENT ...]"
    shell.add_argument(
        "--attach", metavar="ROLLOUT", help="take over the box that the edge in --dir keeps for a rollout"
    )
    shell.add_argument("--dir", type=Path, help="the folder of that edge")
    for name, command_of, text in (
        ("ps", _ps, "List the boxes of an edge or of a folder of logs."),
        ("log", _log, "Show what was done in a box, and what came of it."),
        ("replay", _replay, "Do all of it again in a fresh box, and show what came out otherwise."),
    ):
        command = add(name, command_of, text)
        if name != "ps":
            command.add_argument("box", nargs="?", help="box id or its beginning, or rollout; not needed for one log")
        command.add_argument("--dir", type=Path, required=True, help="folder of an edge, of logs, or of one log")
        if name == "log":
            command.add_argument("--full", action="store_true", help="also show outputs")
            command.add_argument("--json", action="store_true", help="one record per line, with everything in it")
        if name == "replay":
            command.add_argument("--substrate", help="kind of box (default: the recorded one)")
            command.add_argument("--upto", type=int, metavar="SEQ", help="stop after this call")
    bench = add("bench", _bench, "Measure how quick boxes are here. Takes about 2 s for each kind, more for machines.")
    bench.add_argument("substrate", nargs="*", help="kinds of box (default: all)")
    return parser


def _doctor(_: argparse.Namespace) -> int:
    from sandbox.doctor import needs, substrates

    kinds = substrates()
    for title, findings in (("substrates", kinds), ("what they need", needs())):
        print(title)
        for finding in findings:
            print(f"  {'ok  ' if finding.ok else 'FAIL'}  {finding.name:<10}  {finding.detail}")
    return 0 if any(kind.ok for kind in kinds) else 2


def _run(arguments: argparse.Namespace) -> int:
    from sandbox import terminal

    if arguments.timeout is not None and arguments.timeout <= 0:
        raise RecipeError(f"--timeout {arguments.timeout:g}: expected a number of seconds > 0")
    substrate = _substrate(arguments.substrate)
    result = asyncio.run(
        terminal.run(substrate, _spec(arguments), arguments.program, timeout_s=arguments.timeout, user=arguments.user)
    )
    return _ended(result)


def _shell(arguments: argparse.Namespace) -> int:
    from sandbox import terminal

    if arguments.attach is None:
        return _ended(
            asyncio.run(terminal.shell(_substrate(arguments.substrate), _spec(arguments), user=arguments.user))
        )
    if arguments.dir is None:
        raise RecipeError("--attach needs --dir, the folder of the edge that keeps the box")
    return _ended(asyncio.run(terminal.attached_shell(arguments.dir.absolute(), arguments.attach, user=arguments.user)))


def _ended(result: ExecResult) -> int:
    from sandbox.terminal import describe

    print(f"posttrain sandbox: {describe(result)}", file=sys.stderr)
    if result.exit_code is not None:
        return result.exit_code
    return CODES.get(result.status.value, 128 + (result.signal or 0))


def _substrate(name: str) -> Substrate:
    from sandbox.conformance import find_substrate

    substrate = find_substrate(name)
    substrate.check()
    return substrate


def _spec(arguments: argparse.Namespace) -> SandboxSpec:
    from posttrain.types import SandboxSpec

    files = {}
    for argument in arguments.file:
        local, colon, path = argument.rpartition(":")
        if not colon or not local or not path:
            raise RecipeError(f"--file {argument}: expected LOCAL:PATH, such as data.csv:in/data.csv")
        files[path] = Path(local).read_bytes()
    if arguments.memory is not None and arguments.memory < 1:
        raise RecipeError(f"--memory {arguments.memory}: expected a number of MB >= 1")
    limits = {} if arguments.memory is None else {"memory_mb": arguments.memory}
    return SandboxSpec(files=files, **limits)


def _ps(arguments: argparse.Namespace) -> int:
    from sandbox.history import list_rows

    _print_table(list_rows(arguments.dir))
    return 0


def _log(arguments: argparse.Namespace) -> int:
    from sandbox import history
    from sandbox.log import TrajectoryLog

    box = history.find(arguments.dir, arguments.box)
    with contextlib.closing(TrajectoryLog.read(box.folder)) as log:
        if arguments.json:
            for seq in range(len(log)):
                print(json.dumps(history.as_json(log, seq)))
            return 0
        print(history.heading(box, log))
        rows, operations = zip(*history.log_rows(log), strict=True)
        for line, operation in zip(_table(rows, free=3), operations, strict=True):
            print(line)
            if arguments.full and operation:
                for stream, data in history.outputs(log, operation):
                    _print_indented(stream, data.decode("utf-8", "backslashreplace"))
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    from sandbox import history
    from sandbox.log import TrajectoryLog
    from sandbox.recorded import replay

    box = history.find(arguments.dir, arguments.box)
    with contextlib.closing(TrajectoryLog.read(box.folder)) as log:
        substrate = _substrate(arguments.substrate or log.record(0).data["substrate"])
        report = asyncio.run(replay(log, substrate, upto=arguments.upto))
    for difference in report.differences:
        _print_difference(difference)
    if report.image_differs:
        print("the image is not the recorded one")
    if report.left_out:
        print(f"left out, since their effect is not known: {', '.join(map(str, report.left_out))}")
    if report.begun_at:
        print(f"begun at the snapshot that operation {report.begun_at} took")
    differing = len({difference.seq for difference in report.differences})
    print(f"{report.num_replayed} calls replayed in a {substrate.name} box, {differing} differ")
    return 1 if report.differences else 0


def _print_difference(difference: Difference) -> None:
    print(f"call {difference.seq}: {difference.request}")
    old, new = difference.expected, difference.got
    if isinstance(old, bytes) and isinstance(new, bytes):
        before, after = (data.decode("utf-8", "backslashreplace").splitlines() for data in (old, new))
        # Without the two lines that would name files.
        for line in list(difflib.unified_diff(before, after, lineterm="", n=1))[2:]:
            _print_indented(difference.part, line)
    else:
        print(f"       {difference.part:>4} | {old!r:.200}, now {new!r:.200}")


def _bench(arguments: argparse.Namespace) -> int:
    from sandbox import bench
    from sandbox.doctor import SUBSTRATES

    heading = ("ms, p50 / p95", *bench.FIGURES.values())
    rows = [heading]
    notes: list[str] = []
    for name in arguments.substrate or SUBSTRATES:
        print(f"measuring {name}", file=sys.stderr)
        try:
            found = asyncio.run(bench.measure(_substrate(name)))
        except (RecipeError, SandboxError) as problem:
            notes.append(f"{name}: {problem}")
            continue
        cells = []
        for figure in bench.FIGURES:
            value = found[figure]
            if isinstance(value, str):
                notes.append(f"{name}, {bench.FIGURES[figure]}: {value}")
            cells.append("n/a" if isinstance(value, str) else f"{value.p50_ms:.2f} / {value.p95_ms:.2f}")
        rows.append((name, *cells))
    _print_table(rows, right=True)
    for note in notes:
        print(f"n/a  {note}")
    return 0 if len(rows) > 1 else 2


def _table(rows: Iterable[Sequence[str]], *, free: int | None = None, right: bool = False) -> list[str]:
    """Aligned lines. On a terminal the column ``free`` gives way so that they fit."""
    cells = [[_printable(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if free is not None and sys.stdout.isatty():
        room = shutil.get_terminal_size().columns - sum(widths) - 2 * (len(widths) - 1) + widths[free]
        widths[free] = max(20, min(widths[free], room))
    lines = []
    for row in cells:
        for at, width in enumerate(widths):
            text = row[at] if len(row[at]) <= width else f"{row[at][: width - 3]}..."
            row[at] = text.rjust(width) if right and at else text.ljust(width)
        lines.append("  ".join(row).rstrip())
    return lines


def _print_table(rows: Iterable[Sequence[str]], *, right: bool = False) -> None:
    for line in _table(rows, right=right):
        print(line)


def _print_indented(name: str, text: str) -> None:
    for line in text.splitlines():
        print(f"       {name:>4} | {_printable(line)}")


def _printable(text: str) -> str:
    """What a payload wrote must not reach the terminal as it is: a control sequence could do anything to it."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


if __name__ == "__main__":
    sys.exit(main())
