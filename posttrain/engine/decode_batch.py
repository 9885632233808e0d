"""The rows being decoded together, and the model that decodes them. Synchronous; one thread at a time.

Rows that are ready for their next token lie in front, rows whose states are still being computed behind them.

Shape letters: ``B`` rows that get a token, ``N`` tokens of a pass, ``V`` vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from posttrain.engine.attention import ROW_MULTIPLE, Layout, Stretch, use_engine_attention
from posttrain.engine.journal import Progress
from posttrain.engine.kv_cache import RowCache
from posttrain.engine.prefix_cache import Parked, PrefixCache, TokenArray, common, head_of
from posttrain.engine.sampler import draw, stream_key, uniforms
from posttrain.engine.stopping import StopRule
from posttrain.routing import Routers
from posttrain.types import FinishReason, Request, RouteArray

_NOWHERE = -1


@dataclass(slots=True, eq=False)
class Generation:
    """A request on its way to a completion. ``room`` is the number of tokens the completion may have."""

    progress: Progress
    room: int
    arrival: int = 0
    """Rows that finish in one step are handed back in this order."""
    key: np.uint64 = field(init=False)
    prompt: TokenArray = field(init=False)
    head: bytes = field(init=False)
    index: int = _NOWHERE
    """Its row in the batch."""
    filled: int = 0
    """How many of its states are computed."""
    source: Generation | None = None
    """The row it waits for, to copy ``shared`` states."""
    shared: int = 0

    def __post_init__(self) -> None:
        self.key = stream_key(self.request.seed, self.request.numbers)
        self.prompt = self.request.prompt_ids.astype(np.int64)
        self.head = head_of(self.prompt)

    @property
    def request(self) -> Request:
        return self.progress.request

    @property
    def length(self) -> int:
        """Tokens so far, prompt included."""
        return len(self.prompt) + len(self.progress.token_ids)

    @property
    def missing(self) -> int:
        """States to be computed before the next token can be drawn; its last token's is computed in drawing it."""
        return self.length - 1 - self.filled

    @property
    def complete(self) -> bool:
        """Whether it had finished before it came, and all its states are there."""
        return self.progress.finish is not None and not self.missing

    @property
    def last_token(self) -> int:
        return self.progress.token_ids[-1] if self.progress.token_ids else int(self.prompt[-1])

    def tokens(self) -> TokenArray:
        return np.concatenate([self.prompt, np.array(self.progress.token_ids, np.int64)])


@dataclass(slots=True)
class Counters:
    """What a batch has worked on since it was made, in tokens where nothing else is said."""

    prefill_tokens: int = 0
    """States computed ahead of decoding."""
    reused_tokens: int = 0
    """States copied from another row or a parked sequence instead."""
    recomputed_tokens: int = 0
    """States thrown away because the weights that computed them were replaced, or to make room."""
    decode_tokens: int = 0
    decode_steps: int = 0
    evictions: int = 0
    """Rows put back into the queue to make room."""


class DecodeBatch:
    """Decodes one token for every ready row per ``step``, and computes newcomers' states in the same pass.

    Rows come and go between steps. States that one row has are copied to others that begin with the same tokens. New
    weights leave no state of the old ones in use: rows in flight are computed again, so that a token's log-probability
    is that of a plain forward pass of the weights that drew it over the whole sequence.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stop: StopRule,
        max_tokens: int,
        max_parked_tokens: int,
        keep_routing: bool = False,
    ) -> None:
        self.version = 0
        self.counters = Counters()
        self.parked = PrefixCache(max_parked_tokens)
        self._model = model.eval().requires_grad_(False)
        use_engine_attention(self._model)
        self._stop = stop
        self._routers = Routers(model) if keep_routing else None
        self._cache = RowCache(
            routes_at=model.config.get_text_config().num_hidden_layers if self.keeps_routes else None
        )
        self._max_tokens = max_tokens
        # In bfloat16 nobody counts on the last bits, and padding would cost a lone row more.
        self._row_multiple = ROW_MULTIPLE if model.dtype is torch.float32 and model.device.type == "cpu" else 1
        self._decoding: list[Generation] = []
        self._filling: list[Generation] = []

    @property
    def keeps_routes(self) -> bool:
        """Whether completions say which experts their tokens went to."""
        return self._routers is not None and len(self._routers) > 0

    @property
    def rows(self) -> list[Generation]:
        return self._decoding + self._filling

    @property
    def decoding(self) -> bool:
        """Whether any row is ready for its next token."""
        return bool(self._decoding)

    def fits(self, newcomers: Sequence[Generation], candidate: Generation) -> bool:
        """Whether one more row can join these newcomers without the cache outgrowing its budget soon."""
        rows = [*self._decoding, *self._filling, *newcomers, candidate]
        return len(rows) == 1 or len(rows) * (1 + max(row.length for row in rows)) <= self._max_tokens

    def admit(self, generations: Sequence[Generation]) -> None:
        """Add rows in order."""
        if not generations:
            return
        by_head: dict[bytes, list[Generation]] = defaultdict(list)
        for row in self.rows:
            by_head[row.head].append(row)
        for index, generation in enumerate(generations, len(self.rows)):
            generation.index = index
            self._filling.append(generation)
            self._cache.reserve(index + 1, generation.length)
            self._share(generation, by_head[generation.head])
            by_head[generation.head].append(generation)
        self._take_shared()

    def step(self, budget: int) -> tuple[list[Generation], list[Generation]]:
        """One pass: the next token of every ready row, and up to ``budget`` states of the others, first come first
        served, each of which gets its next token when it lacks nothing more.

        Returns the rows that got a token, and those this finished, which have left.
        """
        parts = self._parts(budget)
        rows = self._decoding + [row for row, count in parts if count > row.missing]
        if not rows and not parts:
            return [], self._let_go([row for row in self._filling if row.complete])
        logits_BV = self._forward(parts)
        self.counters.prefill_tokens += sum(min(count, row.missing) for row, count in parts)
        for row, count in [*((row, 1) for row in self._decoding), *parts]:
            row.filled += count
        # Before drawing: a row whose first token is its last is not among those that came finished.
        complete = [row for row in self._filling if row.complete]
        finished = self._draw(rows, logits_BV) if rows else []
        return rows, self._let_go(finished + complete)

    def _let_go(self, finished: list[Generation]) -> list[Generation]:
        """Take out rows that have finished; returns them in the order of their arrival."""
        for row in finished:
            if self.keeps_routes:
                row.progress.routes = self._routes(row)
            if row.request.continued:
                self._park(row)
        self._take_shared()
        self.remove(lambda row: row in finished)
        return sorted(finished, key=lambda row: row.arrival)

    def evict(self) -> list[Generation]:
        """Take the latest rows out while the cache outgrows its budget; they have to be admitted again."""
        evicted: list[Generation] = []
        rows = sorted(self.rows, key=lambda row: row.arrival)
        while len(rows) > 1 and len(rows) * (1 + max(row.length for row in rows)) > self._max_tokens:
            evicted.append(rows.pop())
        if evicted:
            self.counters.evictions += len(evicted)
            self.counters.recomputed_tokens += sum(row.filled for row in evicted)
            self.remove(lambda row: row in evicted)
        return evicted

    def remove(self, leaves: Callable[[Generation], bool]) -> None:
        """Let rows go."""
        leavers = [row for row in self.rows if leaves(row)]
        if not leavers:
            return
        for row in leavers:
            row.index, row.source, row.filled = _NOWHERE, None, 0
        self._arrange(
            [row for row in self._decoding if row.index != _NOWHERE],
            [row for row in self._filling if row.index != _NOWHERE],
        )
        for row in self._filling:
            if row.source is not None and row.source.index == _NOWHERE:
                row.source = None

    def park_all(self) -> None:
        """Keep the states of all rows, whatever becomes of the rows."""
        for row in self.rows:
            self._park(row)

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Replace every parameter. Tied ones may come under any one of their names, in any dtype.

        Raises ``ValueError`` on unknown, missing or misshapen tensors, before anything is replaced.
        """
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        _check_weights(weights, parameters, f"weights of version {version}", type(self._model).__name__)
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)
        self.version = version
        self.parked.clear()
        rows = sorted(self.rows, key=lambda row: row.arrival)
        self.counters.recomputed_tokens += sum(row.filled for row in rows)
        self._decoding, self._filling = [], []
        for row in rows:
            row.filled, row.source, row.index = 0, None, _NOWHERE
        self.admit(rows)

    def fingerprint(self) -> str:
        """A hash of the weights: states are reused only under the weights that computed them."""
        digest = hashlib.blake2b(digest_size=16)
        for name, parameter in self._model.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def restore(self, path: Path) -> int:
        """Take parked sequences from a file if these weights computed them; returns how many."""
        return self.parked.restore(path, weights=self.fingerprint(), device=self._model.device)

    def _share(self, row: Generation, neighbours: Iterable[Generation]) -> None:
        """Find states that another row or a parked sequence has in common with a new one."""
        if row.length < 2:
            return
        wanted = row.tokens()[:-1]
        parked = self.parked.best(wanted)
        shared, source = 0, None
        for neighbour in neighbours:
            # What a neighbour will have before it draws its next token counts as well.
            found = common(neighbour.tokens()[:-1], wanted)
            if found > shared:
                shared, source = found, neighbour
        if parked is not None and parked[1] >= shared:
            entry, count = parked
            self._cache.load(row.index, entry.states, count)
            row.filled = count
            self.counters.reused_tokens += count
            if count == len(entry.tokens):
                # The conversation has moved on; it is parked again when its next turn is over.
                self.parked.drop(entry)
        elif source is not None:
            row.source, row.shared = source, shared

    def _take_shared(self) -> None:
        """Copy to waiting rows what their sources now have, then let those begin that lack nothing."""
        copies: dict[tuple[int, int], list[Generation]] = defaultdict(list)
        progressed = True
        while progressed:
            copies.clear()
            for row in self._filling:
                if row.source is not None and row.source.filled >= row.shared:
                    copies[row.source.index, row.shared].append(row)
            for (source, count), targets in copies.items():
                self._cache.copy_rows([source] * len(targets), [row.index for row in targets], count)
                for row in targets:
                    row.filled, row.source = count, None
                    self.counters.reused_tokens += count
            progressed = bool(copies)
        ready = [row for row in self._filling if not row.missing and row.progress.finish is None]
        if ready:
            self._arrange(self._decoding + ready, [row for row in self._filling if row not in ready])

    def _arrange(self, decoding: list[Generation], filling: list[Generation]) -> None:
        """Put the decoding rows in front of the filling ones, moving as few as possible."""
        placed: list[Generation | None] = [None] * (len(decoding) + len(filling))
        for rows, start in ((decoding, 0), (filling, len(decoding))):
            stop = start + len(rows)
            movers = []
            for row in rows:
                if start <= row.index < stop:
                    placed[row.index] = row
                else:
                    movers.append(row)
            gaps = (i for i in range(start, stop) if placed[i] is None)
            for index, row in zip(list(gaps), movers, strict=True):
                placed[index] = row
        moves = [(row, index) for index, row in enumerate(placed) if row is not None and row.index != index]
        if moves:
            longest = max(row.filled for row, _ in moves)
            self._cache.copy_rows([row.index for row, _ in moves], [index for _, index in moves], longest)
        for row, index in moves:
            row.index = index
        self._decoding = [row for row in placed[: len(decoding)] if row is not None]
        self._filling = sorted((row for row in placed[len(decoding) :] if row is not None), key=lambda r: r.arrival)

    def _park(self, row: Generation) -> None:
        if row.filled:
            tokens = row.tokens()[: row.filled]
            self.parked.park(Parked(row.request.id, tokens, self._cache.read(row.index, row.filled)))

    def _parts(self, budget: int) -> list[tuple[Generation, int]]:
        """How many tokens of which rows to compute beside decoding: those that lack states, and the last one as well,
        whose logits are those of the next.
        """
        parts = []
        for row in self._filling:
            count = min(row.missing + (row.progress.finish is None), budget)
            if count and row.source is None:
                parts.append((row, count))
                budget -= count
        return parts

    def _draw(self, rows: Sequence[Generation], logits_BV: torch.Tensor) -> list[Generation]:
        """Add a token to each row; returns those that it finished."""
        positions_B = np.fromiter((row.length for row in rows), np.int64, len(rows))
        keys_B = np.fromiter((row.key for row in rows), np.uint64, len(rows))
        draws = draw(logits_BV, [row.request.sampling for row in rows], uniforms(keys_B, positions_B))
        tokens, logprobs = draws.tokens_B.tolist(), draws.logprobs_B.tolist()
        for row, token, logprob, kept in zip(rows, tokens, logprobs, draws.kept_B, strict=True):
            progress = row.progress
            progress.token_ids.append(token)
            progress.logprobs.append(logprob)
            progress.versions.append(self.version)
            progress.kept.append(kept)
            progress.finish = self._stop.finish(row.request.sampling, progress.token_ids)
            if progress.finish is None and len(progress.token_ids) >= row.room:
                progress.finish = FinishReason.LENGTH
        self.counters.decode_steps += 1
        self.counters.decode_tokens += len(rows)
        return [row for row in rows if row.progress.finish is not None]

    def _forward(self, parts: Sequence[tuple[Generation, int]]) -> torch.Tensor:
        """Logits of the next token of every decoding row, then of every row that is complete with its part, [B, V]."""
        device = self._model.device
        count = len(self._decoding)
        stretches = [Stretch(row.index, row.filled, size) for row, size in parts]
        tokens = [np.fromiter((row.last_token for row in self._decoding), np.int64, count)]
        positions = [np.fromiter((row.length - 1 for row in self._decoding), np.int64, count)]
        indices = [np.arange(count)]
        ends, end = [*range(count)], count
        for (row, _), stretch in zip(parts, stretches, strict=True):
            tokens.append(row.tokens()[stretch.past : stretch.stop])
            positions.append(np.arange(stretch.past, stretch.stop))
            indices.append(np.full(stretch.count, stretch.row))
            end += stretch.count
            if stretch.stop == row.length:
                ends.append(end - 1)
        padded = self._padded(end)
        inputs_3N = np.stack([np.concatenate(parts)[padded] for parts in (tokens, positions, indices)])
        tokens_N, positions_N, rows_N = torch.from_numpy(inputs_3N).to(device)
        self._cache.reserve(len(self._decoding) + len(self._filling), int(inputs_3N[1].max()) + 1)
        self._cache.begin(rows_N, positions_N)
        inputs = {
            "input_ids": tokens_N[None],
            "position_ids": positions_N[None],
            "past_key_values": self._cache,
            "use_cache": True,
            "layout": Layout(count, stretches, rows_N, positions_N),
        }
        if not ends:
            # Without rows that draw, the output head has nothing to do.
            self._model.base_model(**inputs)
            logits_BV = torch.empty(0)
        else:
            kept = torch.tensor(ends, device=device)[self._padded(len(ends))]
            logits_BV = self._model(**inputs, logits_to_keep=kept).logits[0, : len(ends)]
        if self._routers is not None and self.keeps_routes:
            self._cache.note_routes(self._routers.chosen())
        return logits_BV

    def _routes(self, row: Generation) -> RouteArray:
        """Of all tokens of a row whose states are there, [S, layers, experts per token]."""
        assert self._routers is not None
        routes = self._cache.routes(row.index, row.filled)
        return routes.view(row.filled, len(self._routers), -1).cpu().numpy().copy()

    def _padded(self, count: int) -> TokenArray:
        """Indices of ``count`` things with the last one repeated: see ``attention`` on batch invariance."""
        return np.minimum(np.arange(count + -count % self._row_multiple), count - 1)


def _check_weights(
    weights: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.nn.Parameter], what: str, model: str
) -> None:
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
                f"{what}: {len(names)} {problem} tensors, first {names[0]}; expected the parameters of {model}; merge "
                "adapters before exporting"
            )
