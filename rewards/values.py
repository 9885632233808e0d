"""Plain Python values on their way out of a sandbox: read without trust and compared with exact types."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from typing import Any

MALFORMED = object()
"""What ``read_value`` gives for anything that is not a well-formed value."""

_NAMED_FLOATS = {"nan": math.nan, "inf": math.inf}


class _NameFloats(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_NAMED_FLOATS[node.id]) if node.id in _NAMED_FLOATS else node


def parse_literal(text: str) -> Any:
    """A Python literal, in which ``nan`` and ``inf`` are floats. Raises ``ValueError`` or ``SyntaxError``."""
    return ast.literal_eval(_NameFloats().visit(ast.parse(text.strip(), mode="eval")))


def read_value(tagged: Any) -> Any:
    """The value of a ``[type name, payload]`` pair, containers nested; ``MALFORMED`` for anything else."""
    try:
        return _read(tagged)
    except (ValueError, TypeError, KeyError, RecursionError):
        return MALFORMED


def _read(tagged: Any) -> Any:
    kind, payload = tagged
    return _READERS[kind](payload)


def _exactly(kind: type) -> Callable[[Any], Any]:
    def check(payload: Any) -> Any:
        if type(payload) is not kind:
            raise ValueError(f"payload is no {kind.__name__}")
        return payload

    return check


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "NoneType": _exactly(type(None)),
    "bool": _exactly(bool),
    "str": _exactly(str),
    "int": lambda payload: int(_exactly(str)(payload)),
    "float": lambda payload: float(_exactly(str)(payload)),
    "complex": lambda payload: complex(_exactly(str)(payload)),
    # In hex, since a parser of Python has too many ways to fail on a text that was made to break it.
    "bytes": bytes.fromhex,
    "list": lambda payload: [_read(item) for item in payload],
    "tuple": lambda payload: tuple(_read(item) for item in payload),
    "set": lambda payload: {_read(item) for item in payload},
    "frozenset": lambda payload: frozenset(_read(item) for item in payload),
    "dict": lambda payload: {_read(key): _read(item) for key, item in payload},
}


def same_value(expected: Any, found: Any) -> bool:
    """Equal values of equal types, all the way down.

    An int and a float are both numbers and compare as such, floats to a relative 1e-9; nan equals nan; a bool is
    never a number. Dictionaries and sets ignore order, but the type of a key counts.
    """
    if isinstance(expected, float) or isinstance(found, float):
        return _number(expected) and _number(found) and _same_number(expected, found)
    if type(expected) is not type(found):
        return False
    if isinstance(expected, list | tuple):
        return len(expected) == len(found) and all(map(same_value, expected, found))
    if isinstance(expected, dict):
        originals = {key: key for key in found}
        return len(expected) == len(found) and all(
            key in originals and same_value(key, originals[key]) and same_value(item, found[key])
            for key, item in expected.items()
        )
    if isinstance(expected, set | frozenset):
        originals = {item: item for item in found}
        return len(expected) == len(found) and all(
            item in originals and same_value(item, originals[item]) for item in expected
        )
    return bool(expected == found)


def near(expected: Any, found: Any, tolerance: float) -> bool:
    """Two numbers, neither of them a bool, whose difference is at most ``tolerance``; so in lists and tuples."""
    if isinstance(expected, list | tuple):
        return (
            type(expected) is type(found)
            and len(expected) == len(found)
            and all(near(one, other, tolerance) for one, other in zip(expected, found, strict=True))
        )
    if not (_number(expected) and _number(found)):
        return same_value(expected, found)
    try:
        return abs(expected - found) <= tolerance
    except OverflowError:  # an int beyond the range of floats
        return False


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _same_number(expected: float, found: float) -> bool:
    try:
        both_nan = math.isnan(expected) and math.isnan(found)
        return both_nan or math.isclose(expected, found, rel_tol=1e-9)
    except OverflowError:  # an int beyond the range of floats
        return False
