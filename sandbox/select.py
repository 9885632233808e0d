"""Picks the kind of box this machine can open."""

from __future__ import annotations

from posttrain.errors import SandboxUnavailable
from sandbox.container import Container
from sandbox.process import Process


def default_substrate() -> Process | Container:
    """``Process`` where it works, else ``Container``. Never an unisolated one: that must be asked for by name."""
    problems = []
    for substrate in (Process(), Container()):
        try:
            substrate.check()
        except SandboxUnavailable as error:
            problems.append(str(error))
        else:
            return substrate
    raise SandboxUnavailable(
        "no sandbox can run on this machine. Do one of these:\n"
        + "\n".join(f"- {problem}" for problem in problems)
        + "\n- only if the code is trusted, run it without isolation: "
        "sandbox.local.LocalUnsafe(i_accept_that_model_written_code_runs_unisolated=True)"
    )
