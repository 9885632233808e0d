"""Checks that cost seconds before a run that costs hours. Every failure is a ``RecipeError`` or a sandbox error."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.config import Domain, Recipe
from posttrain.errors import RecipeError, SandboxUnavailable
from posttrain.protocols import Reward, Teacher
from posttrain.types import Task

if TYPE_CHECKING:
    from posttrain.conversation.chat import ChatFormat

PROBED_TASKS = 64
"""Training tasks looked at; a source may be endless."""


def check_recipe(recipe: Recipe) -> None:
    """Model, tokenizer, tasks, windows and sandbox, in the order in which a run would meet them."""
    from posttrain.conversation.chat import ChatFormat
    from posttrain.models import load_tokenizer, resolve_path

    base = resolve_path(recipe.model.path)
    chat = ChatFormat(load_tokenizer(base))
    for name, domain in recipe.domains.items():
        tasks = _check_tasks(name, domain, count=recipe.evaluation.num_tasks)
        for task in tasks:
            _check_window(name, domain, task, prompt_tokens=len(chat.encode_prompt(task.prompt)))
        _check_sandbox(recipe, name, domain, tasks)
        if domain.teacher is None and recipe.distill is not None and domain.sft is None and domain.grpo is None:
            raise RecipeError(
                f"domains.{name} has no teacher for distill: expected sft, grpo or teacher to be set; set one"
            )
        if domain.teacher is not None:
            _check_teacher(name, domain.teacher, chat)


def _check_teacher(name: str, teacher: Teacher, chat: ChatFormat) -> None:
    """Find now what would otherwise stop the merge, after all specialists were trained."""
    from posttrain.conversation.chat import ChatFormat
    from posttrain.models import load_tokenizer

    # Reading the fingerprint opens the checkpoint's files.
    _ = teacher.fingerprint
    tokenizer_path = getattr(teacher, "tokenizer_path", None)
    if tokenizer_path is not None and ChatFormat(load_tokenizer(tokenizer_path)).fingerprint != chat.fingerprint:
        raise RecipeError(
            f"domains.{name}.teacher = {tokenizer_path!r}: its vocabulary or chat template differs from the model's; "
            "expected the same, since distillation compares token ids; choose a teacher of the model's family"
        )


def _check_tasks(name: str, domain: Domain, *, count: int) -> list[Task]:
    train = list(itertools.islice(iter(domain.tasks.train(seed=0)), PROBED_TASKS))
    heldout = list(domain.tasks.heldout(count=count))
    for split, tasks in (("train", train), ("heldout", heldout)):
        if not tasks:
            raise RecipeError(
                f"domains.{name}.tasks has no {split} tasks; expected at least one; check the data set, its filter "
                "and its column mapping"
            )
        strangers = sorted({task.domain for task in tasks} - {name})
        if strangers:
            raise RecipeError(
                f"domains.{name}.tasks yields tasks of domain {strangers[0]!r}; expected {name!r}, the key it is "
                "listed under; rename one of them"
            )
    shared = {task.id for task in train} & {task.id for task in heldout}
    if shared:
        raise RecipeError(
            f"domains.{name}.tasks: task {min(shared)!r} is in both train and heldout; the comparison would be on "
            "training data; split by task"
        )
    return train + heldout


def _check_window(name: str, domain: Domain, task: Task, *, prompt_tokens: int) -> None:
    if prompt_tokens >= domain.max_sequence_tokens:
        raise RecipeError(
            f"domains.{name}: the prompt of task {task.id!r} has {prompt_tokens} tokens but max_sequence_tokens is "
            f"{domain.max_sequence_tokens}, which leaves no room to answer; raise "
            f"domains.{name}.max_sequence_tokens or drop the task"
        )


def _check_sandbox(recipe: Recipe, name: str, domain: Domain, tasks: list[Task]) -> None:
    grading_box = isinstance(domain.reward, Reward) and getattr(domain.reward, "sandbox", None) is not None
    if not grading_box and all(task.sandbox is None for task in tasks):
        return
    if recipe.substrate is None:
        raise SandboxUnavailable(
            f"domains.{name} needs a sandbox but the recipe has no substrate; set Recipe.substrate, for example to "
            "sandbox.process.Process()"
        )
    recipe.substrate.check()


def disk_needed(recipe: Recipe) -> int:
    """Bytes a run writes at most: a final model a stage, and three checkpoints with optimizer state at a time."""
    import torch

    from posttrain.models import load_model

    num_parameters = load_model(recipe.model.path, torch.bfloat16).num_parameters()
    trained = 1 if recipe.model.lora is None else 0
    num_models = 1 + sum((d.sft is not None) + (d.grpo is not None) for d in recipe.domains.values())
    return num_parameters * (4 * num_models + 3 * 12 * trained) + (64 << 20)


def check_disk(path: Path, *, needed_bytes: int) -> None:
    """Raise ``OSError`` when the file system that ``path`` is, or will be, on cannot hold what a run writes."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OSError(
            f"the disk of {existing} has {free / 2**20:.0f} MiB free but this run writes about "
            f"{needed_bytes / 2**20:.0f} MiB; free some space or choose another --run-dir"
        )
