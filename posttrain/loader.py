"""Finds recipes: a module name, a short name, a file, or ``module:function``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pydantic

from posttrain import config
from posttrain.config import Recipe, Value
from posttrain.errors import RecipeError
from posttrain.overrides import apply_overrides, explain

_VALIDATION = (str(Path(pydantic.__file__).parent), config.__file__)
"""Files that stand between a recipe and the complaint about one of its values."""


def list_recipes() -> dict[str, str]:
    """Short name -> first line of the docstring, for every module of ``recipes`` that has ``recipe()``."""
    import recipes

    found = {}
    for info in pkgutil.iter_modules(recipes.__path__):
        source = Path(next(iter(recipes.__path__)), f"{info.name}.py")
        if not info.ispkg and "def recipe(" in source.read_text(encoding="utf-8"):
            try:
                module = importlib.import_module(f"recipes.{info.name}")
            except pydantic.ValidationError as failure:
                raise _wrong_value(f"recipes.{info.name}", failure) from failure
            found[info.name] = (inspect.getdoc(module) or "").partition("\n")[0]
    return found


def load_recipe(target: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe ``target`` names, with overrides applied.

    ``target`` is a short name (``quickstart``), a module (``recipes.quickstart``, ``my_company.runs``), a file
    (``./my_recipe.py``), any of them with ``:function``. Raises ``RecipeError``.
    """
    try:
        return apply_overrides(_build(target), overrides)
    except pydantic.ValidationError as failure:
        raise _wrong_value(target, failure) from failure


def _build(target: str) -> Recipe:
    where, _, function = target.partition(":")
    module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    build: Callable[[], Recipe] | None = getattr(module, function or "recipe", None)
    if build is None:
        raise RecipeError(f"recipe {target!r}: {module.__name__} has no function {function or 'recipe'}()")
    made = build()
    if not isinstance(made, Recipe):
        raise RecipeError(f"recipe {target!r}: {build.__name__}() returned {type(made).__name__}, expected a Recipe")
    return made


def _wrong_value(target: str, failure: pydantic.ValidationError) -> RecipeError:
    """What pydantic found wrong, by field, and which line gave it that."""
    frames = traceback.extract_tb(failure.__traceback__)
    line = [frame for frame in frames if not frame.filename.startswith(_VALIDATION)][-1]
    # Pydantic tells the class by its name only.
    owner = next((kind for kind in _kinds(Value) if kind.__name__ == failure.title), failure.title)
    return RecipeError(f"recipe {target!r}, line {line.lineno} of {line.filename}: {explain(failure, owner)}")


def _kinds(base: type[Value]) -> Iterator[type[Value]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _kinds(kind)


def _load_module(name: str) -> ModuleType:
    candidates = [name] if "." in name else [f"recipes.{name}", name]
    for candidate in candidates:
        try:
            return importlib.import_module(candidate)
        except ModuleNotFoundError as missing:
            # Only the recipe itself may be missing; a missing import inside it must be seen.
            if missing.name is None or not (candidate == missing.name or candidate.startswith(f"{missing.name}.")):
                raise
    known = list_recipes()
    close = difflib.get_close_matches(name.rpartition(".")[2], known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise RecipeError(
        f"unknown recipe {name!r}.{hint} Recipes: {', '.join(sorted(known))}. A file (./my_recipe.py) or a module "
        "(my_company.runs:long_math) works too"
    )


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RecipeError(f"recipe file {path} does not exist; give a path to a Python file with recipe()")
    # Workers unpickle what the recipe holds, so they must be able to import the module by name as well.
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"recipe file {path} cannot be loaded as a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
