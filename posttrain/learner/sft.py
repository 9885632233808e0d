"""Supervised fine-tuning through TRL's ``SFTTrainer``: this module prepares tokens and settings, TRL trains.

Demonstrations are tokenised as a rollout would produce them: each assistant message is encoded apart from its
context, exactly where sampling would start, and ends with its end-of-turn token. Only those tokens carry loss, and the
chat template needs no ``{% generation %}`` markers for it.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from posttrain.config import SFT, Lora
from posttrain.conversation.formats import open_format
from posttrain.errors import RecipeError
from posttrain.models import load_model, load_tokenizer
from posttrain.protocols import ConversationFormat, Demonstration

IGNORED = -100
"""Label of tokens without loss, as in torch and TRL."""
TOKENS_PER_MICRO_BATCH = 8192
"""Padded tokens of one forward pass; larger batches accumulate gradients, which leaves the update as it is."""

OnLog = Callable[[int, dict[str, float]], None]


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Silences the bars transformers draws for every file it reads or writes; the caller draws its own."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


@without_progress_bars()
def run_sft(
    *,
    model_path: str | Path,
    demonstrations: Sequence[Demonstration],
    config: SFT,
    lora: Lora | None,
    seed: int,
    output_dir: Path,
    on_log: OnLog,
    dtype: torch.dtype,
) -> Path:
    """Fine-tune the model at ``model_path`` and return ``output_dir/final``, a plain checkpoint with its tokenizer.

    Master weights are float32; ``dtype=torch.bfloat16`` computes in it through autocast. Adapters are merged into the
    final weights. ``on_log(step, metrics)`` gets TRL's metrics after every optimizer step.
    ``output_dir/checkpoints`` holds the newest two checkpoints with optimizer, schedule and random state, and a second
    call continues from the newest complete one, with the same result as a run that was never interrupted.

    Raises ``RecipeError`` on no demonstrations, one longer than ``config.max_length`` tokens, one without an assistant
    message, and a chat template that does not end assistant messages with a stop token.
    """
    tokenizer = load_tokenizer(str(model_path))
    sequences = encode_demonstrations(demonstrations, open_format(tokenizer), config.max_length)
    model = load_model(str(model_path), torch.float32)
    checkpoints = output_dir / "checkpoints"
    longest = max(len(sequence["input_ids"]) for sequence in sequences)
    trainer = _LocalSFTTrainer(
        model=model,
        args=_training_arguments(config, checkpoints, seed=seed, dtype=dtype, longest=longest),
        train_dataset=Dataset.from_list(sequences),
        processing_class=tokenizer,
        peft_config=None if lora is None else _peft_config(lora),
        callbacks=[_LogCallback(on_log)],
    )
    # The plain printer that stands in for a switched-off progress bar.
    trainer.remove_callback(PrinterCallback)
    newest = newest_checkpoint(checkpoints)
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    final = output_dir / "final"
    if trainer.is_world_process_zero():
        trained = trainer.accelerator.unwrap_model(trainer.model)
        _save(trained if lora is None else trained.merge_and_unload(), tokenizer, final)
    trainer.accelerator.wait_for_everyone()
    return final


def encode_demonstrations(
    demonstrations: Sequence[Demonstration], chat: ConversationFormat, max_length: int
) -> list[dict[str, list[int]]]:
    """Rows of ``input_ids`` and ``labels`` for all demonstrations, checked; errors as in ``run_sft``."""
    if not demonstrations:
        raise RecipeError(
            "demonstrations is empty: expected at least one conversation to imitate; give the domain's task source "
            "demonstrations or drop the sft stage"
        )
    rows = []
    for index, demonstration in enumerate(demonstrations):
        try:
            sequences = encode_demonstration(demonstration, chat)
        except ValueError as error:
            raise RecipeError(f"demonstration {index}: {error}") from error
        length = max(len(sequence["input_ids"]) for sequence in sequences)
        if length > max_length:
            raise RecipeError(
                f"demonstration {index} has {length} tokens but max_length = {max_length}; cut, it would lose "
                "its stop token. Shorten it or raise max_length. It begins: "
                f"{demonstration[0]['content'][:80]!r}"
            )
        rows += sequences
    return rows


def encode_demonstration(demonstration: Demonstration, chat: ConversationFormat) -> list[dict[str, list[int]]]:
    """One demonstration as ``input_ids`` and ``labels``, the latter -100 outside the assistant turns to imitate."""
    sequences = [
        {"input_ids": ids.tolist(), "labels": np.where(mask, ids, IGNORED).tolist()}
        for ids, mask in chat.encode_demonstration(demonstration)
    ]
    if not sequences:
        raise RecipeError("it has no assistant message, so there is nothing to imitate; add one or leave it out")
    return sequences


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint with the highest step that was written to its end, or None.

    The trainer writes ``trainer_state.json`` last, so a checkpoint is complete when that file is whole.
    """
    for path in sorted(checkpoints.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        return path
    return None


def _training_arguments(config: SFT, checkpoints: Path, *, seed: int, dtype: torch.dtype, longest: int) -> SFTConfig:
    optim = config.optim
    micro_batch = _micro_batch_size(config.batch_size, longest)
    # transformers' plain "constant" ignores the warm-up.
    constant = "constant_with_warmup" if optim.warmup_steps else "constant"
    with warnings.catch_warnings():
        # TRL sets gradient_checkpointing itself, under the name that newer transformers calls deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        return SFTConfig(
            output_dir=str(checkpoints),
            max_steps=config.max_steps,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=config.batch_size // micro_batch,
            learning_rate=optim.learning_rate,
            lr_scheduler_type=constant if optim.lr_scheduler_type == "constant" else optim.lr_scheduler_type,
            warmup_steps=optim.warmup_steps,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.adam_beta1,
            adam_beta2=optim.adam_beta2,
            max_grad_norm=optim.max_grad_norm,
            bf16=dtype is torch.bfloat16,
            use_cpu=not torch.accelerator.is_available(),
            gradient_checkpointing=False,
            seed=seed,
            data_seed=seed,
            save_strategy="steps",
            save_steps=config.save_steps,
            save_total_limit=2,
            logging_strategy="steps",
            logging_steps=1,
            report_to="none",
            push_to_hub=False,
            disable_tqdm=True,
            dataloader_pin_memory=torch.accelerator.is_available(),
            # Tokens and labels are ready, so the trainer has nothing to map over or to cut.
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
        )


def _micro_batch_size(batch_size: int, longest: int) -> int:
    """The largest divisor of ``batch_size`` whose padded rows fit the token budget; at least 1."""
    fitting = max(TOKENS_PER_MICRO_BATCH // longest, 1)
    return max(size for size in range(1, batch_size + 1) if batch_size % size == 0 and size <= fitting)


def _peft_config(lora: Lora) -> Any:
    from peft import LoraConfig

    modules = lora.target_modules
    options: dict[str, Any] = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": modules if isinstance(modules, str) else list(modules),
    }
    return LoraConfig(task_type="CAUSAL_LM", **options)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, final: Path) -> None:
    """Write the plain checkpoint beside its place and rename it, so that ``final`` is whole whenever it exists."""
    partial = final.with_name("final.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)


class _LocalSFTTrainer(SFTTrainer):
    """SFTTrainer that reports to nobody."""

    def _send_telemetry(self) -> None:
        """TRL would send an anonymous ping to the hub here."""


class _LogCallback(TrainerCallback):
    """Passes the metrics of each optimizer step on."""

    def __init__(self, on_log: OnLog) -> None:
        self._on_log = on_log

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        # The trainer's closing summary has no "loss"; it is not a step.
        if logs is not None and "loss" in logs:
            self._on_log(state.global_step, {name: float(value) for name, value in logs.items()})
