"""vLLM as an engine, for GPUs: its asynchronous engine behind ``StreamedEngine``. The only module that imports vLLM.

Written against vLLM 0.33; ``scripts/check-vllm`` checks every name used here against a release's sources.

What a token is drawn from is what its log-probability says: vLLM reports the logits after temperature and truncation
(``logprobs_mode="processed_logprobs"``), and a greedy request is sent as top-k of one, whose log-probability is 0.
vLLM truncates by min-p before top-k and top-p.

New weights: generation pauses with the requests kept (``pause_generation(mode="keep")``), all states and the prefix
cache are dropped, the workers read the weights from a file in shared memory (``reload_weights``), and the requests are
prefilled again under the new weights as they resume. So no token is drawn from states of older weights. One engine is
one node.

It has not run: neither on a GPU nor on vLLM's CPU build. What has been done is to read vLLM 0.33.0's sources for every
call made here, and to run ``StreamedEngine`` over another source.

What differs from the embedded engine:

- Random numbers are vLLM's. With its second model runner (the default on a GPU) they depend on seed and position alone,
  as ours do, so a resumed request draws the same numbers; rounding may still differ. With the first one a seed starts a
  sequence, so the seed then also depends on where a request resumes, and a resumed request draws other numbers.
- Kept tokens come only from an engine started with ``kept_tokens=True``, and vLLM then wants top-k in every request.
- Temperatures between 0 and 0.01 and above 2 are refused, since vLLM raises the former silently.
- Stop strings are looked for here, in the text of all generated tokens, and not by vLLM, which would miss one that a
  resumption cuts in two. A step that was under way when one is found is thrown away.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.engine.sampler import stream_key
from posttrain.engine.stopping import Decode
from posttrain.engine.streamed_engine import StreamedEngine
from posttrain.engine.token_source import Delta
from posttrain.errors import RecipeError
from posttrain.models import context_window, resolve_path
from posttrain.types import FinishReason, IntArray, Request, Sampling

if TYPE_CHECKING:
    import torch

    from posttrain.engine.journal import Journal

_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
_TEMPERATURES = (0.01, 2.0)
"""What vLLM takes as it is, besides 0."""
_SHARED_MEMORY = Path("/dev/shm")


class VllmEngine(StreamedEngine):
    """Implements ``posttrain.protocols.Engine`` with vLLM; see the module for what differs from the embedded engine.

    ``model_path`` is as in a recipe; it gives architecture and first weights. ``stop_ids`` end a completion.
    ``max_length`` is the window, None takes the model's own. ``kept_tokens`` makes truncated sampling say what it
    chose from; then every sampling needs ``top_k``, or is greedy. The GPUs are those of ``CUDA_VISIBLE_DEVICES``, as
    many as ``tensor_parallel_size``. ``options`` go to vLLM's ``AsyncEngineArgs``.

    Raises ``RecipeError`` when vLLM is not installed or the model has no safetensors checkpoint.
    """

    def __init__(  # noqa: PLR0913 - all but the first are keyword-only, with defaults
        self,
        model_path: str,
        *,
        stop_ids: Sequence[int],
        dtype: str = "bfloat16",
        max_batch_size: int = 256,
        max_length: int | None = None,
        version: int = 0,
        decode: Decode | None = None,
        journal: Journal | None = None,
        kept_tokens: bool = False,
        tensor_parallel_size: int = 1,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        folder = _checkpoint_folder(model_path)
        window = context_window(model_path)
        settings = {
            **(options or {}),
            "model": str(folder),
            "dtype": dtype,
            "max_num_seqs": max_batch_size,
            "max_model_len": min(max_length or window, window),
            "return_sampling_mask": kept_tokens,
            "tensor_parallel_size": tensor_parallel_size,
            # Named, since inside a Ray actor vLLM would start actors of its own.
            "distributed_executor_backend": "uni" if tensor_parallel_size == 1 else "mp",
            "load_format": "safetensors",
            "logprobs_mode": "processed_logprobs",
            # The model's own defaults for sampling and ending are the recipe's business.
            "generation_config": "vllm",
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
        }
        source = _opener(settings, stop_ids=stop_ids, shapes=_shapes(folder), version=version)
        super().__init__(source, decode=decode, journal=journal, version=version)


def _opener(
    settings: Mapping[str, Any], *, stop_ids: Sequence[int], shapes: Shapes, version: int
) -> Callable[[], Awaitable[VllmSource]]:
    async def open_source() -> VllmSource:
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise RecipeError(
                f"the vLLM engine needs vLLM, and importing it failed with {error}; pip install 'posttrain[vllm]'"
            ) from error
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))
        await llm.update_weight_version(str(version))
        return VllmSource(llm, stop_ids=stop_ids, shapes=shapes)

    return open_source


Shapes = Mapping[str, tuple[int, ...]]


class VllmSource:
    """Implements ``posttrain.engine.token_source.TokenSource`` over an ``AsyncLLM`` of the same event loop.

    ``shapes`` are those of the checkpoint, to which new weights are compared.
    """

    def __init__(self, llm: Any, *, stop_ids: Sequence[int], shapes: Shapes) -> None:
        self._llm = llm
        self._stop_ids = list(stop_ids)
        self._names = itertools.count()
        self._shapes = shapes
        config = llm.vllm_config.model_config
        self._kept_tokens = bool(config.return_sampling_mask)
        self._keyed = bool(llm.vllm_config.use_v2_model_runner)
        self.vocabulary = int(config.get_vocab_size())
        self.max_length = int(config.max_model_len)

    def check(self, request: Request) -> None:
        """See ``TokenSource.check``."""
        sampling = request.sampling
        low, high = _TEMPERATURES
        if sampling.temperature > high or 0 < sampling.temperature < low:
            raise ValueError(
                f"request {request.id!r}: Sampling.temperature = {sampling.temperature}; vLLM takes 0 (greedy) or "
                f"{low} to {high}"
            )
        if sampling.truncates and not self._kept_tokens:
            raise ValueError(
                f"request {request.id!r}: {_truncation(sampling)} truncates, but this vLLM engine does not say what "
                "was kept, which the learner needs; start it with kept_tokens=True, or sample without truncation"
            )
        if self._kept_tokens and sampling.temperature > 0 and not sampling.top_k:
            raise ValueError(
                f"request {request.id!r}: Sampling.top_k = 0; a vLLM engine that says what was kept needs a bound on "
                "how much that is; set top_k (1000 changes little), or start it with kept_tokens=False"
            )

    async def stream(self, request: Request, so_far: Sequence[int], room: int) -> AsyncGenerator[Delta]:
        """See ``TokenSource.stream``."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input

        prompt = tokens_input([*request.prompt_ids.tolist(), *so_far])
        params = self._params(request, position=len(so_far), room=room)
        try:
            # A name of its own: vLLM may not have forgotten one that was given up a moment ago and is asked again.
            async with aclosing(self._llm.generate(prompt, params, f"{request.id}#{next(self._names)}")) as outputs:
                async for output in outputs:
                    yield self._delta(request, output)
        except VLLMClientError as error:
            raise ValueError(f"request {request.id!r}: vLLM refused it: {error}") from error

    def stage(self, weights: Mapping[str, torch.Tensor], version: int) -> Path:
        """See ``TokenSource.stage``. The folder is a checkpoint without its config."""
        from safetensors.torch import save_file

        _check_weights(weights, self._shapes, version)
        folder = Path(tempfile.mkdtemp(prefix=f"posttrain-weights-{version}-", dir=_roomy_folder(weights)))
        try:
            save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
        except BaseException:
            shutil.rmtree(folder)
            raise
        return folder

    async def pause(self) -> None:
        """See ``TokenSource.pause``. The states of all requests and the prefix cache are gone."""
        await self._llm.pause_generation(mode="keep", clear_cache=True)

    async def load(self, staged: Path, version: int) -> None:
        """See ``TokenSource.load``.

        vLLM sends the last tokens before it answers the pause, and hands them on in a few turns of the event loop; the
        two calls here take many more. Should that ever fail, the versions that end a stream differ from those recorded.
        """
        try:
            await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(staged)})
        finally:
            shutil.rmtree(staged)
        await self._llm.update_weight_version(str(version))

    async def resume(self) -> None:
        """See ``TokenSource.resume``."""
        await self._llm.resume_generation()

    def close(self) -> None:
        """See ``TokenSource.close``."""
        self._llm.shutdown()

    def _params(self, request: Request, *, position: int, room: int) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        sampling = request.sampling
        greedy = sampling.temperature == 0
        key = stream_key(request.seed, request.numbers if self._keyed else f"{request.numbers}@{position}")
        return SamplingParams(
            temperature=1.0 if greedy else sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            top_k=1 if greedy else sampling.top_k,
            min_p=0.0 if greedy else sampling.min_p,
            # Of 63 bits: vLLM keeps it in an int64, and takes -1 for none.
            seed=int(key) >> 1,
            stop_token_ids=[*self._stop_ids, *sampling.stop_token_ids],
            ignore_eos=True,
            max_tokens=room,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def _delta(self, request: Request, output: Any) -> Delta:
        (completion,) = output.outputs
        token_ids = list(completion.token_ids)
        # Flat, with one entry a position: that of the sampled token.
        logprobs = list(completion.logprobs.logprobs) if token_ids else []
        kept: list[IntArray | None] = [None] * len(token_ids)
        if self._kept_tokens and request.sampling.truncates and token_ids:
            kept = [np.array(ids, np.int32) for ids in completion.sampling_mask.token_ids]
        if not len(token_ids) == len(logprobs) == len(kept):
            raise RuntimeError(
                f"request {request.id!r}: vLLM sent {len(token_ids)} tokens, {len(logprobs)} log-probabilities and "
                f"{len(kept)} sets of kept tokens; expected as many of each"
            )
        reason = completion.finish_reason
        if reason is not None and reason not in _FINISH:
            raise RuntimeError(f"request {request.id!r}: vLLM ended it with {reason!r}; expected {sorted(_FINISH)}")
        return Delta(
            token_ids=token_ids,
            logprobs=logprobs,
            kept=kept,
            finish=_FINISH[reason] if reason is not None else None,
            versions=_versions(completion.weight_versions),
        )


def _versions(spans: Sequence[Any] | None) -> list[int] | None:
    """One version a token, of vLLM's spans over a finished stream."""
    if spans is None:
        return None
    return [int(span.version) for span in spans for _ in range(span.start, span.end)]


def _truncation(sampling: Sampling) -> str:
    fields = {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p}
    defaults = Sampling()
    return ", ".join(f"Sampling.{name} = {value}" for name, value in fields.items() if value != getattr(defaults, name))


def _check_weights(weights: Mapping[str, torch.Tensor], shapes: Shapes, version: int) -> None:
    """vLLM only warns of what is missing and would serve whatever lay in that memory."""
    problems = {
        "unknown": sorted(set(weights) - set(shapes)),
        "missing": sorted(set(shapes) - set(weights)),
        "misshapen": [
            f"{name} {tuple(weights[name].shape)} instead of {shapes[name]}"
            for name in weights
            if name in shapes and tuple(weights[name].shape) != shapes[name]
        ],
    }
    for problem, names in problems.items():
        if names:
            raise ValueError(
                f"weights of version {version}: {len(names)} {problem} tensors, first {names[0]}; expected those of "
                "the checkpoint the engine started from, under their names there; merge adapters before exporting"
            )


def _checkpoint_folder(model_path: str) -> Path:
    """The local folder of a checkpoint; one on the hub is fetched once."""
    path = Path(resolve_path(model_path))
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json"]))
    if not any(path.glob("*.safetensors")):
        raise RecipeError(
            f"model path {model_path!r}: no *.safetensors in {path}; the vLLM engine needs a checkpoint in that "
            "format; load the model with transformers and save it again with save_pretrained"
        )
    return path


def _shapes(folder: Path) -> Shapes:
    """Shape of every tensor that new weights must bring, from the heads of a checkpoint's files."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    config = json.loads((folder / "config.json").read_text())
    tied = config.get("tie_word_embeddings", False) and "lm_head.weight" in shapes and len(shapes) > 1
    # Neither is exported: tied weights come once, and old checkpoints hold what is computed.
    return {
        name: shape
        for name, shape in shapes.items()
        if not (tied and name == "lm_head.weight") and not name.endswith(".inv_freq")
    }


def _roomy_folder(weights: Mapping[str, torch.Tensor]) -> Path | None:
    """Shared memory where the weights fit with room to spare; containers often have little. None: the default."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    if _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > 1.2 * size:
        return _SHARED_MEMORY
    return None
