"""The command line: ``posttrain list | show | run | eval | report | doctor``, and what other packages add to it.

A package adds a command with an entry point in the group ``posttrain.commands``, a function that takes the arguments
after the command's name and returns the exit code:

    [project.entry-points."posttrain.commands"]
    sandbox = "sandbox.cli:main"
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import Preempted, RecipeError, SandboxError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns 0, or 2 after a message when the input or the machine is at fault."""
    words = list(sys.argv[1:] if argv is None else argv)
    added = _added_commands()
    # Loading bars of the libraries below would tear up the progress lines of a run.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Torch reads this before its first allocation: a learner step maps and frees gigabytes, and with 4 KiB pages
    # the kernel spends a fifth of the step on page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        _check_names_are_ours()
        if words and words[0] in added:
            run: Callable[[Sequence[str]], int] = added[words[0]].load()
            return run(words[1:])
        arguments = _parser(added).parse_args(words)
        command: Callable[[argparse.Namespace], int] = arguments.command
        return command(arguments)
    except (RecipeError, SandboxError, OSError) as problem:
        print(f"posttrain: {problem}", file=sys.stderr)
        return 2
    except Preempted:
        print("posttrain: stopped by SIGTERM; `posttrain run --resume` goes on where it was", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("posttrain: interrupted; `posttrain run --resume` goes on from the last checkpoint", file=sys.stderr)
        return 130


def _added_commands() -> dict[str, importlib.metadata.EntryPoint]:
    """By name, what the installed packages have in the group of entry points."""
    return {point.name: point for point in importlib.metadata.entry_points(group="posttrain.commands")}


def _parser(added: Iterable[str] = ()) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="posttrain", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=run)
        return command

    add("list", _list, "List the recipes that come with the package.")
    for name, run, text in (
        ("show", _show, "Print a recipe with every setting resolved."),
        ("run", _run, "Run a recipe: train the specialists, merge them, prove the result."),
        ("eval", _eval, "Measure any checkpoint on the held-out tasks of a recipe."),
        ("doctor", _doctor, "Check that this machine can run a recipe."),
    ):
        command = add(name, run, text)
        default = {"nargs": "?", "default": "quickstart"} if name == "doctor" else {}
        command.add_argument("recipe", help="short name, module, module:function or file.py", **default)  # type: ignore[arg-type]
        command.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="overrides")
        if name == "run":
            command.add_argument("--run-dir", type=Path, help="where the run is kept (default: runs/<recipe name>)")
            command.add_argument("--resume", action="store_true", help="go on with the run in --run-dir")
        if name == "eval":
            command.add_argument("--model", required=True, help="checkpoint folder, hub name or package: path")
            command.add_argument("--run-dir", type=Path, help="keep the rollouts here (default: a temporary folder)")
            command.add_argument("--json", type=Path, help="also write the scores to this file")
    report = add("report", _report, "Write report.html, report.json and the plots of a run again.")
    report.add_argument("run_dir", type=Path)
    for name in added:
        commands.add_parser(name, help=f"See posttrain {name} --help.")
    return parser


def _list(_: argparse.Namespace) -> int:
    from posttrain.loader import list_recipes

    recipes = list_recipes()
    width = max(map(len, recipes), default=0)
    for name, summary in sorted(recipes.items()):
        print(f"{name:<{width}}  {summary}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from posttrain.loader import load_recipe
    from posttrain.pipeline import plan
    from posttrain.runs.describe import describe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    print(json.dumps(describe(recipe), indent=2))
    print(f"stages: {' -> '.join(stage.name for stage in plan(recipe))}", file=sys.stderr)
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from posttrain.loader import load_recipe
    from posttrain.pipeline import run_recipe
    from posttrain.preemption import PREEMPTION
    from posttrain.runs.progress import print_report

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    path = arguments.run_dir or Path("runs") / recipe.name
    PREEMPTION.listen()
    print_report(run_recipe(recipe, path, resume=arguments.resume))
    print(f"report: {path / 'report.html'}")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from posttrain.loader import load_recipe
    from posttrain.pipeline import evaluate_checkpoint
    from posttrain.runs.verdict import number

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    scores = evaluate_checkpoint(recipe, arguments.model, arguments.run_dir)
    for entry in scores:
        low, high = entry["sampled_ci"]
        print(
            f"{entry['domain']:<12} n={entry['n']:<5} sampled {entry['sampled']:.3f} [{low:.3f}, {high:.3f}]  "
            f"greedy {number(entry['greedy'])}  unscored {entry['unscored']}"
        )
        for effort, measured in entry["efforts"].items():
            print(
                f"  {effort:<10} sampled {number(measured['score'])}  {measured['thinking_tokens']:.1f} thinking tokens"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from posttrain.config import Evaluation
    from posttrain.pipeline import report_run
    from posttrain.runs.durable import read_json
    from posttrain.runs.progress import print_report
    from posttrain.runs.rundir import RunDir

    run = RunDir(arguments.run_dir)
    if not run.recipe.exists():
        raise RecipeError(f"{run.path} is not a run directory: it has no recipe.json; give the --run-dir of a run")
    settings = {key: value for key, value in read_json(run.recipe)["evaluation"].items() if key != "type"}
    print_report(report_run(run, Evaluation(**settings)))
    print(f"report: {run.report_html}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from posttrain.doctor import examine
    from posttrain.loader import load_recipe

    findings = examine(load_recipe(arguments.recipe, arguments.overrides))
    for finding in findings:
        print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name:<10} {finding.detail}")
    return 0 if all(finding.ok for finding in findings) else 2


def _check_names_are_ours() -> None:
    """Other distributions use the names ``rewards``, ``teachers`` and ``recipes`` too, and would win silently."""
    import importlib

    names = ("posttrain", "teachers", "rewards", "sandbox", "recipes")
    files: dict[str, Any] = {name: importlib.import_module(name).__file__ for name in names}
    home = Path(str(files["posttrain"])).parent.parent
    for name, file in files.items():
        if file is None or Path(file).parent.parent != home:
            raise RecipeError(
                f"the package {name!r} comes from {file}, not from posttrain; uninstall the other distribution of that "
                f"name (pip uninstall {name}) and install posttrain again"
            )


if __name__ == "__main__":
    sys.exit(main())
