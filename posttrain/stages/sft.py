"""Imitate: supervised fine-tuning of a specialist on its domain's demonstrations."""

from __future__ import annotations

from pathlib import Path

from posttrain.errors import RecipeError
from posttrain.learner.sft import run_sft
from posttrain.stages.session import Session


def run_sft_stage(session: Session, stage: str, domain_name: str, start: str) -> Path:
    """From ``start`` to ``stages/<stage>/final``; continues from the newest checkpoint after a kill."""
    domain = session.recipe.domains[domain_name]
    assert domain.sft is not None
    demonstrations = domain.tasks.demonstrations(count=domain.sft.num_demonstrations, seed=session.recipe.seed)
    if not demonstrations:
        raise RecipeError(
            f"domains.{domain_name}.sft is set but its task source gave no demonstrations; expected at least one "
            "conversation; add demonstrations or set sft to none"
        )
    with session.progress.stage(stage, domain.sft.max_steps) as progress:

        def log(step: int, metrics: dict[str, float]) -> None:
            session.metrics.log(stage, step, metrics)
            progress.update(step, metrics)

        return run_sft(
            model_path=start,
            demonstrations=demonstrations,
            config=domain.sft,
            lora=session.recipe.model.lora,
            seed=session.recipe.seed,
            output_dir=session.run.stage_dir(stage),
            on_log=log,
            dtype=session.dtype,
        )
