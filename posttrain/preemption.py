"""SIGTERM: the run is to make room, and will be resumed.

It is heard at once while rollouts are waited for, and after an optimizer step that is under way.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from posttrain.errors import Preempted


class Preemption:
    """Turns SIGTERM into ``Preempted``, not in the midst of what must be whole."""

    def __init__(self) -> None:
        self._asked = False
        self._busy = False

    def listen(self) -> None:
        """From now on; to be called in the main thread."""
        signal.signal(signal.SIGTERM, self._hear)

    @contextlib.contextmanager
    def postponed(self) -> Iterator[None]:
        """What is inside is finished first."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def check(self) -> None:
        """Raise ``Preempted`` if it was asked for meanwhile."""
        if self._asked:
            raise Preempted

    def _hear(self, number: int, frame: object) -> None:
        self._asked = True
        if not self._busy:
            raise Preempted


PREEMPTION = Preemption()
"""That of this process, which has one SIGTERM."""
