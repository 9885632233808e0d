"""The rows being decoded together, and the model that decodes them. Synchronous; one thread at a time.

Shape letters: ``B`` live rows, ``L`` length of the longest live row, ``P`` length of the longest new prompt,
``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from posttrain.engine.attention import use_decode_attention
from posttrain.engine.kv_cache import RowCache
from posttrain.engine.sampler import draw, stream_key, uniforms
from posttrain.types import Completion, FinishReason, Request

_PREFILL_TOKENS = 8192
"""Padded prompt tokens per prefill pass; bounds its memory."""


@dataclass(slots=True, eq=False)
class Generation:
    """A request on its way to a completion. ``room`` is the number of tokens it may still have."""

    request: Request
    room: int
    key: np.uint64 = field(init=False)
    prompt: bytes = field(init=False)
    """Identifies equal prompts."""
    prompt_version: int = -1
    """Version of the weights that computed the prompt's states."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish: FinishReason | None = None

    def __post_init__(self) -> None:
        self.key = stream_key(self.request.seed, self.request.id)
        self.prompt = self.request.prompt_ids.astype(np.int32).tobytes()

    @property
    def length(self) -> int:
        """Tokens so far, prompt included."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    @property
    def last_token(self) -> int:
        return self.token_ids[-1] if self.token_ids else int(self.request.prompt_ids[-1])

    def completion(self) -> Completion:
        assert self.finish is not None
        return Completion(
            request_id=self.request.id,
            token_ids=np.array(self.token_ids, np.int32),
            logprobs=np.array(self.logprobs, np.float32),
            versions=np.array(self.versions, np.int32),
            finish=self.finish,
        )


class DecodeBatch:
    """Decodes one token for every live row per ``step``; rows come and go between steps.

    A prompt's last token goes through the first decode step rather than through prefill, so every token is sampled
    in one place and prefill never touches the output head. States that older weights computed stay in use after
    a weight update, as in any engine that updates in flight; the version of each token says which weights drew it.
    """

    def __init__(self, model: PreTrainedModel, *, stop_ids: Sequence[int], max_length: int, version: int) -> None:
        self.version = version
        self.rows: list[Generation] = []
        self._model = model.eval().requires_grad_(False)
        use_decode_attention(self._model)
        self._stop_ids = frozenset(stop_ids)
        self._cache = RowCache(max_length=max_length)
        self._max_length = max_length

    def admit(self, generations: Sequence[Generation]) -> None:
        """Add rows in order. Equal prompts are computed once, and not at all if a live row has their states."""
        first = len(self.rows)
        sources: dict[bytes, int] = {
            row.prompt: i for i, row in enumerate(self.rows) if row.prompt_version == self.version
        }
        self.rows += generations
        fresh: list[int] = []
        copies: dict[int, list[int]] = {}
        for i, generation in enumerate(generations, first):
            generation.prompt_version = self.version
            source = sources.setdefault(generation.prompt, i)
            if len(generation.request.prompt_ids) == 1:
                continue
            if source == i:
                fresh.append(i)
            else:
                copies.setdefault(source, []).append(i)
        if not generations:
            return
        self._cache.reserve(len(self.rows), max(row.length for row in self.rows))
        self._prefill(fresh)
        for source, targets in copies.items():
            states = len(self.rows[source].request.prompt_ids) - 1
            self._cache.copy_rows([source] * len(targets), targets, states)

    def step(self) -> list[Generation]:
        """Give every row its next token; return the rows this finished, in row order, which have left the batch."""
        logits_BV = self._forward()
        positions_B = np.fromiter((row.length for row in self.rows), np.int64, len(self.rows))
        keys_B = np.fromiter((row.key for row in self.rows), np.uint64, len(self.rows))
        draws = draw(logits_BV, [row.request.sampling for row in self.rows], uniforms(keys_B, positions_B))
        tokens, logprobs = draws.tokens_B.tolist(), draws.logprobs_B.tolist()
        for row, token, logprob in zip(self.rows, tokens, logprobs, strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            row.versions.append(self.version)
            if token in self._stop_ids:
                row.finish = FinishReason.STOP
            elif len(row.token_ids) == row.room:
                row.finish = FinishReason.LENGTH
        finished = [row for row in self.rows if row.finish is not None]
        self.remove(lambda row: row.finish is not None)
        return finished

    def remove(self, leaves: Callable[[Generation], bool]) -> None:
        """Let rows go; the last rows take their places."""
        staying = [i for i, row in enumerate(self.rows) if not leaves(row)]
        count = len(staying)
        if count == len(self.rows):
            return
        movers = [i for i in staying if i >= count]
        holes = sorted(set(range(count)) - set(staying))
        if movers:
            self._cache.copy_rows(movers, holes, max(self.rows[i].length for i in movers))
        for mover, hole in zip(movers, holes, strict=True):
            self.rows[hole] = self.rows[mover]
        del self.rows[count:]

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Replace every parameter. Tied ones may come under any one of their names, in any dtype.

        Raises ``ValueError`` on unknown, missing or misshapen tensors, before anything is replaced.
        """
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        unknown = sorted(set(weights) - set(parameters))
        covered = {id(parameters[name]) for name in weights if name in parameters}
        missing = sorted(name for name, parameter in parameters.items() if id(parameter) not in covered)
        misshapen = [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(parameters[name].shape)}"
            for name in weights
            if name in parameters and weights[name].shape != parameters[name].shape
        ]
        for problem, names in (("unknown", unknown), ("missing", missing), ("misshapen", misshapen)):
            if names:
                raise ValueError(
                    f"weights of version {version}: {len(names)} {problem} tensors, first {names[0]}; expected the "
                    f"parameters of {type(self._model).__name__}; merge adapters before exporting"
                )
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)
        self.version = version

    def _forward(self) -> torch.Tensor:
        device = self._model.device
        count = len(self.rows)
        inputs = np.array([(row.last_token, row.length - 1) for row in self.rows], np.int64)
        longest = int(inputs[:, 1].max()) + 1
        inputs_B2 = torch.from_numpy(inputs).to(device)
        lengths_B = inputs_B2[:, 1]
        self._cache.begin_step(lengths_B, longest)
        seen_BL = torch.arange(longest, device=device) <= lengths_B[:, None]
        # Additive and in the model's dtype: attention would convert a boolean mask again in every layer.
        mask_BL = torch.zeros(count, longest, dtype=self._model.dtype, device=device)
        mask_BL.masked_fill_(~seen_BL, torch.finfo(self._model.dtype).min)
        output = self._model(
            input_ids=inputs_B2[:, :1],
            position_ids=inputs_B2[:, 1:],
            attention_mask=mask_BL[:, None, None, :],
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.logits[:, -1]

    def _prefill(self, rows: Sequence[int]) -> None:
        """Compute the states of each row's prompt but its last token."""
        by_length = sorted(rows, key=lambda i: len(self.rows[i].request.prompt_ids))
        while by_length:
            # Longest first: it sets the padded width, hence how many rows fit.
            width = len(self.rows[by_length[-1]].request.prompt_ids) - 1
            count = max(1, _PREFILL_TOKENS // width)
            part, by_length = by_length[-count:], by_length[:-count]
            prompts = np.zeros((len(part), width), np.int64)
            for i, row in enumerate(part):
                ids = self.rows[row].request.prompt_ids[:-1]
                prompts[i, : len(ids)] = ids
            # Padding is on the right, where the causal mask keeps it out of sight of every real token.
            output = self._model.base_model(input_ids=torch.from_numpy(prompts).to(self._model.device), use_cache=True)
            states = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
            for i, row in enumerate(part):
                self._cache.store(row, states, i, len(self.rows[row].request.prompt_ids) - 1)
