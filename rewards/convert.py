"""``posttrain rewards convert``: rubrics from and to the formats of others, without a change or with the reason."""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import RecipeError
from rewards.formats import FORMATS, Format, Pitfalls
from rewards.rows import read_jsonl
from rewards.rubric import Rubric, dump_rubric
from rewards.rubric_file import dump_toml

_WHOLE_FILE = "verifiers"
"""The format in which a file is one rubric and not one a row."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Hang ``convert`` on the command line."""
    text = "Convert rubrics from or to HealthBench, RaR, Prometheus (JSON Lines) and verifiers (TOML or JSON)."
    epilog = "Exit code: 1 when a row does not fit; then nothing is written, unless --skip leaves such rows out."
    parser = commands.add_parser("convert", help=text, description=text, epilog=epilog)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", choices=tuple(FORMATS), dest="source", help="format of the input")
    direction.add_argument("--to", choices=tuple(FORMATS), dest="target", help="format of the output")
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--pitfalls",
        choices=("refuse", "avoidance", "penalty"),
        default="refuse",
        help="RaR items with a negative weight and a negated wording: refuse them, or meeting them is good "
        "(avoidance), or bad (penalty)",
    )
    parser.add_argument("--skip", action="store_true", help="leave out rows that do not fit")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    found = FORMATS[arguments.source or arguments.target]
    rows = _read_whole(arguments.input) if found.name == _WHOLE_FILE else read_jsonl(arguments.input)
    converted, refused = [], 0
    for number, row in rows:
        try:
            data = _convert(row, found, arguments.source is not None, arguments.pitfalls)
            json.dumps(data, ensure_ascii=False).encode()  # half a surrogate pair could not be written
            converted.append(data)
        except (ValueError, KeyError, TypeError) as error:
            refused += 1
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            print(f"{arguments.input}:{number}: {reason}", file=sys.stderr)
    if refused and not arguments.skip:
        print(f"{refused} of {refused + len(converted)} do not fit; nothing was written", file=sys.stderr)
        return 1
    if found.name == _WHOLE_FILE:
        _write_whole(arguments.output, converted)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in converted]
        arguments.output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(converted)} converted, {refused} left out: {arguments.output}")
    return 0


def _convert(row: Mapping[str, Any], found: Format, reads: bool, pitfalls: Pitfalls) -> dict[str, Any]:
    if found.name != _WHOLE_FILE:
        return found.read(row, pitfalls) if reads else found.write(row)
    return (
        dict(found.read(row)["rubric"])
        if reads
        else found.write({"rubric": dump_rubric(Rubric.of_data(row, "rubric"))})
    )


def _read_whole(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """A TOML or JSON file as a single row; a bare list in JSON is its criteria."""
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{str(path)!r} cannot be read: {error}; expected a TOML or JSON file") from error
    yield 1, data if isinstance(data, dict) else {"criteria": data}


def _write_whole(path: Path, converted: list[dict[str, Any]]) -> None:
    for data in converted:
        text = dump_toml(data) if path.suffix == ".toml" else json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
