"""A Hugging Face causal language model under training: hidden states of packed rows, adapters, plain weights.

Shape letters: ``N`` loss tokens, ``T`` tokens of a row, ``V`` vocabulary, ``D`` hidden width.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.config import AnticipatoryRouting, Lora
from posttrain.errors import RecipeError
from posttrain.learner.attention import use_packed_attention
from posttrain.learner.packing import PackedBatch
from posttrain.routing import Routers
from posttrain.stability.anticipatory import OlderRoutes

ADAPTER = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadInputs:
    """What a model's logits at the loss positions are made of: ``hidden @ head.T``."""

    hidden_ND: torch.Tensor
    """States that enter the head (after the final norm) at the predecessor of each loss token."""
    head_VD: torch.Tensor


class Policy:
    """The model, its adapters if any, and a frozen copy of its start weights if wanted.

    Takes ``model`` over: switches it to packed attention and, with ``lora``, puts adapters into it. ``keep_routing``
    sends tokens to the experts that they went to in the engine, as far as a batch says which, in the reference, too.
    Raises ``RecipeError`` for a model whose logits are not ``head @ hidden``, that ignores packing, or whose parameters
    are not float32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        dtype: torch.dtype,
        lora: Lora | None,
        keep_reference: bool,
        seed: int,
        keep_routing: bool = False,
    ) -> None:
        _check_master_dtype(model)
        use_packed_attention(model)
        _check_logits(model)
        self.model = model
        self._dtype = dtype
        self._reference = _frozen_copy(model) if keep_reference and lora is None else None
        self._reference_moved = False
        self._keep_routing = keep_routing
        self._older: OlderRoutes | None = None
        self._routers = {
            id(each): Routers(each) for each in (model, self._reference) if each is not None and keep_routing
        }
        self._adapted = None if lora is None else _add_adapters(model, lora, seed)
        model.train()

    def forward(self, batch: PackedBatch, *, recompute: bool = False) -> HeadInputs:
        """Hidden states at the loss positions and the head, in the compute type, with gradient.

        ``recompute`` keeps only what enters each layer and its attention, and computes the rest again in the backward
        pass, where the architecture can: at most a third more work, for one layer's activations in place of all.
        """
        with _recomputing(self.model) if recompute else contextlib.nullcontext():
            return self._forward(self.model, batch)

    @torch.no_grad()
    def reference(self, batch: PackedBatch) -> HeadInputs:
        """The same of the start weights, without gradient. ``ValueError`` when they were not kept."""
        if self._adapted is not None:
            with self._adapted.disable_adapter():
                return self._forward(self.model, batch)
        if self._reference is None:
            raise ValueError("this learner kept no reference; build it with keep_reference=True")
        return self._forward(self._reference, batch)

    @torch.no_grad()
    def sync_reference(self, alpha: float) -> None:
        """Move the reference to ``alpha policy + (1 - alpha) reference``.

        Raises ``RecipeError`` with adapters, whose reference is the model without them, and ``ValueError`` when no
        reference was kept.
        """
        if self._adapted is not None:
            raise RecipeError("sync_ref_model with model.lora: expected one of the two; set sync_ref_model to false")
        reference = self._reference_weights()
        for name, parameter in self.model.named_parameters():
            reference[name].mul_(1 - alpha).add_(parameter, alpha=alpha)
        self._reference_moved = True

    def moved_reference(self) -> dict[str, torch.Tensor]:
        """The reference's weights, for a checkpoint; empty while they are the start weights."""
        return dict(self._reference_weights()) if self._reference_moved else {}

    def restore_reference(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put back what ``moved_reference`` gave."""
        self._reference_moved = bool(weights)
        for name, tensor in weights.items():
            self._reference_weights()[name].copy_(tensor)

    def anticipate_routes(self, config: AnticipatoryRouting) -> None:
        """Choose experts by older weights from each spike on, for a while. ``RecipeError`` for a model without any."""
        if not len(Routers(self.model)):
            raise RecipeError(
                f"optim.anticipatory_routing is set and {type(self.model).__name__} has no experts to choose; set it "
                "to none"
            )
        self._routers.setdefault(id(self.model), Routers(self.model))
        self._older = OlderRoutes(self.model, self.trained(), config)

    def before_step(self) -> None:
        """Called before the weights change."""
        if self._older is not None:
            self._older.before_step()

    def after_step(self, grad_norm: float) -> None:
        """Called after they have changed, with the norm of the gradient that did it."""
        if self._older is not None:
            self._older.guard.observe(grad_norm)

    def older_routes_state(self) -> dict[str, Any] | None:
        """For a checkpoint."""
        return None if self._older is None else self._older.state()

    def restore_older_routes(self, state: Mapping[str, Any] | None) -> None:
        """Put back what ``older_routes_state`` gave."""
        if self._older is not None and state is not None:
            self._older.restore(state)

    def vocabulary_matrices(self) -> list[nn.Parameter]:
        """Embedding and head, one if they are tied."""
        matrices = (self.model.get_input_embeddings().weight, _head(self.model).weight)
        return [each for each in matrices if isinstance(each, nn.Parameter)]

    def trained(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name: all of them, or the adapters'."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def plain_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Detached parameters under the plain model's names, tied ones once, with the adapters' products added."""
        deltas = {} if self._adapted is None else _adapter_deltas(self.model)
        for name, _ in self.model.named_parameters():
            if ".lora_" in name:
                continue
            plain = name.replace(".base_layer.", ".")
            # Not the parameter itself, which is the master where the layer computes with a quantised weight.
            owner, _, leaf = name.rpartition(".")
            tensor = getattr(self.model.get_submodule(owner), leaf).detach()
            yield plain, tensor + deltas[plain] if plain in deltas else tensor

    def _reference_weights(self) -> dict[str, torch.Tensor]:
        if self._reference is None:
            raise ValueError("this learner kept no reference; build it with keep_reference=True")
        # Not .data, whose changes would not count up the parameter's version.
        return {name: parameter.detach() for name, parameter in self._reference.named_parameters()}

    def _forward(self, model: PreTrainedModel, batch: PackedBatch) -> HeadInputs:
        if id(model) in self._routers:
            self._routers[id(model)].replay(self._routes(model, batch))
        hidden_ND = self._states(model, batch)[batch.loss_positions]
        # Cast here and not by autocast: the gradients of a tied head then add up in float32 with the embedding's.
        return HeadInputs(hidden_ND=hidden_ND.to(self._dtype), head_VD=_head(model).weight.to(self._dtype))

    def _states(self, model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
        """[T, D], after the final norm."""
        with self._autocast():
            # The decoder alone: logits of all positions would be the biggest tensor of the step.
            output = model.get_decoder()(
                input_ids=batch.token_ids[None],
                position_ids=batch.position_ids[None],
                segment_lengths=batch.segment_lengths,
                cu_seqlens=batch.cu_seqlens,
                use_cache=False,
            )
        states_TD: torch.Tensor = output.last_hidden_state[0]
        return states_TD

    def _routes(self, model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor | None:
        """The experts that the tokens of a batch are sent to, where the routers are not to choose."""
        known = batch.routes if self._keep_routing else None
        if model is not self.model or self._older is None or not self._older.active:
            return known
        return self._older.routes(lambda older: self._states(older, batch), known)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, dtype=self._dtype)


@contextlib.contextmanager
def _recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Layers that run in this context drop their activations. The model's own switch has changed its name."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, context_fn=_keeping_attention)
        layer.gradient_checkpointing = True
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = False


def _keeping_attention() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
    """What attention gives is kept: no bigger than the layer's input, and most of a long sample's work."""
    return create_selective_checkpoint_contexts(_keep_attention)


def _keep_attention(context: object, operator: Any, *args: object, **kwargs: object) -> CheckpointPolicy:
    is_attention = "attention" in str(operator) or "attn" in str(operator)
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


def _add_adapters(model: PreTrainedModel, lora: Lora, seed: int) -> Any:
    """Put LoRA layers into the model, in place; returns peft's handle, which can switch them off."""
    from peft import LoraConfig, get_peft_model

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft annotates int and divides it
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, adapter_name=ADAPTER)
    _head(model)
    return adapted


def _adapter_deltas(model: nn.Module) -> dict[str, torch.Tensor]:
    """What each adapter adds to its base weight. Computed aside: merging and unmerging in place would drift."""
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    return {f"{name}.weight": layer.get_delta_weight(ADAPTER).detach() for name, layer in layers.items()}


def _frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model).requires_grad_(False).eval()


def _head(model: PreTrainedModel) -> nn.Linear:
    """The output projection. Raises ``RecipeError`` unless it is a plain matrix."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise RecipeError(
            f"model: its output projection is {type(head).__name__}, expected a linear layer without bias or adapter; "
            "leave lm_head out of lora.target_modules, or choose another architecture"
        )
    return head


def _check_master_dtype(model: PreTrainedModel) -> None:
    found = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if found:
        raise RecipeError(
            f"model: parameters are {sorted(map(str, found))}, expected torch.float32 master weights; in half "
            "precision an update of a small learning rate rounds to nothing. Load the model in float32"
        )


@torch.no_grad()
def _check_logits(model: PreTrainedModel) -> None:
    """Check on a few tokens that logits are ``head @ hidden`` and that packed copies do not see each other."""
    was_training = model.training
    model.eval()
    ids = torch.arange(8, device=model.device) % model.config.get_text_config().vocab_size
    packed_ids, positions = ids.repeat(2)[None], torch.arange(8, device=model.device).repeat(2)[None]
    inputs = {"position_ids": positions, "segment_lengths": (8, 8), "use_cache": False}
    hidden_TD = model.get_decoder()(input_ids=packed_ids, **inputs).last_hidden_state[0]
    logits_TV = model(input_ids=packed_ids, **inputs).logits[0]
    model.train(was_training)
    if not torch.allclose(hidden_TD[:8], hidden_TD[8:], rtol=1e-3, atol=1e-3):
        raise RecipeError(
            f"model: {type(model).__name__} lets packed samples see each other; choose an architecture that hands "
            "keyword arguments down to its attention layers"
        )
    if not torch.allclose(hidden_TD @ _head(model).weight.T, logits_TV, rtol=1e-3, atol=1e-3):
        raise RecipeError(
            f"model: the logits of {type(model).__name__} are not its head times its last hidden state (scaled or "
            "soft-capped logits, for example), which the packed losses rely on; choose another architecture"
        )
