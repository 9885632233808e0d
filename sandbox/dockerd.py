"""Starts a Docker daemon where there should be one and is none; as a program, also builds the sandbox image."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from posttrain.errors import SandboxUnavailable
from sandbox.images import build

SOCKET = Path("/var/run/docker.sock")
INSTALL = "install Docker (Debian: apt-get install docker.io) and the Python SDK (pip install 'docker>=7.1')"
START_DEADLINE_S = 40.0


def is_running() -> bool:
    """Whether a daemon accepts connections on the local socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(2)
        try:
            client.connect(str(SOCKET))
        except OSError:
            return False
        return True


def start() -> None:
    """Start dockerd in the background unless it runs. Boxes have no network, so it sets up none.

    The daemon outlives this process. ``SandboxUnavailable`` says what is missing, or where its log is.
    """
    if is_running():
        return
    if shutil.which("dockerd") is None:
        raise SandboxUnavailable(f"no Docker daemon answers at {SOCKET}, and dockerd is not installed; {INSTALL}")
    if os.geteuid() != 0:
        raise SandboxUnavailable(f"no Docker daemon answers at {SOCKET}; as root: systemctl start docker")
    log_path = build.cache() / "dockerd.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    for stale in ("/var/run/docker.pid", "/var/run/docker/containerd/containerd.pid"):
        _remove_stale(Path(stale))
    argv = ["dockerd", "--host", f"unix://{SOCKET}", "--bridge=none", "--iptables=false", "--ip-forward=false"]
    with log_path.open("ab") as log:
        daemon = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + START_DEADLINE_S
    while not is_running():
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise SandboxUnavailable(f"dockerd did not come up; its log is {log_path}")
        time.sleep(0.1)


def _remove_stale(pid_file: Path) -> None:
    """A daemon that was killed leaves its pid file, and the next one refuses to start over it."""
    try:
        pid = pid_file.read_text().strip()
    except OSError:
        return
    if not Path("/proc", pid).exists():
        pid_file.unlink(missing_ok=True)


if __name__ == "__main__":
    start()
    if build.find("default") is None:
        build.build()
