"""``posttrain rewards lint | score | audit | calibrate | convert``, the command line of rewards and rubrics.

A command is a module with ``add_parser(commands)``, which adds its parser and sets ``command`` to a function of the
parsed arguments that returns the exit code.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence

from posttrain.errors import JudgeError, RecipeError, SandboxError
from rewards import audit, calibrate, convert, lint, score

COMMANDS = (lint, score, audit, calibrate, convert)
"""In the order ``--help`` lists them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. 0 when all is well, 1 when what was looked at is not, 2 when it could not be looked at."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Texts of a policy may hold what UTF-8 cannot say.
            stream.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except BrokenPipeError:
        # Whoever reads has seen enough; Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except (RecipeError, JudgeError, SandboxError, OSError) as problem:
        print(f"posttrain rewards: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("posttrain rewards: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="posttrain rewards", description="Rubrics and rewards: check, measure, use.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
