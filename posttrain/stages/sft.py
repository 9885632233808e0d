"""Imitate: supervised fine-tuning of a specialist on its domain's demonstrations."""

from __future__ import annotations

import itertools

from posttrain.config import SFT, Domain
from posttrain.learner.sft import newest_checkpoint, run_sft
from posttrain.protocols import Demonstration
from posttrain.runs.rundir import StageDir
from posttrain.stages.session import Session


def demonstrations_of(domain: Domain, sft: SFT, seed: int) -> list[Demonstration]:
    """What a specialist imitates; in the modes of its domain, in turn, where it does not say its mode itself."""
    modes = itertools.cycle(domain.efforts or [None])
    demonstrations = []
    for demonstration in domain.tasks.demonstrations(count=sft.num_demonstrations, seed=seed):
        mode = next(modes)
        if mode is not None and demonstration:
            demonstration = ({"effort": mode, **demonstration[0]}, *demonstration[1:])
        demonstrations.append(demonstration)
    return demonstrations


def run_sft_stage(session: Session, stage: StageDir, domain_name: str) -> None:
    """From the base to ``stage.final``; continues from the newest checkpoint after a kill."""
    domain = session.recipe.domains[domain_name]
    assert domain.sft is not None
    demonstrations = demonstrations_of(domain, domain.sft, session.recipe.seed)
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
