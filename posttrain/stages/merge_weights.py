"""Merge without training: the specialists' weights become the student's."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from posttrain.config import Ties, WeightAverage
from posttrain.learner.weight_merging import Checkpoint, WeightMerge
from posttrain.models import load_tokenizer
from posttrain.runs.rundir import StageDir
from posttrain.stages.session import Session


def run_merge_weights_stage(
    session: Session, stage: StageDir, config: WeightAverage | Ties, checkpoints: Mapping[str, str]
) -> None:
    """From the specialists, by name, to ``stage.final``, in the compute type as every stage's."""
    session.begin(stage, 0)
    with contextlib.ExitStack() as stack:
        merge = WeightMerge(
            base=stack.enter_context(Checkpoint(session.base_path)),
            specialists={name: stack.enter_context(Checkpoint(path)) for name, path in checkpoints.items()},
            weights={name: each.domain.weight * each.share for name, each in session.recipe.specialties().items()},
        )
        metrics = merge.write(stage.final, config, load_tokenizer(session.base_path), session.dtype)
    session.metrics.log(stage.name, 1, metrics)
    session.progress.stage(stage.name, 1).update(1, metrics)
