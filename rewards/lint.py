"""Finds what is wrong with a rubric before a judge is asked: traps that cost reward runs, each with its line.

An ``error`` makes a rubric unusable or certain to mislead; a ``warning`` is a wording that often does. A comment
``# lint: ignore[rule]`` inside a criterion's table silences a rule there, and above the first table everywhere.

What this does not cover: whether a judge agrees with people, which ``calibrate`` measures, and whether a policy can
earn without doing the work, which ``audit`` tries.
"""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from posttrain.errors import RecipeError
from rewards.rows import read_jsonl
from rewards.rubric import Rubric
from rewards.rubric_file import Mistake, line_of, mistakes, rubric_source, syntax_line
from rewards.traps import ERROR, WARNING, Trap, traps

_CORRELATED = 0.95
_IGNORE = re.compile(r"#\s*lint:\s*ignore\[([\w\s,-]+)\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing the linter has to say."""

    file: str
    line: int
    rule: str
    severity: str
    """``error`` or ``warning``."""
    message: str
    """What is wrong and what to do."""
    criterion: str | None = None

    def __str__(self) -> str:
        about = f" {self.criterion}:" if self.criterion else ""
        return f"{self.file}:{self.line}: {self.severity} [{self.rule}]{about} {self.message}"


def lint_file(path: str | Path, *, fields: Sequence[str] | None = None) -> list[Finding]:
    """Findings in a TOML rubric, or in every row of a ``.jsonl`` file whose rows have a ``rubric``.

    ``fields`` are those the tasks have in ``info``; None leaves placeholders unchecked. Raises ``RecipeError`` for a
    file that cannot be read.
    """
    if Path(path).suffix == ".jsonl":
        return _lint_rows(Path(path), fields)
    source, text = rubric_source(path)
    return lint_text(source, text, fields=fields)


def lint_text(source: str, text: str, *, fields: Sequence[str] | None = None) -> list[Finding]:
    """Findings in the text of a TOML rubric, by line. ``source`` is the name they carry."""
    try:
        rubric = Rubric.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        return [_invalid(source, Mistake(syntax_line(error, text), "rubric", f"not valid TOML: {error}"))]
    except ValidationError as error:
        return [_invalid(source, mistake) for mistake in mistakes(text, error)]
    found = []
    for trap in traps(rubric, fields):
        location = ("criteria", trap.index, trap.key) if trap.index is not None else (trap.key,)
        criterion = None if trap.index is None else rubric.criteria[trap.index].id
        line = line_of(text, location)
        if trap.rule not in _ignored(text, line if trap.index is not None else 1, trap.index):
            found.append(_finding(source, line, trap, criterion))
    return sorted(found, key=lambda finding: (finding.line, finding.rule))


def lint_rubric(source: str, line: int, rubric: Rubric, *, fields: Sequence[str] | None = None) -> list[Finding]:
    """Findings in a rubric that is one row of a file."""
    return [
        _finding(source, line, trap, None if trap.index is None else rubric.criteria[trap.index].id)
        for trap in traps(rubric, fields)
    ]


def lint_scores(rubric: Rubric, source: str, rows: Sequence[Mapping[str, float | None]]) -> list[Finding]:
    """Findings in what a rubric's criteria scored on a sample, row by row as in ``Score.parts``.

    A criterion that always or never applies, or is never scored, teaches nothing; two that always agree count twice.
    """
    found: list[Trap] = []
    columns = {c.id: [row.get(c.id) for row in rows] for c in rubric.criteria}
    for index, criterion in enumerate(rubric.criteria):
        scored = [value for value in columns[criterion.id] if value is not None]
        if not scored:
            message = f"was scored on none of {len(rows)} rows; reword it so that a judge can decide"
            found.append(Trap("never-scored", ERROR, message, index))
        elif len(scored) >= 10 and len(set(scored)) == 1:
            rule = "always-met" if scored[0] > 0.5 else "never-met"
            message = f"is {scored[0]:g} on all {len(scored)} scored rows, so it tells none of them apart"
            found.append(Trap(rule, WARNING, message, index))
    for (_, first), (j, second) in combinations(enumerate(rubric.criteria), 2):
        correlation = _correlation(columns[first.id], columns[second.id])
        if correlation is not None and abs(correlation) > _CORRELATED:
            message = (
                f"goes with {first.id} (correlation {correlation:.2f} over the rows), so the same thing counts twice"
            )
            found.append(Trap("correlated", WARNING, message, j))
    return [
        _finding(source, 1, trap, rubric.criteria[trap.index].id if trap.index is not None else None) for trap in found
    ]


def _lint_rows(path: Path, fields: Sequence[str] | None) -> list[Finding]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"{str(path)!r} cannot be read: {reason}; expected a JSON Lines file in UTF-8") from error
    if not any(map(str.strip, lines)):
        raise RecipeError(f"{str(path)!r} has no rows; expected one JSON object with a 'rubric' a line")
    found: list[Finding] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rubric = Rubric.of_data(json.loads(line)["rubric"], f"line {number}")
        except (ValueError, KeyError, TypeError) as error:
            problem = f"no field {error}" if isinstance(error, KeyError) else str(error)
            found.append(_invalid(str(path), Mistake(number, "rubric", problem)))
        else:
            found += lint_rubric(str(path), number, rubric, fields=fields)
    return found


def _invalid(source: str, mistake: Mistake) -> Finding:
    message = f"{mistake.field}: {mistake.message}"
    return Finding(file=source, line=mistake.line, rule="invalid", severity=ERROR, message=message)


def _finding(source: str, line: int, trap: Trap, criterion: str | None) -> Finding:
    return Finding(
        file=source, line=line, rule=trap.rule, severity=trap.severity, message=trap.message, criterion=criterion
    )


def _ignored(text: str, line: int, index: int | None) -> set[str]:
    """Rules silenced by comments above the first table, or in the table around a line."""
    lines = text.split("\n")
    headers = [number for number, content in enumerate(lines, start=1) if re.match(r"\s*\[", content)]
    first = headers[0] if headers else len(lines) + 1
    inside = range(1, first)
    if index is not None and headers:
        start = max((number for number in headers if number <= line), default=1)
        end = min((number for number in headers if number > line), default=len(lines) + 1)
        inside = range(start, end)
    silenced: set[str] = set()
    for number in {*range(1, first), *inside}:
        for match in _IGNORE.finditer(lines[number - 1]):
            silenced |= {rule.strip() for rule in match[1].split(",")}
    return silenced


def _correlation(first: Sequence[float | None], second: Sequence[float | None]) -> float | None:
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if len(pairs) < 10:
        return None
    n = len(pairs)
    mean_a, mean_b = sum(a for a, _ in pairs) / n, sum(b for _, b in pairs) / n
    cross = sum((a - mean_a) * (b - mean_b) for a, b in pairs)
    spread = sum((a - mean_a) ** 2 for a, _ in pairs) * sum((b - mean_b) ** 2 for _, b in pairs)
    return cross / spread**0.5 if spread > 0 else None


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Hang ``lint`` on the command line."""
    text = "Find traps in rubrics, with their lines."
    parser = commands.add_parser("lint", help=text, description=text, epilog="Exit code: 1 when there are errors.")
    parser.add_argument(
        "rubrics", nargs="+", help="TOML files, JSON Lines files with a rubric a row, or packaged names"
    )
    parser.add_argument("--fields", metavar="A,B", help="fields of task.info, to check {placeholders} against")
    parser.add_argument("--scores", type=Path, help="what `score` wrote: also look at how the criteria came out")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for warnings, too")
    parser.add_argument("--json", action="store_true", help="findings as JSON Lines")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    fields = arguments.fields.split(",") if arguments.fields is not None else None
    found: list[Finding] = []
    for path in arguments.rubrics:
        found += lint_file(path, fields=fields)
        if arguments.scores is not None:
            found += lint_scores(Rubric.load(path), path, _read_parts(arguments.scores))
    for finding in found:
        print(json.dumps(asdict(finding)) if arguments.json else finding)
    num_errors = sum(finding.severity == ERROR for finding in found)
    if not arguments.json:
        print(f"{len(arguments.rubrics)} read: {num_errors} errors, {len(found) - num_errors} warnings")
    return int(num_errors > 0 or (arguments.strict and bool(found)))


def _read_parts(path: Path) -> list[dict[str, Any]]:
    rows = [row for _, row in read_jsonl(path)]
    if not rows or not all(isinstance(row.get("parts"), dict) for row in rows):
        raise RecipeError(f"{str(path)!r} has no rows with 'parts'; expected what `posttrain rewards score` wrote")
    return [row["parts"] for row in rows]
