"""States of sequences that have left the batch and that others will go on from: turns of an episode, preempted rows."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from posttrain.engine.kv_cache import States

TokenArray = npt.NDArray[np.int64]

_HEAD = 16
"""Sequences that differ in their first 16 tokens are not compared further."""


def head_of(tokens: TokenArray) -> bytes:
    """What two sequences must have in common to be worth comparing."""
    return tokens[:_HEAD].tobytes()


def common(a: TokenArray, b: TokenArray) -> int:
    """Length of the longest common prefix."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size


@dataclass(frozen=True, slots=True, eq=False)
class Parked:
    """One sequence and its states."""

    owner: str
    """Id of the request it was made by."""
    tokens: TokenArray
    """As many as there are states."""
    states: States


class PrefixCache:
    """Parked sequences, the longest unused ones dropped when they hold more than ``max_tokens`` states.

    All were computed by the same weights: whoever replaces the weights clears the cache.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._parked: OrderedDict[bytes, Parked] = OrderedDict()

    def __len__(self) -> int:
        return len(self._parked)

    @property
    def num_tokens(self) -> int:
        return sum(len(parked.tokens) for parked in self._parked.values())

    def park(self, parked: Parked) -> None:
        """Keep a sequence; it replaces an equal one."""
        if not len(parked.tokens) or len(parked.tokens) > self._max_tokens:
            return
        self._parked[parked.tokens.tobytes()] = parked
        self._parked.move_to_end(parked.tokens.tobytes())
        while self.num_tokens > self._max_tokens:
            self._parked.popitem(last=False)

    def best(self, tokens: TokenArray) -> tuple[Parked, int] | None:
        """The parked sequence that shares the longest prefix with these tokens, and its length; None if none does."""
        head = head_of(tokens)
        found = [
            (common(parked.tokens, tokens), parked)
            for parked in self._parked.values()
            if head_of(parked.tokens)[: len(head)] == head[: parked.tokens.nbytes]
        ]
        shared, parked = max(found, key=lambda pair: pair[0], default=(0, None))
        if parked is None or shared == 0:
            return None
        self._parked.move_to_end(parked.tokens.tobytes())
        return parked, shared

    def drop(self, parked: Parked) -> None:
        self._parked.pop(parked.tokens.tobytes(), None)

    def forget(self, prefix: str) -> None:
        """Drop what requests with ids that start so have left."""
        for parked in [p for p in self._parked.values() if p.owner.startswith(prefix)]:
            self.drop(parked)

    def clear(self) -> None:
        self._parked.clear()

    def save(self, path: Path, *, weights: str) -> None:
        """Write all of it, atomically. ``weights`` says which weights computed it."""
        entries = list(self._parked.values())
        tensors = {}
        for i, parked in enumerate(entries):
            tensors[f"{i}/tokens"] = torch.from_numpy(parked.tokens)
            for layer, (keys, values) in enumerate(parked.states):
                tensors[f"{i}/{layer}/keys"], tensors[f"{i}/{layer}/values"] = keys.contiguous(), values.contiguous()
        partial = path.with_name(f"partial-{path.name}")
        metadata = {"weights": weights, "owners": json.dumps([parked.owner for parked in entries])}
        save_file(tensors, partial, metadata=metadata)
        partial.rename(path)

    def restore(self, path: Path, *, weights: str, device: torch.device) -> int:
        """Take in what was saved under the same weights; returns the number of sequences. Others are left out."""
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata()
            if metadata["weights"] != weights:
                return 0
            owners = json.loads(metadata["owners"])
            for parked in _parked_of(file, owners):
                self.park(parked)
        return len(owners)


def _parked_of(file: safe_open, owners: list[str]) -> Iterator[Parked]:
    layers = 1 + max((int(name.split("/")[1]) for name in file.keys() if name.endswith("keys")), default=-1)  # noqa: SIM118 - not a dict
    for i, owner in enumerate(owners):
        states = [(file.get_tensor(f"{i}/{n}/keys"), file.get_tensor(f"{i}/{n}/values")) for n in range(layers)]
        yield Parked(owner, file.get_tensor(f"{i}/tokens").cpu().numpy(), states)
