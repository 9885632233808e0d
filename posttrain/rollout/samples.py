"""From played groups to what the learner trains on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from posttrain.config import GRPO, Distill
from posttrain.learner.advantages import group_advantages
from posttrain.types import EMPTY, AnyRollout, Group, Sample, StopReason, Tokens

AdvantageRows = Sequence[Sequence[float]]
"""Per group, per rollout; NaN where a rollout is left out of the update."""


def modes_of(group: Group) -> list[list[int]]:
    """Indices of the rollouts in each effort mode that the task is played in."""
    modes: dict[str | None, list[int]] = {}
    for index, rollout in enumerate(group.rollouts):
        modes.setdefault(rollout.task.effort, []).append(index)
    return list(modes.values())


def group_advantage_rows(groups: Sequence[Group], config: GRPO | Distill, *, min_group_size: int) -> list[list[float]]:
    """Advantages relative to the rollouts of the same prompt in the same effort mode, which length sets apart.

    Unscored rollouts, and all of a mode with too few scored ones, are NaN.
    """
    places = [(group, index, mode) for index, group in enumerate(groups) for mode in modes_of(group)]
    scores = [[group.scores[i].value for i in mode] for group, _, mode in places]
    usable = [row if sum(v is not None for v in row) >= min_group_size else [None] * len(row) for row in scores]
    rows = [[math.nan] * len(group.scores) for group in groups]
    for (_, index, mode), found in zip(places, group_advantages(usable, config.scale_rewards), strict=True):
        for rollout, value in zip(mode, found, strict=True):
            rows[index][rollout] = math.nan if value is None else value
    return rows


def grpo_samples(groups: Sequence[Group], advantages: AdvantageRows, config: GRPO) -> list[Sample]:
    """What the policy gradient acts on: every rollout with an advantage.

    Rollouts without gradient stay as rows of the normaliser but are silent, and so cost no forward pass: those with
    advantage zero, unless a KL or entropy term would still act on them (which makes the token normaliser that of
    DAPO's dynamic sampling, arXiv 2503.14476), and truncated ones where the recipe masks them.
    """
    keep_zero = config.beta > 0 or config.entropy_coef != 0
    samples = []
    for group, row in zip(groups, advantages, strict=True):
        for rollout, advantage in zip(group.rollouts, row, strict=True):
            if math.isnan(advantage):
                continue
            silent = (advantage == 0 and not keep_zero) or (
                config.mask_truncated_completions and rollout.stop is StopReason.LENGTH
            )
            samples.append(replace(sample_of(rollout, advantage=advantage), silent=silent))
    return samples


def distill_samples(
    groups: Sequence[Group], advantages: AdvantageRows | None = None, *, scale_of: Mapping[str, float] = EMPTY
) -> list[Sample]:
    """Samples routed to the teacher of their group, with the teacher's weight w_i times their domain's scale, if any.

    Machinery failures leave; everything the policy did, wrong or cut off, is worth correcting and stays. With
    ``advantages`` a rollout that could not be scored has advantage 0: it is distilled and not reinforced.
    """
    samples = []
    for index, group in enumerate(groups):
        if group.route is None:
            raise ValueError(f"the group of task {group.task.id!r} has no route; distillation needs GroupJob.route")
        weight = group.route.weight * scale_of.get(group.task.domain, 1.0)
        rows = [0.0] * len(group.rollouts) if advantages is None else advantages[index]
        for rollout, advantage in zip(group.rollouts, rows, strict=True):
            if not rollout.failed and rollout.num_generated:
                known = 0.0 if math.isnan(advantage) else advantage
                samples.append(sample_of(rollout, advantage=known, teacher=group.route.teacher, weight=weight))
    return samples


def without_stale_tokens(samples: Sequence[Sample], *, oldest: int) -> list[Sample]:
    """The same samples, their tokens of weight versions below ``oldest`` without loss."""
    return [_without_stale_tokens(sample, oldest) for sample in samples]


def _without_stale_tokens(sample: Sample, oldest: int) -> Sample:
    versions = sample.tokens.version_range
    if versions is None or versions[0] >= oldest:
        return sample
    arrays = sample.load()
    fresh = replace(arrays, loss_mask=arrays.loss_mask & (arrays.versions >= oldest))
    sample.tokens.free()
    return replace(sample, tokens=Tokens.of(fresh))


def staleness_metrics(groups: Sequence[Group], step: int, *, oldest: int) -> dict[str, float]:
    """How many learner steps old the oldest token of each rollout is, and how many rollouts lose tokens for it."""
    ranges = [rollout.tokens.version_range for group in groups for rollout in group.rollouts]
    ages = [step - versions[0] for versions in ranges if versions is not None]
    return {
        "staleness": _mean(ages),
        "max_staleness": float(max(ages, default=0)),
        "stale_rollouts": float(sum(step - age < oldest for age in ages)),
    }


def sample_of(
    rollout: AnyRollout, *, advantage: float = 0.0, teacher: str | None = None, weight: float = 1.0
) -> Sample:
    """The light sample; its arrays stay where the rollout's are."""
    return Sample(
        id=rollout.id,
        task_id=rollout.task.id,
        domain=rollout.task.domain,
        tokens=rollout.tokens,
        advantage=advantage,
        teacher=teacher,
        weight=weight,
        truncated=rollout.stop is StopReason.LENGTH,
    )


def group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What a step's rollouts looked like and what they earned."""
    return rollout_metrics(groups) | reward_metrics(groups)


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Lengths, turns and failures of a step's rollouts."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    count = max(len(rollouts), 1)
    generated = float(sum(rollout.num_generated for rollout in rollouts))
    return {
        "failed_rollouts": float(sum(rollout.failed for rollout in rollouts)),
        "repeated_attempts": float(sum(len(rollout.failures) for rollout in rollouts)),
        "completion_tokens": generated / count,
        "truncated": sum(rollout.stop is StopReason.LENGTH for rollout in rollouts) / count,
        "turns": sum(rollout.num_turns for rollout in rollouts) / count,
        "generated_tokens": generated,
    }


def reward_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Means of rewards and their parts. Unscored rollouts are counted, never averaged in; NaN when none is scored."""
    scores = [score for group in groups for score in group.scores]
    values = [[s.value for s in group.scores if s.value is not None] for group in groups]
    scored = [value for row in values for value in row]
    parts: dict[str, list[float]] = {}
    for score in scores:
        for name, part in score.parts.items():
            if part is not None:
                parts.setdefault(name, []).append(part)
    return {
        "reward": _mean(scored),
        "reward_std": _mean([float(np.std(row)) for row in values if row]),
        "frac_reward_zero_std": _mean([float(len(set(row)) == 1) for row in values if row]),
        "unscored": float(len(scores) - len(scored)),
    } | {f"reward/{name}": _mean(found) for name, found in sorted(parts.items())}


def mixture_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Those of a step of several domains, with the mean reward of each in place of the parts, which are its own."""
    by_domain: dict[str, list[Group]] = {}
    for group in groups:
        by_domain.setdefault(group.task.domain, []).append(group)
    common = {name: value for name, value in group_metrics(groups).items() if "/" not in name}
    return common | {f"reward/{name}": reward_metrics(found)["reward"] for name, found in sorted(by_domain.items())}


def _mean(values: Sequence[float | int]) -> float:
    return float(np.mean(values)) if values else math.nan
