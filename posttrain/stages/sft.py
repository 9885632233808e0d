"""Imitate: supervised fine-tuning of a specialist on its domain's demonstrations."""

from __future__ import annotations

from posttrain.learner.sft import newest_checkpoint, run_sft
from posttrain.runs.rundir import StageDir
from posttrain.stages.session import Session


def run_sft_stage(session: Session, stage: StageDir, domain_name: str) -> None:
    """From the base to ``stage.final``; continues from the newest checkpoint after a kill."""
    domain = session.recipe.domains[domain_name]
    assert domain.sft is not None
    demonstrations = domain.tasks.demonstrations(count=domain.sft.num_demonstrations, seed=session.recipe.seed)
    newest = newest_checkpoint(stage.checkpoints)
    first = int(newest.name.rpartition("-")[2]) if newest else 0
    session.begin(stage, first)
    progress = session.progress.stage(stage.name, domain.sft.max_steps, first_step=first)

    def log(step: int, metrics: dict[str, float]) -> None:
        # TRL counts tokens since its process began, which a resumed run would show as a step back.
        metrics = {name: value for name, value in metrics.items() if name != "num_tokens"}
        session.metrics.log(stage.name, step, metrics)
        progress.update(step, metrics)

    run_sft(
        model_path=session.base_path,
        demonstrations=demonstrations,
        config=domain.sft,
        lora=session.recipe.model.lora,
        seed=session.recipe.seed,
        output_dir=stage.path,
        on_log=log,
        dtype=session.dtype,
    )
