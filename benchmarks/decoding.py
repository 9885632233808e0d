"""The embedded engine beside transformers' own ``generate``: one model, one device, without Ray or TRL.

    python -m benchmarks.decoding [--quick] [--json FILE] [--device cpu|cuda]

The model has SmolLM2-135M's shape and random weights, in bfloat16. ``generate`` gets the same prompts in one batch and
computes rows that have ended until the last one ends. The journal is written as in a real run. ``logprob_error`` is the
largest difference between a log-probability the engine reports and a plain forward pass of the same model in float32.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.learner import MODELS
from benchmarks.measure import Metric, arguments, report, seconds
from posttrain.engine.file_journal import FileJournal
from posttrain.engine.transformers_engine import TransformersEngine
from posttrain.types import Completion, Request, Sampling

PROMPT_TOKENS = 32
GROUP = 8
UNIFORM = (128,) * 64
RAGGED = (32,) * 31 + (480,)
NAMES = count()


def make_model(layers: int, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = MODELS["135M"] | {"num_hidden_layers": layers}
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, max_position_embeddings=8192, **shape))
    return model.to(device=device, dtype=dtype).eval()  # type: ignore[arg-type]


def prompts_of(rows: int) -> list[np.ndarray]:
    """A prompt for each row; those of one group are the same."""
    rng = np.random.default_rng(0)
    groups = [rng.integers(100, 4000, PROMPT_TOKENS).astype(np.int32) for _ in range(rows // GROUP)]
    return [groups[row // GROUP] for row in range(rows)]


def ours(engine: TransformersEngine, lengths: Sequence[int]) -> list[Completion]:
    name = next(NAMES)
    requests = [
        Request(id=f"{name}/{row}", prompt_ids=prompt, sampling=Sampling(max_tokens=length), seed=row)
        for row, (prompt, length) in enumerate(zip(prompts_of(len(lengths)), lengths, strict=True))
    ]

    async def all_of_them() -> list[Completion]:
        return list(await asyncio.gather(*map(engine.generate, requests)))

    return asyncio.run(all_of_them())


def theirs(model: LlamaForCausalLM, lengths: Sequence[int]) -> None:
    prompts = torch.tensor(np.stack(prompts_of(len(lengths))), device=model.device)
    longest = max(lengths)
    model.generate(  # type: ignore[operator]
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        max_new_tokens=longest,
        min_new_tokens=longest,
        pad_token_id=0,
    )


def logprob_error(layers: int, device: str) -> float:
    engine = TransformersEngine(make_model(layers, device, torch.float32), stop_ids=[])
    completions = ours(engine, (32, 8, 48, 16, 32, 24, 40, 64))
    engine.close()
    model, worst = make_model(layers, device, torch.float32), 0.0
    for prompt, completion in zip(prompts_of(8), completions, strict=True):
        drawn = torch.tensor(np.asarray(completion.token_ids), dtype=torch.long, device=device)
        row = torch.cat([torch.tensor(prompt, dtype=torch.long, device=device), drawn])
        with torch.no_grad():
            logits = model(input_ids=row[None]).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, drawn[:, None])[:, 0].cpu().numpy()
        worst = max(worst, float(np.abs(np.asarray(completion.logprobs) - expected).max()))
    return worst


def main() -> None:
    options = arguments(__doc__).parse_args()
    device, layers, shorter = options.device, 4 if options.quick else 30, 4 if options.quick else 1
    # In full precision, or the comparison with a plain pass would be one with TF32.
    torch.backends.cuda.matmul.allow_tf32 = False
    metrics: list[Metric] = []
    with tempfile.TemporaryDirectory() as folder:
        journal = FileJournal(Path(folder), writer="engine")
        model = make_model(layers, device, torch.bfloat16)
        engine = TransformersEngine(make_model(layers, device, torch.bfloat16), stop_ids=[], journal=journal)
        for name, full in (("uniform", UNIFORM), ("ragged", RAGGED)):
            lengths = [length // shorter for length in full]
            took = seconds(partial(ours, engine, lengths), device, repeats=1)
            peer = seconds(partial(theirs, model, lengths), device, repeats=1)
            metrics += [
                Metric(f"{name}_speedup", peer / took, "times", ""),
                Metric(name, sum(lengths) / took, "tokens/s", ""),
                Metric(f"{name}_generate", sum(lengths) / peer, "tokens/s", ""),
            ]
        engine.close()
    metrics.append(Metric("logprob_error", logprob_error(layers, device), "nats", "<= 1e-4"))
    report("decoding", metrics, options.json)


if __name__ == "__main__":
    main()
