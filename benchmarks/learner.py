"""One optimizer step of the learner, GRPO and distillation, against the matrix products it is made of.

    python -m benchmarks.learner [--quick] [--json FILE] [--device cpu|cuda]

The floor is 6 x parameters x tokens floating-point operations at the rate of a large bfloat16 product measured in the
same run. Samples are ragged, packed into micro-batches, and random, as are the weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import Metric, arguments, random_tokens, report, seconds
from posttrain.config import GRPO, Distill, Optim
from posttrain.learner.distillation import DistillObjective
from posttrain.learner.learner import Learner
from posttrain.learner.objectives import GrpoObjective, Objective
from posttrain.types import Sample
from teachers.cache import MemoryStore

MODELS: dict[str, dict[str, Any]] = {
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
    },
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
}


def make_samples(count: int, vocabulary: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(64, 448, count)
    return [
        Sample(
            id=f"sample-{index}",
            task_id=f"task-{index}",
            domain="math",
            tokens=random_tokens(rng, length, vocabulary, prompt=32),
            advantage=float(rng.normal()),
            teacher="teacher",
        )
        for index, length in enumerate(lengths)
    ]


def objectives(samples: list[Sample], width: int, vocabulary: int, device: str) -> dict[str, Objective]:
    generator = torch.Generator().manual_seed(0)
    store = MemoryStore()
    for sample in samples:
        store.put(sample.id, torch.randn(sample.num_loss_tokens, width, generator=generator).bfloat16())
    head = (torch.randn(vocabulary, width, generator=generator) * 0.02).bfloat16().to(device)
    # The objective reads two settings; a whole Distill would ask for a library of teachers.
    config = Distill.model_construct(temperature=1.0, loss_chunk_tokens=None)
    return {
        "grpo": GrpoObjective(config=GRPO(), max_completion_tokens=512),
        "distill": DistillObjective(config=config, states=store, head_of=lambda _: head),
    }


def flops_per_second(device: str) -> float:
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device, repeats=5)


def measure(name: str, device: str, flops: float) -> list[Metric]:
    """Tokens per second of each objective on the model ``name``, and its time over the floor."""
    config = MODELS[name]
    samples = make_samples(128 if device == "cuda" else 8, config["vocab_size"])
    tokens = sum(len(sample) for sample in samples)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **config))
    floor = 6 * model.num_parameters() * tokens / flops
    learner = Learner(
        model,
        optim=Optim(learning_rate=1e-5),
        num_steps=1000,
        tokens_per_micro_batch=16_384 if device == "cuda" else 2048,
        dtype=torch.bfloat16,
    )
    metrics = []
    for kind, objective in objectives(samples, config["hidden_size"], config["vocab_size"], device).items():
        taken = seconds(partial(learner.update, samples, objective), device, repeats=3)
        metrics += [
            Metric(f"{kind}_{name}", tokens / taken, "tokens/s", ""),
            Metric(f"{kind}_{name}_over_floor", taken / floor, "ratio", ""),
        ]
    learner.close()
    return metrics


def main() -> None:
    options = arguments(__doc__).parse_args()
    names = ["135M"] if options.quick or options.device == "cpu" else list(MODELS)
    flops = flops_per_second(options.device)
    metrics = [Metric("bf16_product", flops / 1e12, "TFLOP/s", "")]
    for name in names:
        metrics += measure(name, options.device, flops)
    report(f"learner, {options.device}", metrics, options.json, device=options.device)


if __name__ == "__main__":
    main()
