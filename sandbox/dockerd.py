"""Starts a Docker daemon where there should be one and is none; as a program, also builds the sandbox image."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from posttrain.errors import SandboxUnavailable
from sandbox import owners
from sandbox.images import build

SOCKET = Path("/var/run/docker.sock")
INSTALL = "install Docker (Debian: apt-get install docker.io) and the Python SDK (pip install 'docker>=7.1')"
START_DEADLINE_S = 40.0
PING_DEADLINE_S = 5.0
STALE_DEADLINE_S = 1.0
"""A killed daemon's containerd ends a moment after it."""


def is_running(path: Path = SOCKET) -> bool:
    """Whether a daemon answers on the local socket. One that is coming up accepts connections before it does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(PING_DEADLINE_S)
        try:
            client.connect(str(path))
            client.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            return b" 200 " in client.recv(64)
        except OSError:
            return False


def start(folder: Path | None = None, *options: str) -> subprocess.Popen[bytes] | None:
    """Start dockerd in the background unless it runs. Boxes have no network, so it sets up none.

    With a ``folder`` it is a daemon apart from the machine's: all it has lies there, the ``docker.sock`` it listens on
    too (``Container(socket=...)``), and whoever started it ends it. The daemon outlives this process.
    ``SandboxUnavailable`` says what is missing, or where its log is.
    """
    path = folder / "docker.sock" if folder else SOCKET
    if is_running(path):
        return None
    if shutil.which("dockerd") is None:
        raise SandboxUnavailable(f"no Docker daemon answers at {path}, and dockerd is not installed; {INSTALL}")
    if os.geteuid() != 0:
        raise SandboxUnavailable(f"no Docker daemon answers at {path}; as root: systemctl start docker")
    state = folder or Path("/run")
    for stale in ("docker.pid", "docker/containerd/containerd.pid"):
        _remove_stale(state / stale)
    argv = ["dockerd", f"--host=unix://{path}", f"--pidfile={state / 'docker.pid'}", f"--exec-root={state / 'docker'}"]
    argv += ["--bridge=none", "--iptables=false", "--ip-forward=false", *options]
    argv += [f"--data-root={folder / 'data'}"] if folder else []
    log_path = (folder or build.cache()) / "dockerd.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    # It is nobody's: what this process is called must not stick to it.
    env = {name: value for name, value in os.environ.items() if name != owners.TAG}
    with log_path.open("ab") as log:
        daemon = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
        )
    deadline = time.monotonic() + START_DEADLINE_S
    while not is_running(path):
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise SandboxUnavailable(f"dockerd did not come up; its log is {log_path}")
        time.sleep(0.1)
    return daemon


def _remove_stale(pid_file: Path) -> None:
    """A daemon that was killed leaves its pid file, and the next one refuses to start over it."""
    try:
        pid = int(pid_file.read_text())
    except (OSError, ValueError):
        return
    deadline = time.monotonic() + STALE_DEADLINE_S
    while owners.is_alive(pid):
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)
    pid_file.unlink(missing_ok=True)


if __name__ == "__main__":
    start()
    if build.find("default") is None:
        build.build()
