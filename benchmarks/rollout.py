"""Rollouts and whole GRPO steps beside TRL's GRPOTrainer: same machine, model and lengths, one run.

    python -m benchmarks.rollout [--quick] [--json FILE]

The model has SmolLM2-135M's shape (``--quick``: 4 of its 30 layers, a quarter of its vocabulary) and random weights, in
bfloat16. Lengths are forced on both sides: ours by each request's budget, without end-of-turn tokens; TRL's by a logits
processor that forbids the end-of-turn token before a row's length and forces it there, so that TRL masks, pads and
stops as it does for real answers. TRL runs without vLLM (there is none for this machine), bfloat16 weights, ``beta=0``
and no gradient checkpointing, which are its fastest settings here. A step of ours is generation, learning in bfloat16
over float32 master weights, and the new weights' way back to the engine; TRL's is its own training step.

``padding_share`` counts what goes into the embedding layer: positions that belong to no prompt, answer or sample.
``journal_cost`` compares decode steps that the journal writes with their neighbours that it does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, TrainerCallback

from benchmarks.learner import MODELS
from benchmarks.measure import Metric, arguments, report
from posttrain.config import GRPO, Optim, Workers
from posttrain.conversation.chat import ChatFormat
from posttrain.engine.file_journal import FileJournal
from posttrain.engine.journal import Journal, Progress
from posttrain.engine.transformers_engine import TransformersEngine
from posttrain.engine.weights import export_weights, import_weights
from posttrain.learner.learner import Learner
from posttrain.learner.objectives import GrpoObjective
from posttrain.models import load_model, load_tokenizer, resolve_path
from posttrain.protocols import Sandbox
from posttrain.rollout.player import GroupJob, Play, Player
from posttrain.types import Completion, Message, Request, Rollout, Sample, Sampling, Score, Task, TokenArrays, Tokens

TINY = "package:recipes/tiny"
GROUP = 8


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything."""

    layers: int
    vocabulary: int
    prompt: int
    uniform_tokens: int
    lengths: tuple[int, ...]
    steps: int
    """Measured steps, after one that warms up."""
    journal_steps: int


FULL = Size(30, 49_152, 32, 64, (32,) * 31 + (480,), steps=1, journal_steps=400)
QUICK = Size(4, 12_288, 16, 16, (6,) * 31 + (90,), steps=1, journal_steps=240)


def make_model(size: Size) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = MODELS["135M"] | {"num_hidden_layers": size.layers, "vocab_size": size.vocabulary}
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, max_position_embeddings=8192, **shape))


def prompts_of(count: int, size: Size) -> list[np.ndarray]:
    """A prompt for each group of eight."""
    rng = np.random.default_rng(0)
    return [rng.integers(100, 4000, size.prompt).astype(np.int32) for _ in range(count // GROUP)]


@contextlib.contextmanager
def engine_of(model: LlamaForCausalLM, journal: Journal | None = None) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(model, stop_ids=[], max_batch_size=64, journal=journal)
    yield engine
    engine.close()


def generate(engine: TransformersEngine, lengths: Sequence[int], size: Size, name: str) -> list[Completion]:
    prompts = prompts_of(len(lengths), size)
    requests = [
        Request(id=f"{name}/{i}", prompt_ids=prompts[i // GROUP], sampling=Sampling(max_tokens=length), seed=i)
        for i, length in enumerate(lengths)
    ]

    async def all_of_them() -> list[Completion]:
        return list(await asyncio.gather(*map(engine.generate, requests)))

    return asyncio.run(all_of_them())


class Embedded:
    """Counts the positions that enter a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.positions = 0
        embedding: torch.nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        embedding.register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.positions += inputs[0].numel()


def samples_of(completions: Sequence[Completion], size: Size) -> list[Sample]:
    prompts = prompts_of(len(completions), size)
    samples = []
    for i, completion in enumerate(completions):
        prompt = prompts[i // GROUP]
        arrays = TokenArrays(
            token_ids=np.concatenate([prompt, completion.token_ids]),
            loss_mask=np.arange(len(prompt) + len(completion.token_ids)) >= len(prompt),
            logprobs=np.concatenate([np.zeros(len(prompt), np.float32), completion.logprobs]),
            versions=np.concatenate([np.full(len(prompt), -1, np.int32), completion.versions]),
        )
        sample = Sample(id=str(i), task_id=str(i // GROUP), domain="d", tokens=Tokens.of(arrays))
        samples.append(replace(sample, advantage=1.0 if i % 2 else -1.0))
    return samples


def our_step(size: Size) -> tuple[float, float]:
    """Seconds of a ragged step, and the share of padding in it."""
    master = make_model(size)
    served = copy.deepcopy(master).to(torch.bfloat16)
    counts = [Embedded(master), Embedded(served)]
    learner = Learner(
        master,
        optim=Optim(learning_rate=1e-6),
        num_steps=100,
        tokens_per_micro_batch=2048,
        dtype=torch.bfloat16,
    )
    objective = GrpoObjective(config=GRPO(), max_completion_tokens=max(size.lengths))
    taken = []
    with engine_of(served) as engine:
        for step in range(1 + size.steps):
            for count in counts:
                count.positions = 0
            before = engine.counters()
            began = time.perf_counter()
            samples = samples_of(generate(engine, size.lengths, size, f"step{step}"), size)
            learner.update(samples, objective)
            weights = export_weights(learner.weights(torch.bfloat16).items(), torch.bfloat16)
            engine.load_weights(import_weights(weights), step + 1)
            taken.append(time.perf_counter() - began)
            after = engine.counters()
    work = sum(after[name] - before[name] for name in ("prefill_tokens", "decode_tokens"))
    useful = work + sum(map(len, samples))
    return statistics.median(taken[1:]), 1 - useful / sum(count.positions for count in counts)


def our_generation(size: Size) -> float:
    """Tokens per second of 64 rows of equal length."""
    with engine_of(make_model(size).to(torch.bfloat16)) as engine:
        generate(engine, [4] * 64, size, "warm-up")
        began = time.perf_counter()
        completions = generate(engine, [size.uniform_tokens] * 64, size, "measured")
        return sum(len(c.token_ids) for c in completions) / (time.perf_counter() - began)


class ForcedLengths(LogitsProcessor):
    """Lets each row end at its length and nowhere else."""

    def __init__(self, lengths: Sequence[int], end: int) -> None:
        self._lengths, self._end, self._begun = torch.tensor(lengths), end, None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._begun is None:
            self._begun = input_ids.shape[1]
        done = input_ids.shape[1] - self._begun + 1
        scores[:, self._end] = -torch.inf
        ending = self._lengths == done
        scores[ending] = -torch.inf
        scores[ending, self._end] = 0.0
        return scores


class StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.began: list[float] = []
        self.ended: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began.append(time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ended.append(time.perf_counter())


def trl_trainer(size: Size, lengths: Sequence[int], times: StepTimes) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model = make_model(size).to(torch.bfloat16)
    tokenizer = load_tokenizer(resolve_path(TINY))
    end = tokenizer.eos_token_id
    plain = model.generate

    def forced(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs, logits_processor=LogitsProcessorList([ForcedLengths(lengths, end)]))

    model.generate = forced
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        # All rows at once would not fit into 24 GiB: the logits of 32 samples of 512 tokens take 3 GiB in float32.
        per_device_train_batch_size=GROUP,
        gradient_accumulation_steps=len(lengths) // GROUP,
        num_generations=GROUP,
        max_completion_length=max(lengths),
        max_steps=1 + size.steps,
        learning_rate=1e-6,
        beta=0.0,
        bf16=True,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_strategy="no",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    # As many words as ours have tokens, more or less: the tiny tokenizer knows these.
    rows = [{"prompt": " ".join(["one two"] * (size.prompt // 2))}] * len(lengths)
    return GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **kwargs: [float(i % 2) for i in range(len(completions))],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[times],
    )


def trl_step(size: Size) -> float:
    """Seconds of TRL's ragged step."""
    times = StepTimes()
    trl_trainer(size, size.lengths, times).train()
    return statistics.median(e - b for b, e in list(zip(times.began, times.ended, strict=True))[1:])


def trl_generation(size: Size) -> float:
    """Tokens per second of TRL's generation of 64 rows of equal length."""
    trainer = trl_trainer(size, [size.uniform_tokens] * 64, StepTimes())
    prompts = [row["prompt"] for row in trainer.train_dataset]
    trainer.model.eval()
    times = []
    for _ in range(2):
        began = time.perf_counter()
        generated = trainer._generate(prompts)[1]
        times.append(time.perf_counter() - began)
    assert {len(ids) for ids in generated} == {size.uniform_tokens}
    return sum(map(len, generated)) / times[-1]


class EveryOtherStep(FileJournal):
    """A journal that writes in one step of every two, the first or the second in turn."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, writer="benchmark")
        self.steps: list[tuple[float, bool]] = []
        """When each step came to its end, and whether it was written."""

    def append(self, rows: Sequence[Progress]) -> None:
        number = len(self.steps)
        writes = number % 2 == number // 2 % 2
        self.steps.append((time.perf_counter(), writes))
        if writes or any(row.finish is not None for row in rows):
            super().append(rows)

    def costs(self) -> list[float]:
        """Share of its time that writing took, for each two steps but the first and the last."""
        seconds = [after[0] - before[0] for before, after in itertools.pairwise(self.steps)]
        pairs = [
            sorted(zip((self.steps[i][1], self.steps[i + 1][1]), seconds[i : i + 2], strict=True))
            for i in range(2, len(seconds) - 2, 2)
        ]
        return [1 - without / written for (_, without), (_, written) in pairs]


def journal_cost(size: Size) -> tuple[float, float]:
    """Median share of a decode step that the journal takes, and the standard error of that median."""
    with tempfile.TemporaryDirectory() as folder:
        journal = EveryOtherStep(Path(folder))
        with engine_of(make_model(size).to(torch.bfloat16), journal) as engine:
            generate(engine, [size.journal_steps] * 64, size, "journal")
    costs = journal.costs()
    # Of a normal distribution with these quartiles, since a neighbour's burst says nothing about the journal.
    low, _, high = statistics.quantiles(costs, n=4)
    return statistics.median(costs), 1.2533 * (high - low) / 1.349 / math.sqrt(len(costs))


@dataclass(frozen=True)
class Slow:
    """An environment whose reset, tool call and reward take 0.1 s each."""

    max_turns: int = 2

    async def start(self, task: Task, sandbox: Sandbox | None) -> SlowEpisode:
        await asyncio.sleep(0.1)
        return SlowEpisode()

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        await asyncio.sleep(0.1)
        return Score(value=1.0)


class SlowEpisode:
    def __init__(self) -> None:
        self._called = False

    async def respond(self, text: str) -> tuple[Message, ...] | None:
        if self._called:
            return None
        self._called = True
        await asyncio.sleep(0.1)
        return ({"role": "tool", "content": "done"},)

    async def artifacts(self) -> Mapping[str, bytes]:
        return {}


def env_seconds(count: int) -> float:
    """Seconds for this many rollouts in a slow environment with a real model of two short turns."""
    path = resolve_path(TINY)
    chat = ChatFormat(load_tokenizer(path))
    engine = TransformersEngine(load_model(path, torch.float32), stop_ids=chat.stop_ids)
    player = Player(engine=engine, judge_engine=None, chat=chat, substrate=None, workers=Workers(max_retries=0))
    environment = Slow()
    # One end-of-turn token each: the model's own share stays small, and a cut-off turn would call no tool.
    sampling = Sampling(max_tokens=8, stop_token_ids=tuple(range(load_tokenizer(path).vocab_size)))
    play = Play(environment=environment, reward=environment, sampling=sampling, max_sequence_tokens=200)
    task = Task(id="t", domain="d", prompt=({"role": "user", "content": "go"},))

    async def measure() -> float:
        await player.play([GroupJob(id="warm-up", task=task, num_rollouts=1, play=play, seed=0)])
        began = time.perf_counter()
        [group] = await player.play([GroupJob(id="measured", task=task, num_rollouts=count, play=play, seed=0)])
        taken = time.perf_counter() - began
        assert all(
            len(rollout.turns) == 2 and score.value == 1
            for rollout, score in zip(group.rollouts, group.scores, strict=True)
        )
        return taken

    taken = asyncio.run(measure())
    engine.close()
    return taken


def reprefill_share(size: Size) -> float:
    """States of a conversation's past that were computed again, over its length, in six turns that only append."""
    rng = np.random.default_rng(0)
    conversation = rng.integers(100, 4000, 64).astype(np.int32)
    known = again = 0
    with engine_of(make_model(replace(size, layers=2)).to(torch.bfloat16)) as engine:
        for turn in range(6):
            before = engine.counters()["prefill_tokens"]
            asked = Request(id=f"e/{turn}", prompt_ids=conversation, sampling=Sampling(max_tokens=16), continued=True)
            completion = asyncio.run(engine.generate(asked))
            # The last token of a prompt goes through the decode step.
            again += engine.counters()["prefill_tokens"] - before - (len(conversation) - known - 1)
            known = len(conversation) + len(completion.token_ids)
            conversation = np.concatenate([conversation, completion.token_ids, rng.integers(100, 4000, 24)])
            conversation = conversation.astype(np.int32)
    return again / known


def main() -> None:
    options = arguments(__doc__).parse_args()
    size = QUICK if options.quick else FULL
    step, padding = our_step(size)
    ours = our_generation(size)
    cost, error = journal_cost(size)
    gc.collect()
    their_step, theirs = trl_step(size), trl_generation(size)
    metrics = [
        Metric("ragged_step_speedup", their_step / step, "times", ">= 5"),
        Metric("ragged_step", step, "s", ""),
        Metric("ragged_step_trl", their_step, "s", ""),
        Metric("uniform_generation_speedup", ours / theirs, "times", ">= 1.5"),
        Metric("uniform_generation", ours, "tokens/s", ""),
        Metric("uniform_generation_trl", theirs, "tokens/s", ""),
        Metric("env_seconds_16", env_seconds(16), "s", "<= 0.5"),
        Metric("padding_share", padding, "share", "<= 0.05"),
        Metric("reprefill_share", reprefill_share(size), "share", "<= 0.02"),
        Metric("journal_cost", cost, "share", "<= 0.02"),
        Metric("journal_cost_error", error, "share", ""),
    ]
    title = f"rollouts, SmolLM2-135M's shape with {size.layers} layers, {len(size.lengths)} ragged and 64 equal rows"
    report(title, metrics, options.json, lengths=size.lengths)


if __name__ == "__main__":
    main()
