"""The tiny base language model that ships with the package, and how it was made.

``python -m recipes.tiny_base --out DIR`` generates the corpus of ``recipes.tiny_corpus``, trains a byte-level BPE
tokenizer and a small Llama on it, and writes a plain ``transformers`` checkpoint. The corpus and the order of
training are fixed by the seed; the weights are the same bit for bit on the same machine with the same thread count.
The shipped weights come from another machine. A rebuild on a 2-core AMD EPYC gave the same tokenizer and other weights;
the quickstart, run once with them, met the same checks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.tiny_corpus import Document, Mix, documents, sample

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("user", "assistant", "tool", "system")
SPECIAL_TOKENS = (PAD, END, *(f"<|{role}|>" for role in ROLES))

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Every message is closed on its own, so a longer conversation begins with the tokens of a shorter one."""

WORD_PATTERN = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's split without contractions, and with every digit on its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One stretch of training on one corpus: warm-up, constant rates, then linear decay."""

    mix: Mix
    num_steps: int
    learning_rate: float
    """Of the matrices inside the layers, under Muon; on sums it needed half the tokens that AdamW did."""
    embedding_learning_rate: float
    """Of embeddings and norms, under AdamW."""
    decay_share: float
    """Last part of the phase, in which the rates fall."""
    warmup_steps: int = 60
    seed: int


SKILLS = Phase(
    mix=Mix(
        shares={
            "math": 1.5,
            "math page": 5.0,
            "code": 0.8,
            "code page": 0.4,
            "agent": 1.3,
            "agent page": 0.3,
            "writing": 1.0,
            "writing page": 0.4,
            "judge": 2.5,
            "glossary": 5.0,
            "echo": 1.0,
        }
    ),
    num_steps=8_500,
    learning_rate=5e-3,
    embedding_learning_rate=3e-3,
    decay_share=0.5,
    seed=0,
)
JUDGING = Phase(
    mix=Mix(
        shares={
            "math": 1.0,
            "math page": 3.0,
            "code": 0.7,
            "code page": 0.3,
            "agent": 1.1,
            "agent page": 0.2,
            "writing": 1.0,
            "writing page": 0.3,
            "judge": 6.0,
            "glossary": 6.0,
            "echo": 0.4,
        }
    ),
    num_steps=2_600,
    learning_rate=4e-3,
    embedding_learning_rate=2e-3,
    decay_share=0.6,
    seed=1,
)
"""Judging is learned last of all skills: after ``SKILLS`` 66 % of the verdicts were right, after this 95 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyBase:
    """Sizes and phases."""

    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 352
    num_layers: int = 4
    num_heads: int = 4
    context: int = 512
    phases: tuple[Phase, ...] = (SKILLS, JUDGING)
    batch_rows: int = 8
    row_tokens: int = 128
    seed: int = 0


def build_tokenizer(texts: Sequence[str], *, vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, trained on ``texts``."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def model_config(base: TinyBase, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The Llama configuration of the checkpoint."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=base.vocab_size,
        hidden_size=base.hidden_size,
        intermediate_size=base.intermediate_size,
        num_hidden_layers=base.num_layers,
        num_attention_heads=base.num_heads,
        num_key_value_heads=base.num_heads,
        max_position_embeddings=base.context,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def encode(tokenizer: PreTrainedTokenizerFast, document: Document) -> tuple[list[int], list[int]]:
    """Token ids and labels; -100 marks what others said in a conversation, which carries no loss."""
    if isinstance(document, str):
        ids = [*tokenizer.encode(document, add_special_tokens=False), tokenizer.eos_token_id]
        return ids, ids
    ids, labels = [], []
    for message in document:
        (role,) = tokenizer.encode(f"<|{message['role']}|>", add_special_tokens=False)
        said = [*tokenizer.encode(message["content"], add_special_tokens=False), tokenizer.eos_token_id]
        ids += [role, *said]
        labels += [-100, *(said if message["role"] == "assistant" else [-100] * len(said))]
    return ids, labels


def rows(base: TinyBase, phase: Phase, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids and labels of ``base.row_tokens`` each: whole documents of all kinds one after another, then padding.

    Documents in a row see the ones before them, which does no harm here; every row starts with a fresh document.
    """
    ids: list[int] = []
    labels: list[int] = []
    for document in documents(phase.mix, seed=phase.seed):
        more_ids, more_labels = encode(tokenizer, document)
        if len(ids) + len(more_ids) > base.row_tokens:
            padding = base.row_tokens - len(ids)
            yield ids + [tokenizer.pad_token_id] * padding, labels + [-100] * padding
            ids, labels = [], []
        ids, labels = ids + more_ids[: base.row_tokens], labels + more_labels[: base.row_tokens]


def batches(
    base: TinyBase, phase: Phase, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The phase's batches of token ids and labels, both [B, T]."""
    import torch

    packed = rows(base, phase, tokenizer)
    for _ in range(phase.num_steps):
        batch = list(islice(packed, base.batch_rows))
        yield torch.tensor([ids for ids, _ in batch]), torch.tensor([labels for _, labels in batch])


def schedule(phase: Phase, step: int) -> float:
    """Warm-up, then constant, then linear to 3 % of the peak."""
    left = (phase.num_steps - step) / (phase.decay_share * phase.num_steps)
    return min(1.0, (step + 1) / phase.warmup_steps, max(0.03, left))


def optimizers(phase: Phase, model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    import torch

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=phase.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=phase.embedding_learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(base: TinyBase, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model trained through all phases; forward passes in bfloat16, weights in float32, bfloat16 in the end."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(base.seed)
    model = LlamaForCausalLM(model_config(base, tokenizer))
    for phase in base.phases:
        train_phase(base, phase, tokenizer, model.float().train())
        model = model.bfloat16()
    return model.eval()


def train_phase(base: TinyBase, phase: Phase, tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM) -> None:
    import torch

    both = optimizers(phase, model)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: schedule(phase, step)) for one in both]
    start, num_tokens = time.monotonic(), 0
    for step, (ids_BT, labels_BT) in enumerate(batches(base, phase, tokenizer), start=1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids_BT, labels=labels_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(both, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        model.zero_grad()
        num_tokens += ids_BT.numel()
        if step % 50 == 0:
            passed = time.monotonic() - start
            print(
                f"step {step}/{phase.num_steps} loss {loss.item():.3f} {num_tokens} tokens {passed:.0f} s", flush=True
            )


def build(base: TinyBase, out: Path) -> None:
    """Train everything and write the checkpoint to ``out``."""
    corpus = sample(base.phases[0].mix, count=20_000, seed=base.seed)
    texts = [text for document in corpus for text in _texts(document)]
    tokenizer = build_tokenizer(texts, vocab_size=base.vocab_size, context=base.context)
    train(base, tokenizer).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _texts(document: Document) -> list[str]:
    return [document] if isinstance(document, str) else [message["content"] for message in document]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny base model from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    arguments = parser.parse_args()
    start = time.monotonic()
    build(TinyBase(), arguments.out)
    print(f"wrote {arguments.out} in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
