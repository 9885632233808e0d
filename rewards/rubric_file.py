"""Rubrics as TOML: reading, and saying where a mistake is."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from posttrain.errors import RecipeError

_TABLE = re.compile(r"^\s*\[(?:\[\s*(?P<list>[\w.]+)\s*\]|\s*(?P<single>[\w.]+)\s*)\]")
_LONG_STRING = re.compile(r'""".*?"""|\'\'\'.*?\'\'\'', re.DOTALL)
_SYNTAX_LINE = re.compile(r"at line (\d+)")


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing that is wrong in a file."""

    line: int
    """From 1."""
    field: str
    """Dotted, such as ``criteria.2.weight``."""
    message: str


def rubric_source(path_or_name: str | Path) -> tuple[str, str]:
    """Where a rubric lies and its text: a file, or the name of one that comes with this package."""
    path = Path(path_or_name)
    if path.suffix == ".toml":
        try:
            return str(path), path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise RecipeError(
                f"rubric {str(path)!r} cannot be read: {reason}; expected a TOML file in UTF-8"
            ) from error
    folder = resources.files("rewards") / "rubrics"
    names = sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))
    if str(path) not in names:
        raise RecipeError(
            f"rubric {str(path)!r} is not there; expected a path that ends in .toml or one of {', '.join(names)}"
        )
    return f"{path}.toml", (folder / f"{path}.toml").read_text(encoding="utf-8")


def parse_toml(source: str, text: str) -> dict[str, Any]:
    """The file's tables. A syntax error becomes a ``RecipeError`` with its line."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"rubric {source}: not valid TOML: {error}") from error


def dump_toml(data: Mapping[str, Any]) -> str:
    """TOML of JSON data: plain values, then tables, then lists of tables, whose own tables are inline."""
    plain = {key: value for key, value in data.items() if not _is_table(value) and not _is_tables(value)}
    parts = ["".join(f"{_toml_key(key)} = {_toml(value)}\n" for key, value in plain.items())]
    for key, value in data.items():
        if _is_table(value):
            parts.append(f"[{_toml_key(key)}]\n" + "".join(f"{_toml_key(k)} = {_toml(v)}\n" for k, v in value.items()))
        elif _is_tables(value):
            for table in value:
                rows = "".join(f"{_toml_key(k)} = {_toml(v)}\n" for k, v in table.items())
                parts.append(f"[[{_toml_key(key)}]]\n{rows}")
    return "\n".join(filter(None, parts))


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_table, value))


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def _toml(value: Any) -> str:
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for one character that JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml_key(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise ValueError(f"{value!r} is nothing that TOML can hold")


def syntax_line(error: Exception, text: str) -> int:
    """Line, from 1, that a TOML syntax error names; the last where it is the end of the document."""
    match = _SYNTAX_LINE.search(str(error))
    return int(match[1]) if match else text.rstrip().count("\n") + 1


def explain_errors(source: str, text: str, error: ValidationError) -> RecipeError:
    """All validation errors in one message, a line each: file, line number, field, what is wrong."""
    lines = [f"{source}:{found.line}: {found.field}: {found.message}" for found in mistakes(text, error)]
    return RecipeError("rubric is not valid\n" + "\n".join(lines))


def mistakes(text: str, error: ValidationError) -> list[Mistake]:
    """What a validation found, with the lines of the TOML text."""
    found = []
    for item in error.errors(include_url=False):
        location = item["loc"]
        field = ".".join(map(str, location)) or "rubric"
        message = "unknown key" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
        given = "" if isinstance(item["input"], dict) or item["type"] == "missing" else f" (found {item['input']!r})"
        found.append(Mistake(line_of(text, location), field, message + given))
    return found


def line_of(text: str, location: Sequence[str | int]) -> int:
    """Line, from 1, of a field such as ``("criteria", 2, "weight")``, or of its table when the key is not there."""
    table = str(location[0]) if location and (len(location) > 1) else ""
    index = next((part for part in location[1:2] if isinstance(part, int)), 0)
    keys = [part for part in location if isinstance(part, str)]
    key = keys[-1] if keys else ""
    current, seen, table_line = "", {"": 0}, 1
    for number, line in enumerate(_without_long_strings(text).split("\n"), start=1):
        header = _TABLE.match(line)
        if header:
            current = header["list"] or header["single"]
            seen[current] = seen.get(current, -1) + 1
        inside = current == table and seen[current] == index
        if inside and header:
            table_line = number
        if inside and re.match(rf'\s*"?{re.escape(key)}"?\s*=', line):
            return number
        if not table and header and current == key:
            return number
    return table_line


def _without_long_strings(text: str) -> str:
    """The text with the contents of strings over several lines gone and their line breaks kept."""
    return _LONG_STRING.sub(lambda match: '""' + "\n" * match.group().count("\n"), text)
