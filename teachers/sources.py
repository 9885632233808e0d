"""Kinds of teachers: a Hugging Face checkpoint, and a LoRA adapter on one.

A source is a frozen value that pickles; ``load`` makes the live model, checks that its logits are made of its states
and its head as ``teachers.logits`` says, and gives it for inference only; ``stream`` does so within less memory than
its weights need.

Not covered: architectures that add a bias to their logits, or are not causal; loading refuses them.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from posttrain.errors import RecipeError
from posttrain.models import compute_dtype, load_model, resolve_folder, resolve_path
from posttrain.protocols import TeacherModel
from posttrain.types import IntArray
from teachers.batching import length_batches, pack, packed, packed_rows, padded
from teachers.logits import LogitTransform, OutputHead, body_of, check_logits
from teachers.streaming import StreamedTeacher
from teachers.weights import Skeleton, Unreadable, Weights, drop_weights

DType = Literal["auto", "float32", "bfloat16"]
HASHED_SUFFIXES = (".safetensors", ".bin", ".gguf", ".index.json")
HASHED_NAMES = ("config.json", "adapter_config.json")


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

    def num_bytes(self, device: str) -> int | None:
        """Memory its weights need; None where the files do not tell."""
        try:
            layout = _layout(_local_folder(self.path))
        except Unreadable:
            return None
        return layout.num_elements * compute_dtype(self.dtype, layout.num_parameters, device).itemsize

    def load(self, device: str) -> CausalTeacher:
        """The model on ``device``. ``RecipeError`` when its logits are not made of states and head."""
        model, skeleton = _load_frozen(self.path, self.dtype, device)
        return CausalTeacher(model, device, name=self.path, skeleton=skeleton)

    def refill(self, model: TeacherModel, device: str) -> bool:
        """Make another checkpoint's model this one's, in place; False unless they differ in nothing but weights."""
        return isinstance(model, CausalTeacher) and model.refill(_local_folder(self.path), self.dtype, device)

    def stream(self, device: str, *, memory_bytes: int) -> StreamedTeacher:
        """The model in at most so much memory for weights, read layer by layer. ``RecipeError`` when it cannot be."""
        skeleton = _skeleton(self.path)
        dtype = compute_dtype(self.dtype, skeleton.num_parameters, device)
        return StreamedTeacher(skeleton, dtype=dtype, device=device, memory_bytes=memory_bytes, name=self.path)

    def load_head(self, device: str) -> OutputHead:
        """The output head alone, in the type of a model on ``device``, in host memory."""
        folder = _local_folder(self.path)
        try:
            layout, weights = _layout(folder), Weights(folder)
        except Unreadable:
            with_everything = self.load("cpu")
            head = OutputHead(weight_VE=with_everything.head.clone(), logit_cap=with_everything.logit_cap)
            with_everything.close()
            return head
        dtype = compute_dtype(self.dtype, layout.num_parameters, device)
        return OutputHead(weight_VE=weights.read(layout.head, dtype), logit_cap=layout.logit_cap)


@dataclass(frozen=True, slots=True)
class AdapterTeacher:
    """A peft LoRA adapter on another teacher's checkpoint.

    The adapter is not merged: merging in bfloat16 would round the specialist's small changes away. An adapter
    that leaves the output head alone has its base's head, bit for bit.
    """

    base: HFTeacher
    adapter: str
    """Folder with ``adapter_config.json`` and the adapter's weights, here or at an fsspec URL."""

    @property
    def fingerprint(self) -> str:
        return _digest(self.base.fingerprint, _folder_digest(self._folder))

    @property
    def tokenizer_path(self) -> str:
        return self.base.path

    def num_bytes(self, device: str) -> int | None:
        """Memory its weights need; None where the files do not tell."""
        base = self.base.num_bytes(device)
        # Adapters compute in float32.
        adapter = sum(file.stat().st_size for file in self._folder.glob("adapter_model.*"))
        return None if base is None else base + adapter

    def load(self, device: str) -> CausalTeacher:
        """The adapted model on ``device``. ``RecipeError`` when peft is missing or the adapter does not fit."""
        model, _ = _load_frozen(self.base.path, self.base.dtype, device)
        return CausalTeacher(self._adapted(model), device, name=self.adapter)

    def stream(self, device: str, *, memory_bytes: int) -> StreamedTeacher:
        """The adapter in memory, on a base that is read layer by layer. ``RecipeError`` when that cannot be done."""
        skeleton = _skeleton(self.base.path)
        dtype = compute_dtype(self.base.dtype, skeleton.num_parameters, device)
        skeleton.model = self._adapted(skeleton.model, streamed=True)
        return StreamedTeacher(skeleton, dtype=dtype, device=device, memory_bytes=memory_bytes, name=self.adapter)

    def load_head(self, device: str) -> OutputHead:
        """The base's output head alone; ``load`` and ``stream`` refuse adapters that change it."""
        return self.base.load_head(device)

    @property
    def _folder(self) -> Path:
        return Path(resolve_folder(self.adapter, holding="adapter_config.json"))

    def _adapted(self, model: Any, *, streamed: bool = False) -> Any:
        try:
            from peft import PeftModel, load_peft_weights
        except ImportError as error:
            raise RecipeError(f"teacher {self.adapter!r} is a LoRA adapter: pip install 'posttrain[peft]'") from error
        adapted = PeftModel.from_pretrained(model, str(self._folder), low_cpu_mem_usage=streamed)
        if streamed:
            # Peft moved the adapter to where its base is, which is nowhere yet.
            weights = load_peft_weights(str(self._folder), device="cpu")
            for name, parameter in list(adapted.named_parameters()):
                if (saved := weights.get(name.replace(".default", ""))) is not None and parameter.is_meta:
                    owner, _, last = name.rpartition(".")
                    owned = nn.Parameter(saved.float(), requires_grad=False)
                    setattr(adapted.get_submodule(owner), last, owned)
        return adapted.get_base_model()


class CausalTeacher:
    """A loaded causal language model that gives hidden states. Inference only.

    With the ``skeleton`` that it was made of, another checkpoint can be read into its memory.
    """

    def __init__(self, model: Any, device: str, *, name: str, skeleton: Skeleton | None = None) -> None:
        self._skeleton = skeleton
        self._model = model.to(device).eval().requires_grad_(False)
        self._device = device
        self._as_read = _versions(self._model)
        self._transform = LogitTransform.of(model.config)
        check_logits(self._model, self._transform, name=name)
        self._packs = pack(self._model)

    @property
    def head(self) -> torch.Tensor:
        """Output projection, [V, E]."""
        weight: torch.Tensor = self._model.get_output_embeddings().weight
        return weight.detach()

    @property
    def logit_cap(self) -> float | None:
        """c where the model's logits are ``c tanh(head @ state / c)``; None where they are not capped."""
        return self._transform.cap

    @property
    def num_bytes(self) -> int:
        """Memory of the weights; tied ones count once."""
        return sum(parameter.nbytes for parameter in self._model.parameters())

    def hidden_states(self, sequences: Sequence[IntArray]) -> list[torch.Tensor]:
        """The states that enter the head, one [T, E] tensor per sequence, on the model's device.

        After the final norm and times the logit scale, if there is one; then in float32, else in the model's dtype.
        """
        states: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
        for index, states_TE in self.each_state(sequences):
            states[index] = states_TE
        return states

    @torch.no_grad()
    def each_state(self, sequences: Sequence[IntArray]) -> Iterator[tuple[int, torch.Tensor]]:
        """Index and states [T, E] of each sequence, longest first.

        Sequences lie in packed rows. Where the model's attention cannot do that, sequences of similar length share a
        forward pass, padded on the right without a mask: a causal model's earlier positions cannot see the padding.
        """
        body = body_of(self._model)
        if self._packs:
            for members in packed_rows([len(sequence) for sequence in sequences]):
                together = [sequences[index] for index in members]
                hidden_TE = body(**packed(together, self._device), use_cache=False).last_hidden_state[0]
                states = self._transform.scaled(hidden_TE).split([len(sequence) for sequence in together])
                # Copies, so that a caller who keeps one sequence does not keep the whole batch.
                yield from ((index, states_TE.clone()) for index, states_TE in zip(members, states, strict=True))
            return
        lengths = [len(sequence) for sequence in sequences]
        for batch in length_batches(lengths, self._device):
            ids_BT = padded([sequences[index] for index in batch]).to(self._device)
            states_BTE = self._transform.scaled(body(input_ids=ids_BT, use_cache=False).last_hidden_state)
            for row, index in enumerate(batch):
                yield index, states_BTE[row, : lengths[index]].clone()

    def refill(self, folder: Path, dtype: DType, device: str) -> bool:
        """See ``HFTeacher.refill``. What was checked of the architecture at the load holds for the other, too.

        A model whose forward passes change weights or buffers (RWKV's rescaling, dynamic rope) is not used again.
        """
        skeleton = self._skeleton
        if skeleton is None or device != self._device or _versions(self._model) != self._as_read:
            return False
        if compute_dtype(dtype, skeleton.num_parameters, device) is not self.head.dtype:
            return False
        try:
            refilled = skeleton.refill(folder)
        except Unreadable:
            return False
        self._as_read = _versions(self._model)
        return refilled

    def close(self) -> None:
        """Free the weights. Tensors handed out before stay valid and keep only themselves alive."""
        if self._model is not None:
            drop_weights(self._model)
            self._model = None
        if torch.device(self._device).type == "cuda":
            torch.cuda.empty_cache()


def _versions(model: Any) -> list[tuple[int, int]]:
    """Of each weight and buffer, which tensor it is and how often it was changed in place."""
    return [(id(tensor), tensor._version) for tensor in (*model.parameters(), *model.buffers())]


def _load_frozen(path: str, dtype: DType, device: str) -> tuple[Any, Skeleton | None]:
    """The checkpoint in its compute dtype, and the skeleton it was read into if it was.

    Buffers, such as rotary frequencies, stay float32. Read tensor by tensor, so that no second copy is ever in memory.
    What transformers must convert it loads itself, in float32: ``from_pretrained`` otherwise changes torch's default
    dtype for the whole process meanwhile, and teachers load in the background of other computations.
    """
    try:
        skeleton = Skeleton(_local_folder(path))
        return skeleton.fill(compute_dtype(dtype, skeleton.num_parameters, device), device), skeleton
    except Unreadable:
        model = load_model(path, torch.float32)
    target = compute_dtype(dtype, model.num_parameters(), device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(target)
    return model, None


def _skeleton(path: str) -> Skeleton:
    try:
        return Skeleton(_local_folder(path))
    except Unreadable as error:
        raise RecipeError(
            f"teacher {path!r} is larger than memory_mb and cannot be read layer by layer: {error}; expected plain "
            "safetensors with the names that transformers gives its weights; raise memory_mb, or save it so"
        ) from error


@dataclass(frozen=True, slots=True)
class _Layout:
    """What is known of a checkpoint without its weights."""

    num_parameters: int
    num_elements: int
    """Numbers in memory; tied ones count once."""
    head: str
    logit_cap: float | None


def _layout(folder: Path) -> _Layout:
    return _layout_of(folder, (folder / "config.json").stat().st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _layout_of(folder: Path, _mtime_ns: int) -> _Layout:
    skeleton = Skeleton(folder)
    head = skeleton.model.get_output_embeddings()
    if head is None:
        raise Unreadable(f"{type(skeleton.model).__name__} has no output head")
    (name,) = (name for name, module in skeleton.model.named_modules() if module is head)
    sources = skeleton.sources()
    numbers = sum(skeleton.weights.num_bytes(stored, 1) for stored in set(sources.values()))
    return _Layout(
        num_parameters=skeleton.num_parameters,
        num_elements=numbers,
        head=sources[f"{name}.weight"],
        logit_cap=LogitTransform.of(skeleton.model.config).cap,
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
