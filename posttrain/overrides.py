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

_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_NO_SECTION = ("model_type", "dataclass_type")
"""Kinds of pydantic error: a field that does not exist; a plain value where a section with fields belongs."""


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
    owner = ".".join(path.split(".")[: -len(keys)])
    raise RecipeError(
        f"override {path}={text}: {owner} = {value!r:.80} is of type {type(value).__name__} and has no field "
        f"{keys[0]!r}; set it as a whole ({owner}=...) or in the recipe"
    )


def _set_in_model(value: BaseModel, keys: Sequence[str], text: str, path: str) -> BaseModel:
    name = _known(keys[0], type(value).model_fields, type(value).__name__, path)
    current = getattr(value, name)
    if len(keys) > 1 and current is None:
        current = _defaults_of(type(value).model_fields[name].annotation, name, path)
    new = _set(current, keys[1:], text, path) if len(keys) > 1 else _literal(text)
    try:
        return value.replace(**{name: new}) if isinstance(value, Value) else value.model_copy(update={name: new})
    except ValidationError as failure:
        problems = explain(failure, type(value), siblings=True)
        raise RecipeError(f"override {path}={text}: {problems}") from None


def _set_in_mapping(value: Mapping[str, Any], keys: Sequence[str], text: str, path: str) -> dict[str, Any]:
    chosen = list(value) if keys[0] == "*" else [_known(keys[0], value, "mapping", path)]
    if len(keys) == 1:
        fields = _fields_of(type(next(iter(value.values()), None)))
        raise RecipeError(f"override {path}={text}: {path} is a whole entry; name one of its fields.{_listed(fields)}")
    return {key: _set(entry, keys[1:], text, path) if key in chosen else entry for key, entry in value.items()}


def _set_in_dataclass(value: Any, keys: Sequence[str], text: str, path: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(value) if field.init}
    name = _known(keys[0], fields, type(value).__name__, path)
    if len(keys) > 1:
        return dataclasses.replace(value, **{name: _set(getattr(value, name), keys[1:], text, path)})
    try:
        annotation = get_type_hints(type(value))[name]
        # Pydantic refuses a configuration for a class that can have one of its own.
        config = None if _fields_of(annotation) else ConfigDict(arbitrary_types_allowed=True)
        converted = TypeAdapter(annotation, config=config).validate_python(_literal(text))
        return dataclasses.replace(value, **{name: converted})
    except ValidationError as failure:
        problems = explain(failure, type(value), within=(name,), siblings=True)
        raise RecipeError(f"override {path}={text}: {problems}") from None
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
    sections = [option for option in options if isinstance(option, type) and issubclass(option, Value)]
    if len(sections) == 1:
        with contextlib.suppress(ValidationError):
            return sections[0]()
    raise RecipeError(
        f"override {path}: {name} is not set in this recipe and has no defaults to start from; set it in the recipe"
    )


def _known(name: str, fields: Iterable[str], owner: str, path: str) -> str:
    fields = list(fields)
    if name in fields:
        return name
    raise RecipeError(f"override {path}: {_no_field(name, fields, owner)}")


def _no_field(name: str, fields: Iterable[str], owner: str) -> str:
    close = difflib.get_close_matches(name, fields, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{owner} has no field {name!r}{hint}{_listed(fields)}"


def _listed(fields: Iterable[str]) -> str:
    names = ", ".join(sorted(fields))
    return f" Fields: {names}" if names else ""


def explain(
    failure: ValidationError, owner: type | str, *, within: tuple[str, ...] = (), siblings: bool = False
) -> str:
    """One line per problem: the field, the value given, what was expected; for an unknown field those that exist.

    ``owner`` is the class that was to be made, or its name; ``within`` is the field of it that was validated alone.
    ``siblings`` lists the fields beside an ill-typed one too.
    """
    return "\n".join(_problem(dict(error), owner, within, siblings) for error in failure.errors(include_url=False))


def _problem(error: Mapping[str, Any], owner: type | str, within: tuple[str, ...], siblings: bool) -> str:
    # A part with a bracket is no field but the alternative of a union, such as is-instance[Reward].
    loc = [str(part) for part in (*within, *error["loc"]) if "[" not in str(part)]
    parent, where = (".".join([getattr(owner, "__name__", str(owner)), *keys]) for keys in (loc[:-1], loc))
    kind, message = error["type"], str(error["msg"])
    if kind == "value_error":
        # A validator of ours, whose message says it all.
        return (f"{where}: " if loc else "") + message.removeprefix("Value error, ")
    if kind == "missing":
        return f"{where} is missing; give it a value"
    given = f"{where} = {error['input']!r:.100}"
    if kind in _UNKNOWN:
        return f"{given}: {_no_field(loc[-1], _fields_at(owner, loc[:-1]), parent)}"
    fields = _fields_at(owner, loc if kind in _NO_SECTION else loc[:-1])
    shown = _listed(fields) if siblings or kind in _NO_SECTION else ""
    return f"{given}: {message.replace('Input should be', 'expected')}" + (shown and f".{shown}")


def _fields_at(owner: type | str, loc: Sequence[str]) -> set[str]:
    """Names of the fields that exist where ``loc`` leads to, from ``owner`` on."""
    kinds: list[Any] = [owner]
    for key in loc:
        inner = [kind for outer in kinds for kind in _kinds_in(_fields_of(outer).get(key))]
        # The key of a mapping or the place in a list leads to the same classes.
        kinds = inner or kinds
    return {name for kind in kinds for name in _fields_of(kind)}


def _kinds_in(annotation: Any) -> list[Any]:
    """The classes with fields that an annotation is made of."""
    if _fields_of(annotation):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _kinds_in(part)]


def _fields_of(kind: Any) -> dict[str, Any]:
    """Field -> annotation of a pydantic class or a dataclass; empty for everything else."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: info.annotation for name, info in kind.model_fields.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
    return {}
