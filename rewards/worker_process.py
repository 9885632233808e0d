"""The process behind ``rewards.worker_pool``: ``python -P worker_process.py KIND CPU_S MEMORY_MB``.

It imports none of our packages, reads length-prefixed pickles from its parent and answers each with one line of JSON.
The CPU limit of a check is a profiling timer with its default action, which is to end the process: it fires in the
middle of C code too, and needs nobody outside to watch.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

Check = Callable[..., tuple[float, str]]


def main(kind: str, cpu_s: float, memory_mb: int) -> None:
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # Whatever a library prints must not look like a reply.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    check = {"math": math_check, "puzzle": puzzle_check}[kind]()
    size = memory_mb << 20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    while header := requests.read(8):
        request = pickle.loads(requests.read(struct.unpack("<Q", header)[0]))
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        last = False
        try:
            value, reason = check(**request)
        except MemoryError:
            # What the allocation left behind is unknown, so this process serves no more.
            value, reason, last = 0.0, "checking it takes too much memory", True
        except Exception as error:  # noqa: BLE001 - a parser may raise anything at a text that was made to break it
            value, reason = 0.0, f"it cannot be read ({type(error).__name__})"
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply = {"value": value, "reason": reason, "last": last}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()
        if last:
            return


def math_check() -> Check:
    """``check(gold=, answer=)``: are they the same mathematical object?"""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    # Not its plain numbers, which of "41 or 42" would take the last.
    configs = [LatexExtractionConfig()]

    def read(text: str) -> list[Any]:
        # Without a timeout: theirs is an alarm signal, ours is the timer above.
        return parse(f"${text}$", extraction_config=configs, parsing_timeout=None, fallback_mode="no_fallback")

    def check(*, gold: str, answer: str) -> tuple[float, str]:
        expected = read(gold)
        if not expected or not verify(expected, expected, timeout_seconds=None):
            return 0.0, "the reference is no formula, and as text it is another"
        found = read(answer)
        if not found:
            return 0.0, "it is no formula"
        # The reference goes first: the comparison is not symmetric.
        same = verify(expected, found, timeout_seconds=None)
        return float(same), "it is equal" if same else "it is not equal"

    return check


def puzzle_check() -> Check:
    """``check(dataset=, entry=, answer=)``: reasoning-gym's own score. Raises what its scorer raises."""
    import reasoning_gym.factory

    scorers: dict[str, Any] = {}

    def check(*, dataset: str, entry: Any, answer: str) -> tuple[float, str]:
        if dataset not in scorers:
            scorers[dataset] = reasoning_gym.factory.get_score_answer_fn(dataset)
        try:
            return float(scorers[dataset](answer, entry)), ""
        except Exception as error:
            if entry["answer"] is not None and not re.match("MemoryError|RecursionError", type(error).__name__):
                # Fails at its own reference too? Then the entry is to blame, which only the caller may say.
                try:
                    scorers[dataset](entry["answer"], entry)
                except Exception as own:  # noqa: BLE001 - whatever it is, it is reported
                    return -1.0, f"{type(own).__name__}: {own}"
            raise

    return check


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
