"""Models and tokenizers: where a recipe's ``path`` leads, and what type they compute in."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from posttrain.checkpoint_files import fetch, is_url, made_whole
from posttrain.config import Model
from posttrain.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PACKAGE = "package:"
_GGUF = ".gguf"
_NATIVE_BF16_PARAMETERS = 30_000_000
"""Smaller models gain little on a CPU and keep float32's precision. A decode step of 64 rows on one AVX512-BF16
core took 0.85x of float32's time at 4 million parameters and 0.49x at 135 million."""


def resolve_path(path: str) -> str:
    """What ``from_pretrained`` takes for a path written as in ``posttrain.config.Model.path``.

    Local folders and package paths become absolute; a hub name stays as it is; what lies at an fsspec URL is fetched
    on first use; a ``.gguf`` file becomes the folder of a plain float32 checkpoint, converted on first use. Raises
    ``RecipeError`` naming what was looked for.
    """
    if is_url(path):
        return _checkpoint(fetch(path, cache_dir()), path)
    if path.startswith(_PACKAGE):
        return _checkpoint(_inside_package(path), path)
    local = Path(path).expanduser()
    if local.exists():
        return _checkpoint(local.resolve(), path)
    if path.endswith(_GGUF) and path.count("/") >= 2 and not _looks_local(path):
        return _converted(_hub_file(path))
    if _looks_local(path) or path.count("/") > 1 or path.endswith(_GGUF):
        raise RecipeError(
            f"model path {path!r}: nothing at {local.absolute()}; expected a folder with config.json, a .gguf file, a "
            "hub name such as org/name, an fsspec URL, or package:IMPORT/sub/path; correct the path or make the "
            "checkpoint first"
        )
    return path


def base_path(model: Model) -> str:
    """Where the checkpoint is that a run starts from: the given one, or a copy of it in the cache, made on first use,
    that got what the recipe asks for: tokens of the V4 format, or stability options in its config."""
    from posttrain.stability.layers import QUANTISATION, SWIGLU_LIMIT, use_stable_layers

    path = _with_chat(resolve_path(model.path), model.chat)
    wanted = {SWIGLU_LIMIT: model.swiglu_limit, QUANTISATION: model.fake_quantization}
    entries = {name: value for name, value in wanted.items() if value is not None}
    if not entries:
        return path

    def prepare(folder: Path) -> None:
        import torch

        loaded = load_model(path, torch.float32)
        loaded.config.update(entries)
        use_stable_layers(loaded)
        loaded.save_pretrained(folder)
        load_tokenizer(path).save_pretrained(folder)

    chosen = "-".join(str(value) for value in entries.values())
    return str(made_whole(cache_dir() / "stable" / f"{Path(path).name}-{chosen}-{_content_hash(Path(path))}", prepare))


def resolve_folder(path: str, *, holding: str) -> str:
    """A local folder with a file named ``holding``, such as an adapter's, from a path or an fsspec URL."""
    folder = fetch(path, cache_dir()) if is_url(path) else Path(path).expanduser()
    if not (folder / holding).is_file():
        raise RecipeError(f"path {path!r}: {folder} holds no {holding}; expected a folder with one; correct the path")
    return str(folder)


def _with_chat(resolved: str, chat: Literal["template", "v4"]) -> str:
    if chat == "template":
        return resolved
    from posttrain.conversation.vocabulary import CHAT_FORMAT, prepare_model, prepare_tokenizer

    tokenizer = load_tokenizer(resolved)
    if tokenizer.init_kwargs.get(CHAT_FORMAT) == "v4":
        return resolved

    def prepare(folder: Path) -> None:
        import torch

        added = prepare_tokenizer(tokenizer)
        model = load_model(resolved, torch.float32)
        prepare_model(model, tokenizer, added)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return str(made_whole(cache_dir() / "v4" / f"{Path(resolved).name}-{_content_hash(Path(resolved))}", prepare))


def load_model(path: str, dtype: torch.dtype, attn_implementation: str | None = None) -> PreTrainedModel:
    """A causal language model in the given type, in host memory, that computes as its config says
    (``posttrain.stability.layers``). ``path`` as for ``resolve_path``."""
    from transformers import AutoModelForCausalLM

    from posttrain.stability.layers import use_stable_layers

    try:
        model = AutoModelForCausalLM.from_pretrained(
            resolve_path(path), dtype=dtype, attn_implementation=attn_implementation
        )
    except OSError as error:
        raise _unloadable(path, "model", error) from error
    use_stable_layers(model)
    return model


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; padding falls back to the end-of-text token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_path(path))
    except OSError as error:
        raise _unloadable(path, "tokenizer", error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def context_window(path: str) -> int:
    """Most tokens a model attends to, from its config."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(resolve_path(path)).get_text_config().max_position_embeddings)


def has_experts(path: str) -> bool:
    """Whether a model is a mixture of experts, from its config."""
    from transformers import AutoConfig

    from posttrain.routing import has_experts

    return has_experts(AutoConfig.from_pretrained(resolve_path(path)))


def has_native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AMX or AVX512-BF16)."""
    import torch

    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def compute_dtype(
    choice: Literal["auto", "float32", "bfloat16"], num_parameters: int, device: str = "cpu"
) -> torch.dtype:
    """The type of forward passes. ``auto``: bfloat16 on GPUs that have it, and on CPUs that have it for models big
    enough to gain; float32 otherwise."""
    import torch

    if choice != "auto":
        return torch.float32 if choice == "float32" else torch.bfloat16
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    gains = has_native_bf16() and num_parameters >= _NATIVE_BF16_PARAMETERS
    return torch.bfloat16 if gains else torch.float32


def cache_dir() -> Path:
    """Where converted checkpoints are kept: ``POSTTRAIN_CACHE``, or ``~/.cache/posttrain``."""
    return Path(os.environ.get("POSTTRAIN_CACHE") or "~/.cache/posttrain").expanduser()


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~"))


def _inside_package(path: str) -> Path:
    name, _, inside = path.removeprefix(_PACKAGE).partition("/")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(
            f"model path {path!r}: no Python package {name!r} is installed here; expected package:IMPORT/sub/path; "
            "install the distribution that brings it"
        )
    for root in spec.submodule_search_locations:
        if (Path(root) / inside).exists():
            return (Path(root) / inside).resolve()
    raise RecipeError(
        f"model path {path!r}: package {name!r} at {list(spec.submodule_search_locations)} has no {inside!r}; "
        "correct the part after the package's name"
    )


def _checkpoint(found: Path, path: str) -> str:
    if found.suffix == _GGUF:
        return _converted(found)
    if not (found / "config.json").is_file():
        raise RecipeError(
            f"model path {path!r}: {found} holds no config.json; expected a checkpoint folder as save_pretrained "
            "writes it, or a .gguf file"
        )
    return str(found)


def _hub_file(path: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    owner, name, file = path.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise _unloadable(path, "gguf file", error) from error


def _converted(gguf: Path) -> str:
    """The folder of the plain checkpoint made from a GGUF file, made now if it is not there."""
    stat = gguf.stat()
    digest = _digest(gguf, stat.st_size, stat.st_mtime_ns)
    target = cache_dir() / "gguf" / f"{gguf.stem}-{digest}"
    return str(made_whole(target, lambda folder: _convert(gguf, folder)))


def _content_hash(folder: Path) -> str:
    """Of a checkpoint's files; of a hub name, of the name."""
    digest = hashlib.sha256(str(folder).encode() if not folder.is_dir() else b"")
    for path in sorted(folder.glob("*")) if folder.is_dir() else ():
        if path.is_file():
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


@functools.lru_cache
def _digest(file: Path, _size: int, _mtime_ns: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError as error:
        raise RecipeError(f"model file {gguf}: reading GGUF needs the gguf package; install posttrain[gguf]") from error
    # Unpacked, it is a plain model; as long as it calls itself quantized, transformers refuses to save it.
    del model.hf_quantizer
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _unloadable(path: str, what: str, error: Exception) -> RecipeError:
    return RecipeError(
        f"model path {path!r}: no {what} could be loaded from {resolve_path(path) if what != 'gguf file' else path}; "
        f"expected a checkpoint that transformers reads; check the path, or the network for a hub name ({error})"
    )
