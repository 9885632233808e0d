"""Skips what cannot open its boxes here, with the reason, and remembers whether anything could."""

from __future__ import annotations

import os
from typing import TypeVar

import pytest

from posttrain.errors import SandboxUnavailable
from posttrain.protocols import Substrate
from sandbox import dockerd
from sandbox.container import Container

S = TypeVar("S", bound=Substrate)
possible: set[str] = set()
skipped: dict[str, str] = {}
"""Kind of box -> why there is none here."""


def require(substrate: S) -> S:
    """The same, if its boxes can be opened here; else the test is skipped. It starts Docker's daemon when needed."""
    try:
        if isinstance(substrate, Container) and substrate.socket == str(dockerd.SOCKET) and os.geteuid() == 0:
            dockerd.start()
        substrate.check()
    except SandboxUnavailable as reason:
        skipped[substrate.name] = str(reason)
        pytest.skip(str(reason))
    possible.add(substrate.name)
    return substrate


def all_were_skipped() -> str:
    """Why a session of tests has shown nothing of boxes: each kind was asked for in vain. Empty when one was not."""
    if possible or not skipped:
        return ""
    return "\n".join(f"{name}: {reason}" for name, reason in skipped.items())
