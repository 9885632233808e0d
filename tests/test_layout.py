"""The rules of the house that break users when broken: import direction, names, lightness, pickling."""

import ast
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.loader import list_recipes, load_recipe

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "posttrain": set(),
    "teachers": {"posttrain"},
    "rewards": {"posttrain"},
    "sandbox": {"posttrain"},
    "recipes": {"posttrain", "teachers", "rewards", "sandbox"},
}
# Only the loader looks into the recipes, and the command line checks whose packages these are.
FINDS_RECIPES = {"posttrain/loader.py"}


def test_names_are_ours():
    homes = {Path(importlib.import_module(name).__file__).parent.parent for name in MAY_IMPORT}
    assert homes == {ROOT}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        where = str(path.relative_to(ROOT))
        allowed = MAY_IMPORT[package] | {package} | ({"recipes"} if where in FINDS_RECIPES else set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            reached = {module.split(".")[0] for module in modules} & set(MAY_IMPORT)
            assert reached <= allowed, f"{where} imports {reached - allowed}"


def test_only_actor_modules_import_ray():
    users = {
        str(path.relative_to(ROOT))
        for package in MAY_IMPORT
        for path in (ROOT / package).rglob("*.py")
        if any(line.split()[:2] in (["import", "ray"], ["from", "ray"]) for line in path.read_text().splitlines())
    }
    actors = {"posttrain/rollout/actors.py", "posttrain/rollout/service.py", "sandbox/actors.py", "sandbox/service.py"}
    # What actors return is referred to by objects of Ray.
    assert users <= actors | {"posttrain/rollout/ray_store.py"}


def test_importing_posttrain_stays_light():
    heavy = ("torch", "ray", "trl", "transformers")
    code = f"import sys, posttrain, posttrain.config; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_every_recipe_loads_and_pickles(name):
    recipe = load_recipe(name)
    assert pickle.loads(pickle.dumps(recipe)).name == recipe.name
