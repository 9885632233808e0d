"""Gives a tokenizer and a model the tokens of the V4 format, where they lack them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import AddedToken, PreTrainedTokenizerBase

from posttrain.conversation import v4_tokens as tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CHAT_FORMAT = "chat_format"
"""Key in ``tokenizer_config.json`` under which a tokenizer says how conversations are written in it."""
NOISE = 0.02
"""Standard deviation of the noise on new rows, over that of all entries of the matrix."""


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Make a tokenizer write the V4 format, in place, and return the tokens that had to be added.

    Tokens that it has keep their ids. It remembers the choice when it is saved.
    """
    lacking = tuple(token for token in tokens.ALL if token not in tokenizer.get_vocab())
    added = [AddedToken(token, special=token in tokens.CONTROL, normalized=False) for token in lacking]
    tokenizer.add_tokens(added)
    tokenizer.bos_token, tokenizer.eos_token = tokens.BOS, tokens.EOS
    tokenizer.init_kwargs[CHAT_FORMAT] = "v4"
    return lacking


def prepare_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, added: Sequence[str], *, seed: int = 0
) -> None:
    """Give a model rows for the tokens that ``prepare_tokenizer`` added, in place.

    A new row is the mean of the rows of the token's own text in the pieces the old vocabulary has for it (Gee et al.
    2022, "Fast Vocabulary Transfer for Language Model Compression", arXiv 2402.09977), plus a little normal noise, so
    that no two are equal. An output matrix of its own is treated alike: the new token starts out as likely as its
    pieces are on average, rather than drowning all others as a row of zeros may (Hewitt 2021, "Initializing New Word
    Embeddings for Pretrained Language Models"). A matrix that was padded to a multiple of a power of two stays so.
    """
    import torch

    rows = len(_matrices(model)[0])
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=padding(rows), mean_resizing=False)
    vocabulary = tokenizer.get_vocab()
    pieces = {vocabulary[token]: _pieces(tokenizer, token) for token in added}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for matrix in _matrices(model):
            _fill(matrix, pieces, rows, generator)
    for config in (model.config, model.generation_config):
        if config is not None:
            config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id


def _matrices(model: PreTrainedModel) -> list[torch.Tensor]:
    """What has a row for each token: the input matrix, and the output matrix where that is another one."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    found: list[Any] = [inputs.weight]
    if outputs is not None and outputs.weight is not inputs.weight:
        found.append(outputs.weight)
    return found


def padding(rows: int) -> int:
    """The power of two, 128 at most, that a vocabulary was padded to a multiple of."""
    return min(rows & -rows, 128)


def _fill(matrix: torch.Tensor, pieces: dict[int, list[int]], rows: int, generator: torch.Generator) -> None:
    import torch

    spread = NOISE * matrix[:rows].float().std()
    for row, parts in pieces.items():
        noise = spread.cpu() * torch.randn(matrix.shape[1], generator=generator)
        matrix[row] = (matrix[parts].float().mean(0) + noise.to(matrix.device)).to(matrix.dtype)
    # Rows that no token has are never looked up, and in the head they take mass from the others.
    last = max(pieces, default=rows - 1) + 1
    if last < len(matrix) and last > rows:
        matrix[last:] = matrix[:rows].float().mean(0).to(matrix.dtype)


def _pieces(tokenizer: PreTrainedTokenizerBase, token: str) -> list[int]:
    """How the old vocabulary writes a new token: in two parts, neither of which is an added token."""
    parts = (token[:1], token[1:])
    return [i for part in parts for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
