"""Merging specialists by their weights alone: averages (arXiv 2203.05482, 2212.04089) and TIES (arXiv 2306.01708).

A task vector is specialist minus base, in float32. Checkpoints are read tensor by tensor and the result is written file
by file as the base's are, so memory holds one tensor of every specialist and one file of the result.

The base is rounded to the specialist's type before it is subtracted: what training has not moved is then exactly zero,
and not the rounding of a float32 base, which TIES might take for the largest entries.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedTokenizerBase

from posttrain.config import Ties, WeightAverage
from posttrain.errors import RecipeError
from posttrain.models import resolve_path

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TIED_HEAD = "lm_head.weight"
"""Left out where the config ties it to the embeddings: some checkpoints store the copy and some do not."""
_HALF = 1 << 16


def mean_vector(vectors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The mean of task vectors of one shape, weighted: sum_i w_i v_i / sum_i w_i."""
    return _weighted_sum(vectors, weights) / math.fsum(weights)


def ties_vector(vectors: Sequence[torch.Tensor], thresholds: Sequence[float], weights: Sequence[float]) -> torch.Tensor:
    """Trim, elect sign, disjoint mean (TIES-merging, section 4) of task vectors of one shape.

    Entries smaller than their vector's threshold become zero; the sign of the weighted sum is elected; the result is
    the weighted mean of the entries with that sign, zero where there is none.
    """
    trimmed = [v.where(v.abs() >= threshold, 0.0) for v, threshold in zip(vectors, thresholds, strict=True)]
    elected = _weighted_sum(trimmed, weights).sign()
    agreeing = [v.where(v.sign() == elected, 0.0) for v in trimmed]
    share = _weighted_sum([(v != 0).float() for v in agreeing], weights)
    return torch.where(share > 0, _weighted_sum(agreeing, weights) / share, 0.0)


def magnitude_threshold(vector: Callable[[], Iterator[torch.Tensor]], density: float) -> float:
    """The magnitude that a share ``density`` of a vector's entries reach, exactly.

    ``vector`` gives the float32 pieces of the vector anew each time. The bits of floats that are not negative are in
    the order of their values, so two passes of counting, of the upper and then the lower 16 bits, find it unsorted.
    """
    upper_counts, total = torch.zeros(_HALF, dtype=torch.long), 0
    for piece in vector():
        upper_counts += torch.bincount(_bits(piece) >> 16, minlength=_HALF)
        total += piece.numel()
    wanted = math.ceil(density * total)
    upper, larger = _reached(upper_counts, wanted)
    lower_counts = torch.zeros(_HALF, dtype=torch.long)
    for piece in vector():
        bits = _bits(piece)
        lower_counts += torch.bincount(bits[bits >> 16 == upper] & (_HALF - 1), minlength=_HALF)
    lower, _ = _reached(lower_counts, wanted - larger)
    return torch.tensor(upper * _HALF + lower, dtype=torch.int32).view(torch.float32).item()


def _bits(piece: torch.Tensor) -> torch.Tensor:
    return piece.abs().flatten().view(torch.int32)


def _reached(counts: torch.Tensor, wanted: int) -> tuple[int, int]:
    """The largest value that ``wanted`` entries reach, and how many are larger."""
    reach = counts.flip(0).cumsum(0).flip(0)
    value = int((reach >= wanted).nonzero().max())
    return value, int(reach[value] - counts[value])


def _weighted_sum(vectors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = torch.zeros_like(vectors[0])
    for vector, weight in zip(vectors, weights, strict=True):
        total.add_(vector, alpha=weight)
    return total


class Checkpoint:
    """The tensors of a checkpoint folder with safetensors files, read one at a time. A context manager.

    Raises ``RecipeError`` for a folder without such files.
    """

    def __init__(self, path: str) -> None:
        self.folder = _local_folder(path)
        self.config = AutoConfig.from_pretrained(self.folder)
        self.files: dict[str, list[str]] = {}
        """File name -> the names of its tensors."""
        self._readers: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()
        index = self.folder / INDEX
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [WEIGHTS]
        for name in names:
            if not (self.folder / name).is_file():
                raise RecipeError(
                    f"checkpoint {path!r}: no {name} in {self.folder}; expected safetensors weights, since they are "
                    "merged tensor by tensor; save the model with save_pretrained"
                )
            reader = self._stack.enter_context(safe_open(self.folder / name, framework="pt"))
            tied = getattr(self.config, "tie_word_embeddings", False)
            self.files[name] = [key for key in reader.keys() if not (tied and key == TIED_HEAD)]  # noqa: SIM118
            self._readers.update(dict.fromkeys(self.files[name], reader))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By tensor name."""
        return {name: tuple(reader.get_slice(name).get_shape()) for name, reader in self._readers.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """As stored. ``KeyError`` names a tensor that is not there."""
        tensor: torch.Tensor = self._readers[name].get_tensor(name)
        return tensor


@dataclass(slots=True)
class _Norms:
    """Squared lengths of the task vectors and of what became of them."""

    vectors: list[float]
    merged: float = 0.0
    moved: int = 0
    total: int = 0

    def add(self, vectors: Sequence[torch.Tensor], merged: torch.Tensor) -> None:
        self.vectors = [n + float(v.square().sum()) for n, v in zip(self.vectors, vectors, strict=True)]
        self.merged += float(merged.square().sum())
        self.moved += int((merged != 0).sum())
        self.total += merged.numel()


@dataclass(kw_only=True)
class WeightMerge:
    """A base and the specialists that were trained from it, to be merged into one checkpoint."""

    base: Checkpoint
    specialists: Mapping[str, Checkpoint]
    weights: Mapping[str, float]
    """By the names of the specialists."""
    _shares: list[float] = field(init=False)

    def __post_init__(self) -> None:
        for name, specialist in self.specialists.items():
            _check_same_shapes(name, specialist, self.base)
        self._shares = [self.weights[name] for name in self.specialists]

    def write(
        self, directory: Path, config: WeightAverage | Ties, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
    ) -> dict[str, float]:
        """Write a plain checkpoint in ``dtype`` with its tokenizer; replaces ``directory``.

        Returns ``relative_norm``, the length of the merged task vector over the mean length of the specialists', and
        ``moved``, the share of weights that it moves.
        """
        thresholds = self._thresholds(config.density) if isinstance(config, Ties) else []
        norms = _Norms([0.0] * len(self.specialists))
        placed: dict[str, str] = {}
        num_bytes = 0
        partial = directory.with_name(f"partial-{directory.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file, names in self.base.files.items():
            merged = {}
            for name in names:
                vectors = [self._vector(specialist, name) for specialist in self.specialists.values()]
                if isinstance(config, Ties):
                    vector = config.scale * ties_vector(vectors, thresholds, self._shares)
                else:
                    vector = config.scale * mean_vector(vectors, self._shares)
                norms.add(vectors, vector)
                start = self._start(next(iter(self.specialists.values())), name)
                merged[name] = (start + vector).to(dtype)
            save_file(merged, partial / file, metadata={"format": "pt"})
            placed |= dict.fromkeys(merged, file)
            num_bytes += sum(tensor.nbytes for tensor in merged.values())
        if len(self.base.files) > 1:
            index = {"metadata": {"total_size": num_bytes}, "weight_map": placed}
            (partial / INDEX).write_text(json.dumps(index, indent=1))
        self._write_rest(partial, tokenizer, dtype)
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
        mean_length = sum(map(math.sqrt, norms.vectors)) / len(norms.vectors)
        return {
            "relative_norm": math.sqrt(norms.merged) / mean_length if mean_length else 0.0,
            "moved": norms.moved / norms.total,
        }

    def _thresholds(self, density: float) -> list[float]:
        """Of each task vector as a whole, as in the paper, not of each tensor."""

        def pieces(specialist: Checkpoint) -> Callable[[], Iterator[torch.Tensor]]:
            return lambda: (self._vector(specialist, name) for name in self.base.shapes)

        return [magnitude_threshold(pieces(specialist), density) for specialist in self.specialists.values()]

    def _vector(self, specialist: Checkpoint, name: str) -> torch.Tensor:
        return specialist.tensor(name).float() - self._start(specialist, name)

    def _start(self, specialist: Checkpoint, name: str) -> torch.Tensor:
        """The base's tensor as the specialist's file would hold it, in float32."""
        return self.base.tensor(name).to(specialist.tensor(name).dtype).float()

    def _write_rest(self, folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
        self.base.config.dtype = dtype
        self.base.config.save_pretrained(folder)
        generation = self.base.folder / "generation_config.json"
        if generation.exists():
            shutil.copy(generation, folder)
        tokenizer.save_pretrained(folder)


def _check_same_shapes(name: str, specialist: Checkpoint, base: Checkpoint) -> None:
    theirs, ours = specialist.shapes, base.shapes
    differing = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    if differing:
        shown = ", ".join(f"{key}: {theirs.get(key)} / {ours.get(key)}" for key in differing[:3])
        raise RecipeError(
            f"specialist {name!r} at {specialist.folder}: {len(differing)} of {len(ours)} tensors differ in shape from "
            f"the base's or are in one of the two only (specialist / base: {shown}); weights can be merged only of "
            "models trained from one base; choose such a specialist, or distill"
        )


def _local_folder(path: str) -> Path:
    resolved = resolve_path(path)
    if Path(resolved).is_dir():
        return Path(resolved)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(resolved))
