"""A recipe as data a person can read: what ``recipe.json`` and the report show."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType
from typing import Any

from pydantic import BaseModel

from posttrain.runs.durable import plain


def describe(value: Any) -> Any:
    """JSON data for a recipe value or anything inside one; equal values give equal data in every process.

    Objects become ``{"type": "module.Class", field: ...}``, functions and classes their import path, and
    bytes their length and SHA-256, so nothing depends on a memory address.
    """
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, Enum)):
        return plain(value)
    if isinstance(value, Enum):
        return describe(value.value)
    if isinstance(value, bytes):
        return f"{len(value)} bytes, sha256 {hashlib.sha256(value).hexdigest()}"
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return _name(value)
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(describe, value), key=str)
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    return {"type": _name(type(value)), **{name: describe(item) for name, item in _fields(value)}}


def first_difference(old: Any, new: Any, where: str = "") -> str | None:
    """Dotted path and both values of the first place where two JSON values differ; None when they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            found = first_difference(old.get(key), new.get(key), f"{where}.{key}" if where else key)
            if found:
                return found
        return None
    return None if old == new else f"{where or 'recipe'} was {old!r} and is {new!r}"


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, BaseModel):
        names = list(type(value).model_fields)
    elif dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    else:
        names = sorted(name for name in getattr(value, "__dict__", {}) if not name.startswith("_"))
    return ((name, getattr(value, name)) for name in names)
