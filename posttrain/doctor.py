"""Can this machine run a recipe? Each finding says what to do when the answer is no."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from posttrain.config import Recipe
from posttrain.errors import RecipeError, SandboxError


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    name: str
    ok: bool
    detail: str


def examine(recipe: Recipe) -> list[Finding]:
    """Python, packages, compute, memory, disk, the recipe's model, tasks and sandbox."""
    checks: tuple[tuple[str, Callable[[Recipe], str]], ...] = (
        ("python", _python),
        ("packages", _packages),
        ("compute", _compute),
        ("memory", _memory),
        ("disk", _disk),
        ("sandbox", _sandbox),
        ("recipe", _recipe),
    )
    return [_finding(name, check, recipe) for name, check in checks]


def _finding(name: str, check: Callable[[Recipe], str], recipe: Recipe) -> Finding:
    try:
        return Finding(name=name, ok=True, detail=check(recipe))
    except (RecipeError, SandboxError, OSError, ImportError) as problem:
        return Finding(name=name, ok=False, detail=str(problem))


def _python(_: Recipe) -> str:
    return f"{sys.version.split()[0]} at {sys.prefix}"


def _packages(_: Recipe) -> str:
    names = ("torch", "transformers", "trl", "accelerate", "ray", "datasets")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def _compute(_: Recipe) -> str:
    import torch

    from posttrain.models import has_native_bf16

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    bf16 = "native bfloat16" if has_native_bf16() else "no native bfloat16"
    return f"{os.cpu_count()} CPU cores, {bf16}, no GPU"


def _memory(_: Recipe) -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if total < 6 * 2**30:
        raise RecipeError(f"{total / 2**30:.1f} GiB of memory; the quickstart needs 6 GiB")
    return f"{total / 2**30:.1f} GiB"


def _disk(_: Recipe) -> str:
    free = shutil.disk_usage(Path.cwd()).free
    if free < 2 * 2**30:
        raise RecipeError(f"{free / 2**30:.1f} GiB free in {Path.cwd()}; expected at least 2 GiB")
    return f"{free / 2**30:.1f} GiB free"


def _sandbox(recipe: Recipe) -> str:
    if recipe.substrate is None:
        return "not needed by this recipe"
    recipe.substrate.check()
    capabilities = ", ".join(f"{key}={value}" for key, value in recipe.substrate.capabilities().items())
    return f"{recipe.substrate.name}: {capabilities}"


def _recipe(recipe: Recipe) -> str:
    from posttrain.preflight import check_recipe

    check_recipe(recipe)
    return f"{recipe.name}: model, tasks and windows fit"
