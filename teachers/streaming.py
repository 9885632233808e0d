"""A teacher that is larger than the memory for it: one pass over its weights for all samples, layer by layer.

The model's own code runs, without weights, with every decoder layer in a slot. To take a batch through layer i, the
whole body is called and only slot i computes: it has the batch's states put in and its layer's weights lent. So masks,
positions and whatever else a layer is given are the model's own. Layers come in the outer loop, batches in the inner
one, and the next layer is read while one computes.

In memory at a time: the weights of two layers (one, where the limit leaves no room for more), those outside of the
layers, the embeddings of one batch, and the states of all samples, which go to a temporary file beyond the limit.

Not covered: models whose layers hand each other more than a hidden state. At the start the states of a few tokens are
compared with those of the plain order, layer after layer in one call, and such a model is refused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from posttrain.errors import RecipeError
from posttrain.types import IntArray
from teachers.batching import length_batches, padded
from teachers.logits import LogitTransform, body_of, check_logits
from teachers.weights import Skeleton, Unreadable, drop_weights

PROBE = (3, 1, 4, 1, 5, 9)
MAX_DEVIATION = 1e-3
"""Of the largest element: how far the states of the two orders may lie apart, which are the same operations."""

Visit = Callable[[int, nn.Module, torch.Tensor, tuple[Any, ...], dict[str, Any]], Any]


class StreamedTeacher:
    """A causal language model that gives hidden states within ``memory_bytes`` of weights. Inference only.

    ``skeleton`` may carry LoRA adapters, which stay in memory. ``RecipeError`` when a layer or the output head alone
    is larger than the limit, or when the model cannot be run so.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        *,
        dtype: torch.dtype,
        device: str,
        memory_bytes: int,
        name: str,
    ) -> None:
        self._skeleton, self._dtype, self._device, self._name = skeleton, dtype, device, name
        self._model = skeleton.model
        self._transform = LogitTransform.of(self._model.config)
        try:
            self._take_apart()
        except Unreadable as error:
            raise self._refused(str(error)) from error
        self._fit(memory_bytes)
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="layer-read")
        self._check()

    @property
    def head(self) -> torch.Tensor:
        """Output projection, [V, E], read anew."""
        return self._skeleton.weights.read(self._head_source, self._dtype).to(self._device)

    @property
    def logit_cap(self) -> float | None:
        return self._transform.cap

    @property
    def num_bytes(self) -> int:
        """Weights in memory during a pass, at most."""
        return self._rest_bytes + self._layer_bytes * (2 if self._ahead else 1)

    def hidden_states(self, sequences: Sequence[IntArray]) -> list[torch.Tensor]:
        """The states that enter the head, one [T, E] tensor per sequence."""
        states = [torch.empty(0)] * len(sequences)
        for index, states_TE in self.each_state(sequences):
            states[index] = states_TE
        return states

    @torch.no_grad()
    def each_state(self, sequences: Sequence[IntArray]) -> Iterator[tuple[int, torch.Tensor]]:
        """Index and states [T, E] of each sequence, longest first, after one pass over the weights."""
        lengths = [len(sequence) for sequence in sequences]
        batches = list(length_batches(lengths, self._device))
        ids = [padded([sequences[index] for index in batch]) for batch in batches]
        with closing(_Activations(self._spare_bytes, self._device)) as kept:
            for place, ids_BT in enumerate(ids):
                kept.put(place, self._embed(ids_BT))
            for layer, weights in self._layers():
                for place, ids_BT in enumerate(ids):
                    kept.put(place, self._through(layer, weights, ids_BT, kept.take(place)))
                del weights  # or this layer would lie beside the two that are in memory when the next read begins
            for place, (batch, ids_BT) in enumerate(zip(batches, ids, strict=True)):
                states_BTE = self._transform.scaled(self._finish(ids_BT, kept.take(place)))
                for row, index in enumerate(batch):
                    yield index, states_BTE[row, : lengths[index]].clone()

    def close(self) -> None:
        """Free the weights."""
        self._reader.shutdown()
        if self._model is not None:
            drop_weights(self._model)
            self._model = None

    def _take_apart(self) -> None:
        """Put the layers into slots, the embedding behind a look-up by row, and read all that is neither."""
        model, body = self._model, body_of(self._model)
        count = model.config.get_text_config().num_hidden_layers
        lists = [
            name for name, module in body.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
        ]
        if not lists:
            raise Unreadable(f"it has no list of {count} layers")
        prefix = f"{model.base_model_prefix}.{lists[0]}."
        self._sources = [self._skeleton.sources(f"{prefix}{index}.") for index in range(count)]
        modules = {id(module): name for name, module in model.named_modules()}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        apart = {f"{modules[id(module)]}.weight" for module in (embedding, head) if module is not None}
        others = {
            name: stored
            for name, stored in self._skeleton.sources().items()
            if not name.startswith(prefix) and name not in apart
        }
        if head is None or getattr(head, "bias", None) is not None:
            raise Unreadable("it has no output head without bias")
        self._head_source = self._skeleton.sources(f"{modules[id(head)]}.")["weight"]
        self._embedding_source = self._skeleton.sources(f"{modules[id(embedding)]}.")["weight"]
        self._rest_bytes = 0
        for name, stored in others.items():
            self._rest_bytes += self._set(name, self._skeleton.weights.read(stored, self._dtype).to(self._device))
        self._route = _Route()
        layers = body.get_submodule(lists[0])
        for index, layer in enumerate(layers):
            layers[index] = _Slot(layer, index, self._route)
        model.set_input_embeddings(_EmbeddingSlot(embedding, self._route))
        if torch.device(self._device).type != "cpu":
            _move_real(model, self._device)

    def _set(self, name: str, tensor: torch.Tensor) -> int:
        owner, _, last = name.rpartition(".")
        module = self._model.get_submodule(owner)
        if last in module._buffers:
            module._buffers[last] = tensor.to(module._buffers[last].dtype)
        else:
            module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
        return tensor.nbytes

    def _fit(self, memory_bytes: int) -> None:
        size = self._dtype.itemsize
        weights = self._skeleton.weights
        self._layer_bytes = max(
            sum(weights.num_bytes(stored, size) for stored in sources.values()) for sources in self._sources
        )
        parts = {
            "its output head": weights.num_bytes(self._head_source, size),
            "one of its layers, beside what lies outside of the layers,": self._rest_bytes + self._layer_bytes,
        }
        for part, needed in parts.items():
            if needed > memory_bytes:
                raise RecipeError(
                    f"teacher {self._name!r}: {part} has {needed / 2**20:,.1f} MiB of weights, and memory_mb allows "
                    f"{memory_bytes / 2**20:,.1f}; expected room for it, since layers and heads are not divided; raise "
                    "memory_mb"
                )
        self._ahead = self._rest_bytes + 2 * self._layer_bytes <= memory_bytes
        self._spare_bytes = memory_bytes - self.num_bytes

    def _layers(self) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Each layer's number and weights, in order, the next read meanwhile if there is room."""
        upcoming = None
        for index in range(len(self._sources)):
            weights = upcoming.result() if upcoming is not None else self._read(index)
            more = self._ahead and index + 1 < len(self._sources)
            upcoming = self._reader.submit(self._read, index + 1) if more else None
            yield index, weights
            del weights

    def _read(self, layer: int) -> dict[str, torch.Tensor]:
        read = self._skeleton.weights.read
        return {name: read(stored, self._dtype).to(self._device) for name, stored in self._sources[layer].items()}

    def _embedding(self, ids_BT: torch.Tensor) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
        """The embedding's part, with no more of its weights than these ids need."""
        unique, compact_BT = ids_BT.unique(return_inverse=True)
        rows = self._skeleton.weights.read_rows(self._embedding_source, unique.tolist(), self._dtype).to(self._device)
        return lambda embedding, ids: functional_call(embedding, {"weight": rows}, (compact_BT.to(self._device),))

    def _embed(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """What the first layer is given."""
        entered: list[torch.Tensor] = []

        def visit(index: int, layer: nn.Module, hidden: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
            if index == 0:
                entered.append(hidden)
            return hidden

        self._call(ids_BT, visit, self._embedding(ids_BT))
        return entered[0]

    def _through(
        self, number: int, weights: dict[str, torch.Tensor], ids_BT: torch.Tensor, given: torch.Tensor
    ) -> torch.Tensor:
        """The states after layer ``number``."""
        left: list[torch.Tensor] = []

        def visit(index: int, layer: nn.Module, hidden: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
            if index == number:
                left.append(_first(functional_call(layer, weights, (given, *args), kwargs)))
            return hidden

        self._call(ids_BT, visit)
        return left[0]

    def _finish(self, ids_BT: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """What the model makes of the last layer's states."""
        return self._call(ids_BT, lambda index, layer, hidden, args, kwargs: given)

    def _call(self, ids_BT: torch.Tensor, visit: Visit, embed: Any = None) -> torch.Tensor:
        """The body's own forward, with the slots' part in it played by ``visit``."""
        width = self._model.get_output_embeddings().weight.shape[1]
        nothing = torch.zeros((), dtype=self._dtype, device=self._device).expand(*ids_BT.shape, width)
        self._route.visit, self._route.embed = visit, embed or (lambda embedding, ids: nothing)
        try:
            return body_of(self._model)(input_ids=ids_BT.to(self._device), use_cache=False).last_hidden_state
        finally:
            self._route.visit = self._route.embed = None

    @torch.no_grad()
    def _check(self) -> None:
        """Compare the two orders, and the logits with states times head."""
        probe = np.array(PROBE, np.int32) % self._model.config.get_text_config().vocab_size
        try:
            expected, states = self._plain(probe), self.hidden_states([probe])[0]
        except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            raise self._refused(f"{type(error).__name__}: {error}") from error
        worst = (expected.float() - states.float()).abs().max().item()
        bound = MAX_DEVIATION * expected.abs().max().item()
        if not worst <= bound:
            raise self._refused(
                f"its states differ by {worst:.3g} from those of one call, where {bound:.3g} is rounding"
            )
        module = self._model.get_output_embeddings()
        without = module.weight
        module.weight = nn.Parameter(self.head, requires_grad=False)
        try:
            check_logits(self._model, self._transform, name=self._name)
        finally:
            module.weight = without

    def _plain(self, ids: IntArray) -> torch.Tensor:
        """The states of one sequence in one call, each layer's weights read as its turn comes."""
        ids_BT = padded([ids])
        layers = self._layers()

        def visit(index: int, layer: nn.Module, hidden: torch.Tensor, args: Any, kwargs: Any) -> Any:
            number, weights = next(layers)
            assert number == index
            output = functional_call(layer, weights, (hidden, *args), kwargs)
            self._route.wrap = isinstance(output, tuple)
            return _first(output)

        return self._transform.scaled(self._call(ids_BT, visit, self._embedding(ids_BT)))[0]

    def _refused(self, why: str) -> RecipeError:
        return RecipeError(
            f"teacher {self._name!r} ({type(self._model).__name__}) is larger than memory_mb and cannot be run layer "
            f"by layer: {why}; expected a plain decoder in safetensors files; raise memory_mb or choose another teacher"
        )


class _Route:
    """Who plays the part of the layers and of the embedding at the moment."""

    visit: Visit | None = None
    embed: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None
    wrap = False
    """Whether layers return tuples."""


class _Slot(nn.Module):
    """Stands in a layer's place, and has its attributes."""

    def __init__(self, layer: nn.Module, index: int, route: _Route) -> None:
        super().__init__()
        self.layer = layer
        self._index, self._route = index, route

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self._route.visit is not None
        output = self._route.visit(self._index, self.layer, hidden, args, kwargs)
        return (output,) if self._route.wrap else output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class _EmbeddingSlot(nn.Module):
    def __init__(self, embedding: nn.Module, route: _Route) -> None:
        super().__init__()
        self.embedding = embedding
        self._route = route

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        assert self._route.embed is not None
        return self._route.embed(self.embedding, ids)


class _Activations:
    """Tensors by number, on a file once they are more than ``limit`` bytes together."""

    def __init__(self, limit: int, device: str) -> None:
        self._limit, self._device = limit, device
        self._here: dict[int, torch.Tensor] = {}
        self._away: dict[int, tuple[int, torch.Tensor]] = {}
        """Where in the file, and a tensor without content that tells shape and type."""
        self._held = 0
        self._file: Any = None
        self._end = 0

    def put(self, number: int, tensor: torch.Tensor) -> None:
        if self._held + tensor.nbytes <= self._limit:
            self._here[number] = tensor
            self._held += tensor.nbytes
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        if number not in self._away:
            self._away[number] = self._end, tensor.to("meta")
            self._end += tensor.nbytes
        self._file.seek(self._away[number][0])
        self._file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    def take(self, number: int) -> torch.Tensor:
        """The tensor, which is not held in memory any more."""
        if number in self._here:
            tensor = self._here.pop(number)
            self._held -= tensor.nbytes
            return tensor
        offset, like = self._away[number]
        tensor = torch.empty(like.shape, dtype=like.dtype)
        self._file.seek(offset)
        self._file.readinto(tensor.view(-1).view(torch.uint8).numpy().data)
        return tensor.to(self._device)

    def close(self) -> None:
        self._here.clear()
        if self._file is not None:
            self._file.close()


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _move_real(model: Any, device: str) -> None:
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.device.type != "meta":
                    moved = tensor.to(device)
                    tensors[name] = nn.Parameter(moved, requires_grad=False) if tensors is module._parameters else moved
