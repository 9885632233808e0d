"""Kinds of teachers: a Hugging Face checkpoint, and a LoRA adapter on one.

A source is a frozen value that pickles; ``load`` makes the live model, checks that its logits are the product of
its states and its head, and gives it for inference only.

Not covered: architectures that scale or cap their logits, add a bias to them, or are not causal; loading refuses
them.
"""

from __future__ import annotations

import functools
import gc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from posttrain.errors import RecipeError
from posttrain.models import compute_dtype, load_model, resolve_path
from posttrain.types import IntArray
from teachers.batching import length_batches

DType = Literal["auto", "float32", "bfloat16"]
HASHED_SUFFIXES = (".safetensors", ".bin", ".gguf", ".index.json")
HASHED_NAMES = ("config.json", "adapter_config.json")
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Config fields that scale or cap logits. A cap bends small logits by less than rounding, so that comparing numbers
alone would miss it."""
MAX_BATCH_TOKENS = 8192
"""Tokens of one forward pass, padding included."""


@dataclass(frozen=True, slots=True)
class HFTeacher:
    """A causal language model checkpoint: anything ``posttrain.config.Model.path`` may be."""

    path: str
    dtype: DType = "auto"
    """Compute type, as in ``posttrain.config.Model.dtype``."""

    @property
    def fingerprint(self) -> str:
        return _digest(self.dtype, _folder_digest(_local_folder(self.path)))

    @property
    def checkpoint(self) -> str:
        return self.path

    @property
    def tokenizer_path(self) -> str:
        return self.path

    def load(self, device: str) -> CausalTeacher:
        """The model on ``device``. ``RecipeError`` when its logits are not states times head."""
        return CausalTeacher(_load_frozen(self.path, self.dtype, device), device, name=self.path)


@dataclass(frozen=True, slots=True)
class AdapterTeacher:
    """A peft LoRA adapter on another teacher's checkpoint.

    The adapter is not merged: merging in bfloat16 would round the specialist's small changes away. An adapter
    that leaves the output head alone has its base's head, bit for bit.
    """

    base: HFTeacher
    adapter: str
    """Folder with ``adapter_config.json`` and the adapter's weights."""

    @property
    def fingerprint(self) -> str:
        return _digest(self.base.fingerprint, _folder_digest(Path(self.adapter)))

    @property
    def tokenizer_path(self) -> str:
        return self.base.path

    def load(self, device: str) -> CausalTeacher:
        """The adapted model on ``device``. ``RecipeError`` when peft is missing or the adapter does not fit."""
        try:
            from peft import PeftModel
        except ImportError as error:
            raise RecipeError(f"teacher {self.adapter!r} is a LoRA adapter: pip install 'posttrain[peft]'") from error
        model = _load_frozen(self.base.path, self.base.dtype, device)
        adapted = PeftModel.from_pretrained(model, self.adapter).get_base_model()
        return CausalTeacher(adapted, device, name=self.adapter)


class CausalTeacher:
    """A loaded causal language model that gives hidden states. Inference only."""

    def __init__(self, model: Any, device: str, *, name: str) -> None:
        self._model = model.to(device).eval().requires_grad_(False)
        self._device = device
        _check_logits_are_head_times_state(self._model, device, name)

    @property
    def head(self) -> torch.Tensor:
        """Output projection, [V, E]."""
        weight: torch.Tensor = self._model.get_output_embeddings().weight
        return weight.detach()

    @property
    def num_bytes(self) -> int:
        """Memory of the weights; tied ones count once."""
        return sum(parameter.nbytes for parameter in self._model.parameters())

    @torch.no_grad()
    def hidden_states(self, sequences: Sequence[IntArray]) -> list[torch.Tensor]:
        """The states after the final norm, one [T, E] tensor per sequence, in the model's dtype and on its device.

        Sequences of similar length share a forward pass. They are padded on the right without a mask: a causal
        model's earlier positions cannot see the padding.
        """
        states: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
        lengths = [len(sequence) for sequence in sequences]
        for batch in length_batches(lengths, max_tokens=MAX_BATCH_TOKENS):
            ids_BT = torch.zeros(len(batch), lengths[batch[0]], dtype=torch.long)
            for row, index in enumerate(batch):
                ids_BT[row, : lengths[index]] = torch.tensor(sequences[index])
            hidden_BTE = _body(self._model)(input_ids=ids_BT.to(self._device), use_cache=False).last_hidden_state
            for row, index in enumerate(batch):
                # A copy, so that a caller who keeps one sequence does not keep the whole batch.
                states[index] = hidden_BTE[row, : lengths[index]].clone()
        return states

    def close(self) -> None:
        """Free the weights. Tensors handed out before stay valid and keep only themselves alive."""
        self._model = None
        gc.collect()  # Modules refer to one another in cycles, which would otherwise wait for the collector.
        if torch.device(self._device).type == "cuda":
            torch.cuda.empty_cache()


def _load_frozen(path: str, dtype: DType, device: str) -> Any:
    """The checkpoint in its compute dtype.

    Loaded in float32 and then converted, since ``from_pretrained`` otherwise changes torch's default dtype for
    the whole process meanwhile, and teachers load in the background of other computations. Buffers, such as
    rotary frequencies, stay float32.
    """
    model = load_model(path, torch.float32)
    target = compute_dtype(dtype, model.num_parameters(), device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(target)
    return model


def _body(model: Any) -> Any:
    """The model without its output head."""
    return getattr(model, model.base_model_prefix)


@torch.no_grad()
def _check_logits_are_head_times_state(model: Any, device: str, name: str) -> None:
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise RecipeError(
            f"teacher {name!r} ({type(model).__name__}) has no output head without bias; expected logits that are "
            "head @ state; choose another teacher"
        )
    ids_BT = torch.arange(8, device=device).remainder(model.config.vocab_size)[None]
    state_BTE = _body(model)(input_ids=ids_BT, use_cache=False).last_hidden_state
    own_BTV = model(input_ids=ids_BT, use_cache=False).logits.float()
    rebuilt_BTV = state_BTE.float() @ head.weight.float().T
    worst = (own_BTV - rebuilt_BTV).abs().max().item()
    scale = own_BTV.abs().max().item()
    bound = max(1.0, scale) * (1e-4 if head.weight.dtype is torch.float32 else 2**-7)
    transforms = [field for field in LOGIT_TRANSFORMS if getattr(model.config, field, None) not in (None, 1.0)]
    if not worst <= bound or transforms:
        raise RecipeError(
            f"teacher {name!r} ({type(model).__name__}): its logits (up to {scale:.3g}) differ from head @ state by "
            f"{worst:.3g} where at most {bound:.3g} is rounding; config fields that transform logits: "
            f"{transforms or 'none'}. Scaled or soft-capped logits cannot be rebuilt from states; choose a teacher "
            "without them"
        )


def _local_folder(path: str) -> Path:
    """Where a checkpoint's files are on this machine; a hub checkpoint is downloaded."""
    resolved = resolve_path(path)
    if Path(resolved).is_dir():
        return Path(resolved)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(resolved))


def _folder_digest(folder: Path) -> str:
    """Digest of the files that decide a checkpoint's logits. ``RecipeError`` when there are no weights."""
    files = sorted(
        file for file in folder.iterdir() if file.name in HASHED_NAMES or file.name.endswith(HASHED_SUFFIXES)
    )
    if not any(file.suffix != ".json" for file in files):
        raise RecipeError(f"teacher folder {str(folder)!r} holds no weights; expected one of {HASHED_SUFFIXES[:3]}")
    return _digest(*(part for file in files for part in (file.name, _file_digest_now(file))))


def _file_digest_now(file: Path) -> str:
    stat = file.stat()
    return _file_digest(file, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _file_digest(file: Path, _size: int, _mtime_ns: int) -> str:
    """Content hash; size and time of change only key the memory, so that a file is read once while it is the same."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
