"""Typed dotted overrides of a recipe: ``--set domains.math.grpo.max_steps=10``.

A path walks pydantic values, mappings and dataclasses; pydantic converts and validates the text by the declared
type of the field. ``*`` stands for every key of a mapping. Nothing unknown is ignored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from posttrain.config import Value
from posttrain.errors import RecipeError

T = TypeVar("T")


def apply_overrides(value: T, overrides: Iterable[str]) -> T:
    """A copy of ``value`` with each ``path=text`` applied in order.

    Raises ``RecipeError`` naming the path, the text, what was expected and the fields that exist.
    """
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise RecipeError(f"override {override!r}: expected path=value, such as domains.math.grpo.max_steps=10")
        value = _set(value, path.strip().split("."), text.strip(), path.strip())
    return value


def _set(value: Any, keys: Sequence[str], text: str, path: str) -> Any:
    if isinstance(value, BaseModel):
        return _set_in_model(value, keys, text, path)
    if isinstance(value, Mapping):
        return _set_in_mapping(value, keys, text, path)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _set_in_dataclass(value, keys, text, path)
    raise RecipeError(f"override {path}={text}: {type(value).__name__} has no field {keys[0]!r}")


def _set_in_model(value: BaseModel, keys: Sequence[str], text: str, path: str) -> BaseModel:
    name = _known(keys[0], type(value).model_fields, type(value).__name__, path)
    current = getattr(value, name)
    if len(keys) > 1 and current is None:
        current = _defaults_of(type(value).model_fields[name].annotation, name, path)
    new = _set(current, keys[1:], text, path) if len(keys) > 1 else _literal(text)
    try:
        return value.replace(**{name: new}) if isinstance(value, Value) else value.model_copy(update={name: new})
    except ValidationError as failure:
        raise _ill_typed(path, text, failure) from None


def _set_in_mapping(value: Mapping[str, Any], keys: Sequence[str], text: str, path: str) -> dict[str, Any]:
    chosen = list(value) if keys[0] == "*" else [_known(keys[0], value, "mapping", path)]
    if len(keys) == 1:
        raise RecipeError(f"override {path}={text}: {path} is a whole entry; name one of its fields")
    return {key: _set(entry, keys[1:], text, path) if key in chosen else entry for key, entry in value.items()}


def _set_in_dataclass(value: Any, keys: Sequence[str], text: str, path: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(value) if field.init}
    name = _known(keys[0], fields, type(value).__name__, path)
    if len(keys) > 1:
        return dataclasses.replace(value, **{name: _set(getattr(value, name), keys[1:], text, path)})
    try:
        config = ConfigDict(arbitrary_types_allowed=True)
        annotation = get_type_hints(type(value))[name]
        converted = TypeAdapter(annotation, config=config).validate_python(_literal(text))
        return dataclasses.replace(value, **{name: converted})
    except ValidationError as failure:
        raise _ill_typed(path, text, failure) from None
    except ValueError as failure:
        raise RecipeError(f"override {path}={text}: {failure}") from None


def _literal(text: str) -> Any:
    """None, a JSON list or object, or the text itself, which pydantic converts."""
    if text.lower() in ("none", "null"):
        return None
    if text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as failure:
            raise RecipeError(f"override value {text!r} looks like JSON but is not: {failure}") from None
    return text


def _defaults_of(annotation: Any, name: str, path: str) -> Value:
    """The default value of an optional section, so that one of its fields can be set."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    for option in options:
        if isinstance(option, type) and issubclass(option, Value):
            with contextlib.suppress(ValidationError):
                return option()
    raise RecipeError(
        f"override {path}: {name} is not set in this recipe and has no defaults to start from; set it in the recipe"
    )


def _known(name: str, fields: Iterable[str], owner: str, path: str) -> str:
    fields = list(fields)
    if name in fields:
        return name
    close = difflib.get_close_matches(name, fields, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise RecipeError(f"override {path}: {owner} has no field {name!r}{hint} Fields: {', '.join(sorted(fields))}")


def _ill_typed(path: str, text: str, failure: ValidationError) -> RecipeError:
    problems = sorted({str(error["msg"]) for error in failure.errors()})
    return RecipeError(f"override {path}={text}: {'; '.join(problems)}")
