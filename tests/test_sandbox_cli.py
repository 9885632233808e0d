"""``posttrain sandbox`` as its users start it: a process of its own, on a pipe or on a terminal."""

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Self

import pytest

from posttrain.types import SandboxSpec
from sandbox.edge_client import EdgeClient
from sandbox.log import TrajectoryLog
from sandbox.process import Process
from sandbox.recorded import RecordedSandbox, Recorder, creation
from tests.boxes import require

COMMAND = (sys.executable, "-m", "sandbox.cli")
ROOT = Path(__file__).parent.parent
SPEC = SandboxSpec(memory_mb=64, disk_mb=8)
SCRIPT = b"import time\nprint('same')\nprint(time.time())\n"


@pytest.fixture(scope="module", autouse=True)
def _process_boxes():
    require(Process())


def sandbox(*arguments: str, stdin: bytes = b"", check: int | None = 0) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, timeout=60, cwd=ROOT)
    assert check is None or done.returncode == check, done
    return done


def run(*program: str, options: tuple[str, ...] = (), **more) -> subprocess.CompletedProcess[bytes]:
    return sandbox("run", *options, "--", *program, **more)


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    """A folder of logs with that of one box, ``box-1``."""
    folder = tmp_path_factory.mktemp("logs")

    async def record() -> None:
        process = Process()
        log = TrajectoryLog.create(folder / "box-1", creation(process, SPEC, rollout_id="r-1"))
        with contextlib.closing(log):
            async with process.open(SPEC) as box:
                client = RecordedSandbox(Recorder(box, log))
                await client.exec("cat > a.py", stdin=SCRIPT)
                await client.exec(["python3", "a.py"])
                await client.exec("printf '\\033[31mred\\000'; echo oops >&2; exit 3")
                await client.exec("sleep 20", timeout_s=0.1)
                await client.exec(["head", "-c", "100000", "/dev/zero"])
                with contextlib.suppress(FileNotFoundError):
                    await client.read("absent")
                await client.list()

    asyncio.run(record())
    return folder


def test_posttrain_finds_the_command_by_its_entry_point():
    found = {point.name: point.value for point in entry_points(group="posttrain.commands")}
    assert found.get("sandbox") == "sandbox.cli:main", "install posttrain again: pip install -e . --no-deps"
    done = subprocess.run(
        [sys.executable, "-m", "posttrain.cli", "sandbox", "run", "--", "sh", "-c", "exit 5"],
        capture_output=True,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == 5, done
    listed = subprocess.run(
        [sys.executable, "-m", "posttrain.cli", "--help"], capture_output=True, cwd=ROOT, check=True
    )
    assert b"posttrain sandbox --help" in listed.stdout


def test_help_needs_nothing_heavy():
    program = "import sys, sandbox.cli; print(sorted({'torch', 'numpy', 'rich', 'docker', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=ROOT, check=True)
    assert done.stdout == b"[]\n"
    assert b"124 timeout" in sandbox("run", "--help").stdout


def test_doctor_names_every_kind_of_box_and_what_it_lacks():
    done = sandbox("doctor")
    lines = done.stdout.decode().splitlines()
    kinds = dict(reversed(line.split()[:2]) for line in lines[1:7])
    assert list(kinds) == ["process", "container", "function", "gvisor", "microvm", "fullvm"]
    assert kinds["process"] == "ok"
    assert set(kinds.values()) <= {"ok", "FAIL"}
    assert all(line.split(maxsplit=2)[2] for line in lines if line.startswith("  ")), done.stdout


def test_doctor_fails_where_no_box_can_be_opened(tmp_path):
    env = {**os.environ, "PATH": "", "POSTTRAIN_CACHE": str(tmp_path)}
    done = subprocess.run([*COMMAND, "doctor"], capture_output=True, env=env, cwd=ROOT, timeout=60)
    assert done.returncode == 2, done
    assert b"apt-get install bubblewrap" in done.stdout


def test_run_passes_streams_and_exit_code():
    done = run(
        *("python3", "-c", "import sys; print(sys.stdin.read()); print('err', file=sys.stderr); sys.exit(3)"),
        stdin=b"in",
        check=3,
    )
    assert done.stdout == b"in\n"
    assert re.fullmatch(rb"err\nposttrain sandbox: exited 3 \(wall .* s, CPU .* s, memory \d+ MiB\)\n", done.stderr)


def test_run_passes_large_input_and_output():
    data = os.urandom(1 << 20)
    assert run("cat", stdin=data).stdout == data


def test_run_streams_output():
    process = subprocess.Popen(
        [*COMMAND, "run", "--", "sh", "-c", "echo first; read line; echo $line"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    with process:
        assert process.stdout.readline() == b"first\n"
        process.stdin.write(b"second\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"second\n"
        process.stdin.close()
    assert process.returncode == 0


def test_run_takes_a_user():
    program = 'test "$(id -u)" -ge 1009 && echo $USER && cd && pwd'
    assert run("sh", "-c", program, options=("--user", "alice")).stdout == b"alice\n/work/.home-alice\n"
    refused = run("true", options=("--user", "root"), check=125)
    assert b"user = 'root': nothing that runs in a box is root" in refused.stderr


def test_run_copies_files(tmp_path):
    (tmp_path / "a:b.txt").write_bytes(b"content")
    done = run("cat", "in/x.txt", options=("--file", f"{tmp_path}/a:b.txt:in/x.txt"))
    assert done.stdout == b"content"


@pytest.mark.parametrize(
    ("program", "options", "code", "told"),
    [
        ("echo part; sleep 20", ("--timeout", "0.3"), 124, b"timeout"),
        ("exec python3 -c 'b = []\nwhile True: b.append(bytearray(1 << 20))'", ("--memory", "32"), 121, b"oom"),
        ("kill -SEGV $$", (), 139, b"signaled 11"),
        ("head -c 100000000 /dev/zero > big", (), 123, b"disk_full"),
    ],
)
def test_run_tells_apart_how_a_program_ended(program, options, code, told):
    done = run("sh", "-c", program, options=options, check=code)
    assert b"posttrain sandbox: " + told in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--substrate", "nonsense", "--", "true"), b"substrate 'nonsense': expected process, container"),
        (("--file", "x", "--", "true"), b"--file x: expected LOCAL:PATH"),
        (("--file", "/etc/hostname:../x", "--", "true"), b"path = '../x': expected a path relative to the workdir"),
        (("--timeout", "0", "--", "true"), b"--timeout 0: expected a number of seconds > 0"),
        (("--memory", "0", "--", "true"), b"--memory 0: expected a number of MB >= 1"),
    ],
)
def test_run_says_what_is_wrong_with_its_arguments(arguments, told):
    assert told in sandbox("run", *arguments, check=125).stderr


def test_interrupting_run_interrupts_the_program():
    program = "trap 'echo caught; exit 4' INT; echo ready; while :; do sleep 0.1; done"
    process = subprocess.Popen(
        [*COMMAND, "run", "--", "sh", "-c", program],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (4, b"caught\n"), err


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execv(COMMAND[0], [*COMMAND, *arguments])
        self.resize(30, 100)
        self.has_ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.has_ended:
            os.kill(self.pid, signal.SIGINT)
            self.wait()
        os.close(self.fd)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def until(self, expected: bytes, timeout_s: float = 20.0) -> bytes:
        """Output until the expected has come, or the end."""
        seen, deadline = b"", time.monotonic() + timeout_s
        while expected not in seen and select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            try:
                seen += os.read(self.fd, 65536)
            except OSError:
                break
        assert expected in seen, seen
        return seen

    def wait(self) -> int:
        self.has_ended = True
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_shell_is_a_terminal():
    with Terminal("shell") as terminal:
        terminal.until(b"$ ")
        terminal.type(b"stty size; id -u\r")
        terminal.until(b"30 100\r\n1000\r\n")
        terminal.resize(40, 120)
        terminal.type(b"while [ \"$(stty size)\" != '40 120' ]; do sleep 0.05; done; echo re''sized\r")
        terminal.until(b"resized")
        # The program says itself that it runs: a key that comes while bash forks it makes bash lose track of it.
        terminal.type(b"(echo sle''eping; exec sleep 60)\r")
        terminal.until(b"sleeping")
        terminal.type(b"\x03")
        terminal.until(b"$ ")
        terminal.type(b"echo interrupted $?\r")
        terminal.until(b"interrupted 130")
        terminal.type(b"exit 7\r")
        terminal.until(b"posttrain sandbox: exited 7")
        assert terminal.wait() == 7


def test_shell_needs_a_terminal():
    assert b"use `posttrain sandbox run -- COMMAND`" in sandbox("shell", check=125).stderr


def test_shell_goes_on_in_a_kept_box(tmp_path_factory):
    folder = tmp_path_factory.mktemp("e")
    edge = subprocess.Popen(
        [sys.executable, "-m", "sandbox.edge", "--dir", str(folder)], stdout=subprocess.PIPE, cwd=ROOT
    )
    with edge, contextlib.ExitStack() as stack:
        stack.callback(edge.terminate)
        assert b"serving" in edge.stdout.readline()

        async def begin() -> None:
            async with EdgeClient(folder / "edge.sock") as client:
                await (await client.create("r-7", SPEC)).exec("echo kept > file")

        asyncio.run(begin())
        attach = ("shell", "--dir", str(folder), "--attach")
        terminal = stack.enter_context(Terminal(*attach, "r-7"))
        assert b"after 1 recorded calls" in terminal.until(b"$ ")
        terminal.type(b"cat file; exit 6\r")
        assert b"kept\r\n" in terminal.until(b"exited 6")
        assert terminal.wait() == 6
        unknown = stack.enter_context(Terminal(*attach, "r-8"))
        unknown.until(b"rollout 'r-8' has no box")
        assert unknown.wait() == 125
        assert b"--attach needs --dir" in sandbox("shell", "--attach", "r-7", check=125).stderr
        listed = sandbox("ps", "--dir", str(folder)).stdout.decode().splitlines()
        assert listed[0].split() == ["box", "rollout", "state", "substrate", "calls", "unknown", "age", "cause"]
        assert listed[1].split()[1:4] == ["r-7", "open", "process"]
        assert b"out | cat file; exit 6" in sandbox("log", "r-7", "--full", "--dir", str(folder)).stdout
    assert "lost" in sandbox("ps", "--dir", str(folder)).stdout.decode()
    with Terminal(*attach, "r-7") as gone:
        gone.until(b"no edge at")
        assert gone.wait() == 125


def test_log_draws_what_was_done(logs):
    text = sandbox("log", "--dir", str(logs)).stdout.decode()
    rows = [re.split(r"  +", line) for line in text.splitlines()[3:]]
    assert [(row[2], row[4]) for row in rows[:2]] == [("exec", f"< {len(SCRIPT)} B"), ("exec", "exited 0")]
    assert [row[-4:] for row in rows[2:3]] == [["exited 3", rows[2][-3], "9 B", "5 B"]]
    assert rows[3][4] == "timeout"
    assert rows[4][-1] == "97.7 KiB"
    assert rows[5][3:5] == ["absent", "error: No such file or directory"]
    assert rows[6][3:5] == [".", "ok, files: 1"]
    full = sandbox("log", "box-1", "--full", "--dir", str(logs)).stdout
    assert b"err | oops\n" in full
    assert b"out | \\x1b[31mred\\x00\n" in full
    assert b"\x1b" not in full


def test_log_as_json_holds_everything(logs):
    records = [json.loads(line) for line in sandbox("log", "r-1", "--json", "--dir", str(logs)).stdout.splitlines()]
    assert [record["seq"] for record in records] == list(range(15))
    assert records[0]["data"]["spec"]["memory_mb"] == 64
    assert records[1]["data"]["request"]["stdin"] == SCRIPT.decode()
    assert records[10]["data"]["outcome"]["exec"]["stdout"] == "\0" * 100_000


def test_replay_shows_only_what_differs(logs):
    done = sandbox("replay", "--dir", str(logs), check=1)
    text = done.stdout.decode()
    assert re.search(r"^call 3: exec\(\['python3', 'a.py'\]\)", text)
    assert re.search(r"\n +stdout \|  same\n +stdout \| -\d+\.\d+\n +stdout \| \+\d+\.\d+\n", text)
    assert text.endswith("7 calls replayed in a process box, 1 differ\n")
    upto = sandbox("replay", "--upto", "1", "--dir", str(logs))
    assert upto.stdout == b"1 calls replayed in a process box, 0 differ\n"


def test_what_is_not_there_is_said(logs, tmp_path):
    assert b"expected the --dir of an edge" in sandbox("ps", "--dir", str(tmp_path), check=2).stderr
    assert b"no box or rollout 'r-2'" in sandbox("log", "r-2", "--dir", str(logs), check=2).stderr


def test_a_reader_that_has_seen_enough_is_no_error(logs):
    pipe = f"{sys.executable} -m sandbox.cli log --json --dir {logs} | head -n 1"
    done = subprocess.run(["sh", "-c", pipe], capture_output=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["kind"] == "create"


def test_bench_measures_or_says_why_not():
    text = sandbox("bench", "process", "nonsense").stdout.decode()
    row = next(line for line in text.splitlines() if line.startswith("process"))
    p50s = [float(value) for value in re.findall(r"(\d+\.\d+) / ", row)]
    assert len(p50s) == 4
    assert all(0 < value < 2000 for value in p50s)
    assert "n/a  nonsense: substrate 'nonsense': expected" in text
    assert b"n/a" in sandbox("bench", "nonsense", check=2).stdout
