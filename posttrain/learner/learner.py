"""The learner that GRPO and distillation share: packed micro-batches, float32 master weights, one step per call.

``update`` makes exactly one optimizer step of one mini-batch. Micro-batches only divide the work: every loss is
normalised by the totals of the mini-batch, so the step does not depend on the token budget beyond rounding.

One learner runs in one process on one device, the first GPU if there is one. ``posttrain.learner.group`` has several
share a mini-batch; the parts of an update it needs are methods of their own: ``accumulate``, ``grad_norm``, ``apply``.
"""

from __future__ import annotations

import contextlib
import copy
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from posttrain.config import Lora, Optim
from posttrain.errors import RecipeError
from posttrain.learner.checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from posttrain.learner.losses import Metrics
from posttrain.learner.objectives import GrpoObjective, Objective, ObjectiveSpec, Prepares, TokenStats
from posttrain.learner.packing import PackedBatch, Totals, plan_micro_batches
from posttrain.learner.policy import HeadInputs, Policy
from posttrain.learner.tally import Tally, step_metrics
from posttrain.stability.optimizer import make_optimizer
from posttrain.types import Sample


class Learner:
    """Trains one causal language model in place.

    ``model`` is a plain Hugging Face model in float32 that the learner takes over; ``dtype`` is what forward passes
    compute in. With ``lora`` only adapters are trained; ``num_steps`` is the length of the learning rate schedule. A
    micro-batch holds at most ``tokens_per_micro_batch`` tokens, or one longer sample, whose activations are computed
    twice rather than kept.
    ``keep_reference`` keeps the start weights for ``reference`` (free with LoRA, a float32 copy otherwise);
    ``keep_routing`` replays the expert choices that samples bring along (``posttrain.routing``).

    Raises ``RecipeError`` for a model whose logits are not ``head @ hidden`` or that ignores packing, for master
    weights that are not float32, and when started in several processes.
    """

    def __init__(  # noqa: PLR0913 - settings of their own, all but the first by name
        self,
        model: PreTrainedModel,
        *,
        optim: Optim,
        num_steps: int,
        tokens_per_micro_batch: int,
        dtype: torch.dtype = torch.float32,
        lora: Lora | None = None,
        keep_reference: bool = False,
        keep_routing: bool = False,
        seed: int = 0,
    ) -> None:
        self._accelerator = Accelerator()
        _check_single_process(self._accelerator)
        self.device = self._accelerator.device
        self.dtype = dtype
        self.num_optimizer_steps = num_steps
        self.step = 0
        """Optimizer steps made so far."""
        self._max_grad_norm = optim.max_grad_norm
        self.budget = tokens_per_micro_batch
        """Tokens per micro-batch."""
        self._opened: list[tuple[Objective, contextlib.ExitStack]] = []
        self._to_release: tuple[Prepares, Sequence[Sample]] | None = None
        self._policy = Policy(
            model.to(self.device),
            dtype=dtype,
            lora=lora,
            keep_reference=keep_reference,
            keep_routing=keep_routing,
            seed=seed,
        )
        if optim.anticipatory_routing is not None:
            self._policy.anticipate_routes(optim.anticipatory_routing)
        self._optimizer = self._accelerator.prepare(
            make_optimizer(self.parameters(), optim, never_muon=self._policy.vocabulary_matrices())
        )
        self._scheduler = get_scheduler(
            optim.lr_scheduler_type,
            self._optimizer,
            num_warmup_steps=optim.warmup_steps,
            num_training_steps=num_steps,
        )

    def update(self, samples: Sequence[Sample], objective: Objective) -> dict[str, float]:
        """One optimizer step on one mini-batch; returns its metrics.

        ``tokens`` counts every token of the samples trained on, ``loss_tokens`` those with loss. Samples without loss
        tokens only count in the totals. Raises ``ValueError`` when no sample carries loss, and ``FloatingPointError``
        naming the samples when loss or gradient is not finite; the weights are then as before.
        """
        started = time.perf_counter()
        trained = with_loss(samples)
        try:
            tally = self.accumulate(trained, objective, Totals.of(samples))
            grad_norm = self.grad_norm([sample.id for sample in trained])
            learning_rate = self.apply(grad_norm)
        finally:
            self.drop_gradient()
        seconds = time.perf_counter() - started
        return step_metrics(
            tally, grad_norm=grad_norm, learning_rate=learning_rate, budget=self.budget, seconds=seconds
        )

    def evaluate(self, samples: Sequence[Sample], objective: Objective) -> dict[str, float]:
        """The loss and the objective's metrics on one mini-batch, as ``update`` would find them; nothing changes."""
        return self.measure(samples, objective, Totals.of(samples)).metrics()

    def open_objective(self, spec: ObjectiveSpec, *, check: bool = True) -> Objective:
        """The live objective of a specification, open until ``close_objective`` or ``close``.

        ``check`` runs its start-up checks, which may raise ``RecipeError``.
        """
        context = contextlib.ExitStack()
        objective = context.enter_context(spec.open(self.reference, check=check))
        self._opened.append((objective, context))
        return objective

    def close_objective(self, objective: Objective) -> None:
        """Let go of what an opened objective holds, such as teachers."""
        for each in [each for each in self._opened if each[0] is objective]:
            self._opened.remove(each)
            each[1].close()

    def accumulate(
        self,
        samples: Sequence[Sample],
        objective: Objective,
        totals: Totals,
        *,
        before_each: Callable[[], None] = lambda: None,
    ) -> Tally:
        """Add the gradient of a share of a mini-batch with these ``totals`` to the parameters; what it adds up to.

        ``before_each`` is called before each micro-batch, and may raise.
        """
        plan = plan_micro_batches(samples, self.budget)
        tally = Tally(
            micro_batches=len(plan),
            tokens=sum(len(sample) for sample in samples),
            loss_tokens=sum(sample.num_loss_tokens for sample in samples),
        )
        self._to_release = None
        if samples and isinstance(objective, Prepares):
            objective.prepare(samples)
            self._to_release = objective, samples
        for members in plan:
            before_each()
            tally.add(*self._one_micro_batch(members, objective, totals))
        if self._to_release is not None:
            tally.costs = dict(self._to_release[0].costs())
        return tally

    @torch.no_grad()
    def measure(self, samples: Sequence[Sample], objective: Objective, totals: Totals) -> Tally:
        """``accumulate`` without gradient."""
        tally = self.accumulate(samples, objective, totals)
        self._release()
        return tally

    def grad_norm(self, sample_ids: Sequence[str]) -> float:
        """Norm of the gradient. ``FloatingPointError`` naming the samples it comes from when it is not finite."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"step {self.step}: the gradient norm is {norm} on samples {list(sample_ids)}; "
                "the weights were not changed"
            )
        return norm

    def apply(self, grad_norm: float) -> float:
        """One optimizer step with the gradient, clipped; returns the learning rate. ``grad_norm`` is its norm."""
        learning_rate = self._scheduler.get_last_lr()[0]
        nn.utils.clip_grads_with_norm_(
            self.parameters(), self._max_grad_norm, torch.tensor(grad_norm, device=self.device)
        )
        self._policy.before_step()
        self._optimizer.step()
        self._policy.after_step(grad_norm)
        self.drop_gradient()
        self._scheduler.step()
        self.step += 1
        self._release()
        return learning_rate

    def drop_gradient(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in an order that only the model and its adapters decide."""
        return list(self._policy.trained().values())

    @torch.no_grad()
    def token_stats(self, samples: Sequence[Sample], objective: Objective) -> dict[str, TokenStats]:
        """What the policy of this moment says of the samples' loss tokens, by sample id, on the CPU.

        ``TypeError`` for an objective other than GRPO's.
        """
        if not isinstance(objective, GrpoObjective):
            raise TypeError(f"{type(objective).__name__} has no statistics of single tokens; expected a GrpoObjective")
        found: dict[str, TokenStats] = {}
        trained = [sample for sample in samples if sample.num_loss_tokens]
        for members in plan_micro_batches(trained, self.budget):
            batch = PackedBatch.collate(members).to(self.device)
            stats = objective.token_stats(self._policy.forward(batch), batch)
            sizes = [sample.num_loss_tokens for sample in members]
            rows = zip(stats.logprobs.cpu().split(sizes), stats.entropies.cpu().split(sizes), strict=True)
            for sample_id, (logprobs, entropies) in zip(batch.sample_ids, rows, strict=True):
                found[sample_id] = TokenStats(logprobs=logprobs, entropies=entropies)
        return found

    def sync_reference(self, alpha: float) -> None:
        """Move the reference to ``alpha policy + (1 - alpha) reference``; checkpoints then hold it."""
        self._policy.sync_reference(alpha)

    def reference(self, batch: PackedBatch) -> HeadInputs:
        """States and head of the reference, without gradient: the model as it was when this learner was made, or as
        it was last synchronised.

        Raises ``ValueError`` unless the learner was built with ``keep_reference`` or LoRA.
        """
        return self._policy.reference(batch)

    def weights(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """A copy of the weights in ``dtype``, named as in the plain Hugging Face model, adapters merged.

        Tied tensors appear once, under the input embedding's name.
        """
        return {name: tensor.to(dtype, copy=True) for name, tensor in self._policy.plain_weights()}

    def save_final(
        self, directory: Path, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype | None = None
    ) -> None:
        """Write a plain Hugging Face checkpoint with its tokenizer, adapters merged; replaces ``directory``.

        The default ``dtype`` is the compute type: whoever loads the result measures, teaches or continues from
        exactly the weights the engine sampled from during training, at half the size of float32.
        """
        dtype = dtype or self.dtype
        partial = directory.with_name(f"partial-{directory.name}")
        shutil.rmtree(partial, ignore_errors=True)
        self._policy.model.save_pretrained(partial, state_dict=self.weights(dtype))
        # save_pretrained recorded the type of the master weights, not of the file.
        config = copy.deepcopy(self._policy.model.config)
        config.dtype = dtype
        config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)

    def save_checkpoint(self, root: Path, caller: Any = None) -> Path:
        """Write ``root/step-NNNNNN``, from which ``load_checkpoint`` continues bit for bit.

        ``caller`` is a JSON value kept beside it. Raises ``OSError`` (ENOSPC) when the disk is full.
        """
        state = {
            "model": {name: parameter.detach() for name, parameter in self._policy.trained().items()},
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "rng": rng_state(),
            "reference": self._policy.moved_reference(),
            "older_routes": self._policy.older_routes_state(),
        }
        return save_checkpoint(root, step=self.step, state=state, caller=caller)

    def load_checkpoint(self, path: Path) -> Any:
        """Continue from a checkpoint of a learner built the same way; returns the caller's value.

        Raises ``RecipeError`` when the checkpoint's weights are not those this learner trains.
        """
        checkpoint = load_checkpoint(path)
        mine, saved = self._policy.trained(), checkpoint.state["model"]
        if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in saved.items()}:
            raise RecipeError(
                f"{path}: the checkpoint has {len(saved)} trained tensors and this learner {len(mine)}, or their "
                "names or shapes differ; resume with the model and lora settings the run was started with"
            )
        for name, tensor in mine.items():
            tensor.data.copy_(saved[name])
        self._optimizer.load_state_dict(checkpoint.state["optimizer"])
        self._scheduler.load_state_dict(checkpoint.state["scheduler"])
        set_rng_state(checkpoint.state["rng"])
        self._policy.restore_reference(checkpoint.state.get("reference", {}))
        self._policy.restore_older_routes(checkpoint.state.get("older_routes"))
        self.step = checkpoint.step
        return checkpoint.caller

    def close(self) -> None:
        """Free model, optimizer and opened objectives; the learner is then unusable. May be called again."""
        if not hasattr(self, "_policy"):
            return
        while self._opened:
            self._opened.pop()[1].close()
        self._accelerator.free_memory()
        del self._policy, self._optimizer, self._scheduler
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _release(self) -> None:
        if self._to_release is not None:
            objective, samples = self._to_release
            objective.release(samples)
        self._to_release = None

    def _one_micro_batch(
        self, members: Sequence[Sample], objective: Objective, totals: Totals
    ) -> tuple[float, Metrics]:
        """One micro-batch's share of loss and gradient. Its arrays and activations are gone on return."""
        batch = PackedBatch.collate(members).to(self.device)
        # The budget is what fits; a single sample beyond it pays in time for the memory it lacks.
        recompute = torch.is_grad_enabled() and len(batch.token_ids) > self.budget
        loss, metrics = objective.loss(self._policy.forward(batch, recompute=recompute), batch, totals)
        if not math.isfinite(value := loss.item()):
            raise FloatingPointError(
                f"step {self.step}: the loss is {value} in a micro-batch of samples {list(batch.sample_ids)}; "
                "the weights were not changed"
            )
        if torch.is_grad_enabled():
            self._accelerator.backward(loss)
        return value, metrics


def with_loss(samples: Sequence[Sample]) -> list[Sample]:
    """Those with a token that carries loss. ``ValueError`` when there is none."""
    trained = [sample for sample in samples if sample.num_loss_tokens]
    if not trained:
        raise ValueError(f"none of the {len(samples)} samples has a token with loss; leave out this update")
    return trained


def _check_single_process(accelerator: Accelerator) -> None:
    if accelerator.num_processes != 1:
        raise RecipeError(
            f"the learner runs in one process and was started in {accelerator.num_processes}; start it without "
            "accelerate launch or torchrun"
        )
