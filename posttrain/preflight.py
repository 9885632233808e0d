"""Checks that cost seconds before a run that costs hours. Every failure is a ``RecipeError`` or a sandbox error."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from posttrain.config import GRPO, Distill, Domain, MixedRL, Recipe, Specialty
from posttrain.errors import RecipeError, SandboxUnavailable
from posttrain.protocols import ConversationFormat, Playable, Reward, Teacher, asks_policy
from posttrain.types import Task

PROBED_TASKS = 64
"""Training tasks looked at; a source may be endless."""


def check_recipe(recipe: Recipe) -> None:
    """Model, tokenizer, tasks, windows and sandbox, in the order in which a run would meet them."""
    from posttrain.conversation.formats import open_format
    from posttrain.models import base_path, context_window, has_experts, load_tokenizer

    base = base_path(recipe.model)
    chat, window = open_format(load_tokenizer(base)), context_window(base)
    _check_lora(recipe)
    _check_workers(recipe, has_experts=has_experts(base))
    for name, domain in recipe.domains.items():
        tasks = _check_tasks(name, domain, count=recipe.evaluation.num_tasks)
        if domain.has_specialist_per_effort:
            _check_modes(name, domain, tasks)
        for task in tasks:
            for mode in domain.modes_of(task):
                form, length = replace(task, effort=mode), len(chat.at(mode).encode_prompt(task.prompt))
                _check_window(name, domain, form, window=window, prompt_tokens=length)
        for form in _judge_prompts(name, domain):
            _check_window(name, domain, form, window=window, prompt_tokens=len(chat.encode_prompt(form.prompt)))
        _check_sandbox(recipe, name, domain, tasks)
        _check_training(name, domain, chat, seed=recipe.seed)
        if isinstance(recipe.distill, Distill):
            _check_distill(name, domain, recipe.distill)
    for specialty in recipe.specialties().values():
        _check_specialty(recipe, specialty, chat)
    if isinstance(recipe.distill, Distill):
        _check_schedule(recipe.distill, chat)
    if isinstance(recipe.distill, MixedRL):
        _check_mixture(recipe)
        _check_grpo("distill.grpo", recipe.distill.grpo, recipe)


def _check_lora(recipe: Recipe) -> None:
    if recipe.model.lora is None:
        return
    if importlib.util.find_spec("peft") is None:
        raise RecipeError("model.lora is set but peft is missing; pip install 'posttrain[peft]', or set lora to none")
    if recipe.model.fake_quantization is not None:
        raise RecipeError(
            "model.fake_quantization is set with model.lora, whose base is not trained: expected one of the two; set "
            "one of them to none"
        )


def _check_workers(recipe: Recipe, *, has_experts: bool) -> None:
    if recipe.workers.engine == "vllm":
        _check_vllm(recipe, has_experts=has_experts)
    if recipe.workers.num_learners > 1:
        _check_learners(recipe)


def _check_vllm(recipe: Recipe, *, has_experts: bool) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise RecipeError("workers.engine = 'vllm' but vLLM is missing; pip install 'posttrain[vllm]'")
    if has_experts and any(grpo.keep_routing for grpo in recipe.grpo_settings()):
        raise RecipeError(
            "grpo.keep_routing is on with a mixture-of-experts model and workers.engine = 'vllm', which does not say "
            "which experts tokens went to: expected one or the other; set keep_routing to false, or engine to "
            "'transformers'"
        )
    if recipe.model.swiglu_limit is not None or recipe.model.fake_quantization is not None:
        raise RecipeError(
            "model.swiglu_limit or model.fake_quantization is set with workers.engine = 'vllm', which computes without "
            "them: expected one or the other; leave them unset, or set engine to 'transformers'"
        )
    unbounded = [name for name, domain in recipe.domains.items() if not domain.sampling.top_k]
    if unbounded and any(domain.sampling.truncates for domain in recipe.domains.values()):
        raise RecipeError(
            f"domains.{unbounded[0]}.sampling.top_k = 0 and another domain's sampling is truncated: expected with "
            "workers.engine = 'vllm' a top_k in all domains or truncation in none, since one vLLM engine says for all "
            "requests or for none what sampling kept; set top_k (1000 changes little)"
        )


def _check_modes(name: str, domain: Domain, tasks: Sequence[Task]) -> None:
    """Where each effort mode has its specialist, every task is of one of the modes, and each mode has tasks."""
    played = {mode for task in tasks for mode in domain.modes_of(task)}
    strangers = sorted(str(mode) for mode in played - {*domain.efforts})
    if strangers:
        raise RecipeError(
            f"domains.{name}.tasks has tasks of effort {strangers[0]!r}, which has no specialist: expected those of "
            f"domains.{name}.efforts, {sorted(domain.efforts)}; add it to efforts or drop the tasks"
        )
    idle = sorted({*domain.efforts} - played)
    if idle:
        raise RecipeError(
            f"domains.{name}.efforts has {idle[0]!r}, but the tasks name other efforts themselves: expected tasks that "
            "may be played in it; remove the mode, or leave Task.effort to the domain"
        )


def _check_specialty(recipe: Recipe, specialty: Specialty, chat: ConversationFormat) -> None:
    _check_specialist(recipe, specialty)
    if specialty.domain.teacher is not None:
        _check_teacher(f"{specialty.place}.teacher", specialty.domain.teacher, chat)
    if specialty.domain.grpo is not None:
        _check_sampling(specialty.domain_name, specialty.domain, specialty.domain.grpo)
        _check_grpo(f"{specialty.place}.grpo", specialty.domain.grpo, recipe)


def _check_schedule(config: Distill, chat: ConversationFormat) -> None:
    for step, mixture in config.schedule.items():
        for name, teacher in mixture.teachers.items():
            _check_teacher(f"distill.schedule[{step}].teachers[{name!r}]", teacher, chat)


def _check_specialist(recipe: Recipe, specialty: Specialty) -> None:
    """A merge needs something to merge from each domain, and all but on-policy distillation a checkpoint."""
    method, place, domain = recipe.distill, specialty.place, specialty.domain
    if method is None or isinstance(method, MixedRL):
        return
    if domain.teacher is None and domain.sft is None and domain.grpo is None:
        raise RecipeError(f"{place} has no teacher for distill: expected sft, grpo or teacher to be set; set one")
    on_policy = isinstance(method, Distill) and method.rollouts_from == "student"
    if domain.teacher is not None and not on_policy and not isinstance(domain.teacher, Playable):
        needs = "rollouts_from = 'teachers'" if isinstance(method, Distill) else type(method).__name__
        raise RecipeError(
            f"{place}.teacher = {domain.teacher!r:.100}: expected for distill with {needs} a teacher that is a "
            "checkpoint by itself; merge an adapter into its base, or distill on the student's rollouts"
        )


def _check_grpo(place: str, config: GRPO, recipe: Recipe) -> None:
    if config.sync_ref_model and recipe.model.lora is not None:
        raise RecipeError(
            f"{place}.sync_ref_model is on with model.lora, whose reference is the model without its adapters: "
            "expected one of the two; set sync_ref_model to false"
        )


def _check_mixture(recipe: Recipe) -> None:
    assert isinstance(recipe.distill, MixedRL)
    temperatures = {name: domain.sampling.temperature for name, domain in recipe.domains.items()}
    if len(set(temperatures.values())) > 1:
        raise RecipeError(
            f"domains.*.sampling.temperature = {temperatures}: expected for distill with MixedRL one temperature for "
            "all domains, since one loss compares their probabilities; change them"
        )
    for name, domain in recipe.domains.items():
        _check_sampling(name, domain, recipe.distill.grpo)


def _check_learners(recipe: Recipe) -> None:
    import torch

    count, devices = recipe.workers.num_learners, torch.cuda.device_count()
    available, what = (devices, "GPUs") if devices else (len(os.sched_getaffinity(0)), "cores")
    if count > available:
        raise RecipeError(
            f"workers.num_learners = {count} but this machine offers {available} {what}; expected at most one learner "
            "process for each; lower it"
        )
    if isinstance(recipe.distill, Distill) and getattr(recipe.distill.teachers, "states", None) == "ray":
        raise RecipeError(
            f"workers.num_learners = {count} and distill.teachers.states = 'ray': only the first learner process is "
            "connected to Ray; set distill.teachers.states to files"
        )


def _check_teacher(place: str, teacher: Teacher, chat: ConversationFormat) -> None:
    """Find now what would otherwise stop the merge, after all specialists were trained."""
    from posttrain.conversation.formats import open_format
    from posttrain.models import load_tokenizer

    # Reading the fingerprint opens the checkpoint's files.
    _ = teacher.fingerprint
    tokenizer_path = getattr(teacher, "tokenizer_path", None)
    if tokenizer_path is not None and open_format(load_tokenizer(tokenizer_path)).fingerprint != chat.fingerprint:
        raise RecipeError(
            f"{place} = {tokenizer_path!r}: its vocabulary or chat template differs from the model's; "
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


def _judge_prompts(name: str, domain: Domain) -> list[Task]:
    """Judge prompts known beforehand, in all their orders."""
    judging = domain.judge_training
    if judging is None:
        return []
    monitored = judging.monitor.tasks() if judging.monitor is not None else ()
    tasks = [*itertools.islice(judging.tasks.anchors(), PROBED_TASKS), *monitored]
    for task in tasks:
        if judging.num_generations % len(task.variants):
            raise RecipeError(
                f"domains.{name}.judge_training.num_generations = {judging.num_generations}: judge prompt {task.id!r} "
                f"has {len(task.variants)} presentation orders; expected a multiple of that; change it"
            )
    return [form for task in tasks for form in task.variants]


def _check_window(name: str, domain: Domain, task: Task, *, window: int, prompt_tokens: int) -> None:
    if prompt_tokens >= domain.window_at(task.effort):
        raise RecipeError(
            f"domains.{name}: the prompt of task {task.id!r} has {prompt_tokens} tokens but max_sequence_tokens is "
            f"{domain.window_at(task.effort)}, which leaves no room to answer; raise "
            f"domains.{name}.max_sequence_tokens or drop the task"
        )
    if prompt_tokens >= window:
        raise RecipeError(
            f"domains.{name}: the prompt of task {task.id!r} has {prompt_tokens} tokens but the model's own window is "
            f"{window}, which leaves no room to answer; drop the task or choose another model"
        )


def _check_training(name: str, domain: Domain, chat: ConversationFormat, *, seed: int) -> None:
    if domain.environment.max_turns > 1:
        try:
            chat.encode_observations(({"role": "tool", "content": "?"},))
        except RecipeError as error:
            raise RecipeError(f"domains.{name} takes {domain.environment.max_turns} turns: {error}") from error
    if domain.sft is not None:
        from posttrain.learner.sft import encode_demonstrations
        from posttrain.stages.sft import demonstrations_of

        try:
            encode_demonstrations(demonstrations_of(domain, domain.sft, seed), chat, domain.sft.max_length)
        except RecipeError as error:
            raise RecipeError(f"domains.{name}.sft: {error}") from error


def _check_sampling(name: str, domain: Domain, grpo: GRPO) -> None:
    sampling = domain.sampling
    if sampling.temperature == 0:
        raise RecipeError(
            f"domains.{name}.sampling has temperature = 0: expected for grpo a temperature > 0, since a group of "
            "equal rollouts teaches nothing; set it to 1"
        )
    if sampling.truncates and not grpo.keep_sampling_mask:
        raise RecipeError(
            f"domains.{name}.sampling has top_p = {sampling.top_p}, top_k = {sampling.top_k}, min_p = "
            f"{sampling.min_p} and grpo.keep_sampling_mask is off: expected one or the other, since the learner "
            "would compare a truncated distribution with a whole one; set keep_sampling_mask to true"
        )


def _check_distill(name: str, domain: Domain, config: Distill) -> None:
    if config.reward_coef > 0 and asks_policy(domain.reward):
        raise RecipeError(
            f"domains.{name}.reward asks the policy itself, with distill.reward_coef = {config.reward_coef}: expected "
            "a reward with another judge, since a distillation keeps no snapshot that judges; set its judge, or "
            "reward_coef to 0"
        )
    temperature = domain.sampling.temperature
    if temperature == 0 and (config.reward_coef > 0 or config.max_staleness > 0 or config.rescale_domains):
        raise RecipeError(
            f"domains.{name}.sampling.temperature = 0: expected a temperature > 0 with distill.reward_coef, "
            "max_staleness or rescale_domains, which need the probabilities tokens were drawn with; set it to 1"
        )
    if config.loss == "sampled_token" and temperature != config.temperature:
        raise RecipeError(
            f"domains.{name}.sampling.temperature = {temperature} with distill.loss = 'sampled_token': expected "
            f"{config.temperature}, distill.temperature, since the advantages of tokens that another distribution drew "
            "do not average to the KL; make both equal"
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


def disk_needed(recipe: Recipe, *, finished_stages: int = 0) -> int:
    """Bytes a run still writes at most: a final model a stage, and, at a time, three checkpoints with optimizer state
    and the judges of one stage."""
    import torch

    from posttrain.models import load_model

    num_parameters = load_model(recipe.model.path, torch.bfloat16).num_parameters()
    trained = 1 if recipe.model.lora is None else 0
    moves_reference = any(grpo.sync_ref_model for grpo in recipe.grpo_settings())
    checkpoint_bytes = 16 if moves_reference else 12
    skills = [specialty.domain for specialty in recipe.specialties().values()]
    num_stages = 1 + sum(d.sft is not None for d in recipe.domains.values()) + sum(d.grpo is not None for d in skills)
    num_stages += isinstance(recipe.distill, Distill) and recipe.distill.start == "sft_mean"
    num_judges = max(d.grpo.max_steps // recipe.judge_lag_steps if d.grpo and _asks_policy(d) else 0 for d in skills)
    if isinstance(recipe.distill, MixedRL) and any(asks_policy(d.reward) for d in recipe.domains.values()):
        num_judges = max(num_judges, recipe.distill.grpo.max_steps // recipe.judge_lag_steps)
    num_models = max(0, num_stages - finished_stages) + num_judges
    return num_parameters * (4 * num_models + 3 * checkpoint_bytes * trained) + (64 << 20)


def _asks_policy(domain: Domain) -> bool:
    judging = domain.judge_training
    return asks_policy(domain.reward) or (judging is not None and asks_policy(judging.reward))


def check_disk(path: Path, *, needed_bytes: int) -> None:
    """Raise ``OSError`` when the file system that ``path`` is, or will be, on cannot hold what a run writes."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OSError(
            f"the disk of {existing} has {free / 2**20:.0f} MiB free but this run writes about "
            f"{needed_bytes / 2**20:.0f} MiB; free some space or choose another --run-dir"
        )
