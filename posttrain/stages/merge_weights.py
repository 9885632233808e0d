"""Merge without training: the specialists' weights become the student's, or SFT models' its start."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from posttrain.config import Ties, WeightAverage
from posttrain.learner.weight_merging import Checkpoint, WeightMerge
from posttrain.models import load_tokenizer
from posttrain.runs.rundir import StageDir
from posttrain.stages.session import Session, finals


def run_merge_weights_stage(
    session: Session, stage: StageDir, config: WeightAverage | Ties, checkpoints: Mapping[str, str]
) -> None:
    """From the specialists, by name, to ``stage.final``, in the compute type as every stage's."""
    session.begin(stage, 0)
    weights = {name: each.domain.weight * each.share for name, each in session.recipe.specialties().items()}
    metrics = _write(session, stage.final, config, checkpoints, weights)
    session.metrics.log(stage.name, 1, metrics)
    session.progress.stage(stage.name, 1).update(1, metrics)


def sft_mean(session: Session, stage: StageDir) -> str:
    """A checkpoint with the mean of the domains' SFT models, written once a stage."""
    if not stage.start.is_dir():
        weights = {name: domain.weight for name, domain in session.recipe.domains.items()}
        _write(session, stage.start, WeightAverage(), finals(session, "sft"), weights)
    return str(stage.start)


def _write(
    session: Session,
    directory: Path,
    config: WeightAverage | Ties,
    checkpoints: Mapping[str, str],
    weights: Mapping[str, float],
) -> dict[str, float]:
    with contextlib.ExitStack() as stack:
        merge = WeightMerge(
            base=stack.enter_context(Checkpoint(session.base_path)),
            specialists={name: stack.enter_context(Checkpoint(path)) for name, path in checkpoints.items()},
            weights=weights,
        )
        return merge.write(directory, config, load_tokenizer(session.base_path), session.dtype)
